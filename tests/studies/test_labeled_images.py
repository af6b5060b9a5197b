"""Scores after a few labeled images: those of `evaluate` for the same labels; the stored rows."""

import numpy as np
import pandas as pd
import pytest
from common import ROOT, tiny_experiment

from stego_book.studies.labeled_images import measure
from stego_lib import evaluate, open_dataset, train


def test_rows_are_scores_of_evaluate(scenes_root, backbone_file, tmp_path):
    run = train(tiny_experiment(scenes_root, backbone_file, steps=2, crf=False), runs_dir=tmp_path)
    rows = measure(run, 3, images=(2, 5)).set_index("images")
    assert run.taught is None and rows["draw"].unique() == [3]
    training = open_dataset("scenes", scenes_root, "train")
    for count in (2, 5):
        order = np.random.default_rng(3).permutation(len(training))[:count]
        images, labels = zip(*(training[int(number)] for number in order), strict=True)
        run.teach(list(images), [np.where(label < 0, 255, label) for label in labels])
        scores = evaluate(run, baselines=False)["scores"]["taught"]
        for key in ("accuracy", "miou", "border_f", "own_miou"):
            assert rows.loc[count, key] == pytest.approx(scores[key], abs=0.01), (count, key)


def test_the_record_has_five_draws_of_each_split():
    rows = pd.read_csv(ROOT / "book" / "records" / "studies" / "labeled_images.csv")
    assert set(rows.groupby(["dataset", "split", "images"])["draw"].nunique()) == {5}
    assert set(rows["split"]) == {"val", "test"} and set(rows["images"]) == {5, 20}
