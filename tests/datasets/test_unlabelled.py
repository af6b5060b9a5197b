"""Images that nobody has labeled: everything works, and the scores are left out, which is said."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from common import BASELINES, run_cells, tiny_experiment
from PIL import Image

from stego_book.plots import figures as plots
from stego_book.studies import results
from stego_book.studies.study import Study, Variant
from stego_lib import Experiment, StegoError, evaluate, load_run, train
from stego_lib.calibration import AUTO_SHIFTS
from stego_lib.utils.notices import Notice

pytestmark = pytest.mark.usefixtures("few_samples")


@pytest.fixture(scope="module")
def root(scenes_root, tmp_path_factory) -> Path:
    """A data root whose `folder` is the scenes' images, without labels and class names."""
    root = tmp_path_factory.mktemp("unlabeled")
    shutil.copytree(scenes_root / "scenes" / "imgs", root / "folder" / "imgs")
    return root


@pytest.fixture(scope="module")
def experiment(root, backbone_file) -> Experiment:
    return tiny_experiment(root, backbone_file, dataset="folder", n_classes=5, steps=2)


@pytest.fixture(scope="module")
def run(experiment, root):
    """Trained and evaluated, which leaves a record without scores."""
    trained = train(experiment, runs_dir=root / "runs")
    with warnings.catch_warnings(action="ignore", category=Notice):
        evaluate(trained)
    return trained


def test_training_leaves_the_linear_probe_out(run):
    assert run.log.loss_linear.isna().all() and run.log.drop(columns="loss_linear").notna().all(axis=None)
    assert not run.model.linear_probe.trained and not load_run(run.folder).model.linear_probe.trained
    assert len(run.classes) == 5 == len(run.model.cluster_probe.clusters)


@pytest.mark.parametrize("id_, said", [(255, "no class"), (1, "hold only")])
def test_label_maps_with_fewer_than_two_classes_train_no_linear_probe(scenes_root, backbone_file, tmp_path, id_, said):
    shutil.copytree(scenes_root / "scenes", tmp_path / "folder")
    for path in (tmp_path / "folder/labels/train").iterdir():
        Image.fromarray(np.full_like(np.asarray(Image.open(path)), id_)).save(path)
    with pytest.warns(Notice, match=said):
        trained = train(tiny_experiment(tmp_path, backbone_file, dataset="folder", steps=2), runs_dir=tmp_path)
    assert not trained.model.linear_probe.trained
    assert set(evaluate(trained)["scores"]) == {"cluster", *BASELINES} - {"linear_features"}


def test_the_record_says_that_nothing_is_scored(run, root):
    with pytest.warns(Notice, match="no labels"):
        record = evaluate(run)
    stored = json.loads((run.folder / "metrics.json").read_text())
    assert record["scores"] == stored["scores"] == {} and "no labels" in stored["unscored"]
    assert not {"matching", "confusion", "best_by_label"} & set(stored), "no made-up numbers"
    assert stored["images"] == 6 and stored["classes"] == [f"cluster {i}" for i in range(5)]
    found = run.predict(root / "folder/imgs/val/0012.png")
    assert found.shape == (64, 64) and found.max() < 5, "clusters, as without evaluation"


@pytest.mark.parametrize("draw", [plots.score_bars, plots.confusion, plots.class_iou])
def test_a_figure_of_scores_that_do_not_exist_says_why(run, draw):
    with pytest.raises(StegoError, match="folder val has no labels"):
        draw(run.metrics)


def test_scored_and_unscored_records_are_not_averaged(run, scenes_root, backbone_file, tmp_path):
    """A mean of two seeds that passes for one of three."""
    unscored = run.metrics
    known = unscored | {"scores": {"cluster": {"accuracy": 50.0, "miou": 40.0, "iou": [40.0] * 5}}}
    assert "50.0" in results.markdown_table([known])
    with pytest.raises(StegoError, match="folder val has no labels"):
        results.markdown_table([known, unscored])


def test_a_study_of_unlabeled_images_is_refused_before_any_work(experiment, tmp_path):
    variants = [Variant("heads", "trained", experiment), Variant("heads", "pca", experiment, fixed_head="pca")]
    for variant in variants:
        with pytest.raises(StegoError, match="folder has no labels in val"):
            Study([variant], [0], tmp_path / "records").run(runs_dir=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_probe_taken_over_from_a_labeled_run_is_scored(scenes_root, root, backbone_file, tmp_path):
    """Trained with labels elsewhere, then further without: it still knows what it learned."""
    labeled = train(tiny_experiment(scenes_root, backbone_file, steps=2), runs_dir=tmp_path)
    shutil.copytree(scenes_root / "scenes", tmp_path / "folder")
    shutil.rmtree(tmp_path / "folder" / "labels" / "train")
    further = tiny_experiment(
        tmp_path, backbone_file, dataset="folder", steps=1, start_from=str(labeled.folder), shifts=(0.1, 0.1, 0.1)
    )
    run = train(further, runs_dir=tmp_path)
    assert torch.equal(run.model.linear_probe.classifier.weight, labeled.model.linear_probe.classifier.weight)
    assert {"cluster", "linear"} <= set(evaluate(run, baselines=False)["scores"])


def test_the_notebooks_run_to_the_end_on_just_images(scenes_root, backbone_file, tmp_path):
    images = shutil.copytree(scenes_root / "scenes" / "imgs" / "train", tmp_path / "my images")
    given = dict(dataset="folder", data_root=images, n_classes=4, backbone=backbone_file, runs_dir=tmp_path / "runs")
    printed = run_cells("train", **given, steps=3, batch_size=4, code_dim=8, device="cpu")
    (folder,) = (path.parent for path in (tmp_path / "runs").glob("*/metrics.json"))
    assert "has no labels" in printed and "accuracy" not in printed and str(folder) in printed
    assert {path.stem for path in (folder / "figures").glob("*.png")} == {"correspondences", "curves", "predictions"}
    run = load_run(folder)
    assert set(np.unique(run.predict(images / "0000.png"))) <= set(range(4))
    assert run.experiment.shifts == "auto" and run.correspondences["rule"] == list(AUTO_SHIFTS)
    assert run.correspondences["reason"] in printed
    assert run.watched["steps"] == [3] and run.watched["collapsed"] is False

    printed = run_cells("segment_your_images", run=folder, images=images, output=tmp_path / "maps")
    assert f"{len(list(images.iterdir()))} images segmented" in printed
    table = pd.read_csv(tmp_path / "maps" / "areas.csv", index_col="image")
    assert list(table.columns) == [f"cluster {i}" for i in range(4)] and len(table) == len(list(images.iterdir()))
    with Image.open(tmp_path / "maps" / "labels" / "0000.png") as stored:
        np.testing.assert_array_equal(np.array(stored), run.predict(images / "0000.png"))
