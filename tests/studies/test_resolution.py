"""Scores at several resolutions: those of `evaluate` where the sizes agree; the stored table and its figure."""

import pytest
from common import tiny_experiment

from stego_book.studies import resolution
from stego_lib import evaluate, open_dataset, train


def test_rows_at_the_evaluation_size_are_scores_of_evaluate(scenes_root, backbone_file, tmp_path):
    run = train(tiny_experiment(scenes_root, backbone_file, steps=2, crf=True), runs_dir=tmp_path)
    val = open_dataset("scenes", run.experiment.data_root, "val")
    options = [dict(size=64, refine="none"), dict(refine="crf"), dict(tile=32, refine="none")]
    rows = resolution.measure(run, val, options)
    scores = evaluate(run, baselines=False)["scores"]
    for row, method in zip(rows.itertuples(), ("cluster", "cluster_crf"), strict=False):
        for key in ("accuracy", "miou", "own_miou", "border_f"):
            assert getattr(row, key) == pytest.approx(scores[method][key], abs=0.3), (method, key)
    assert rows["size"].tolist() == [64] * 3 and rows["tile"].dropna().tolist() == [32]
    assert (rows["seconds"] >= 0).all() and rows["images"].unique().tolist() == [6]
    rows.to_csv(tmp_path / "rows.csv", index=False)
    assert resolution.table(resolution.read(tmp_path / "rows.csv")) == resolution.table(rows)
