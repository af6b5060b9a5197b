"""Trainers of the successors on tiny scenes: a run, its scores and predictions, a break, and what labels may not touch."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from common import broken_off, few_samples, tiny_experiment

from stego_lib import Experiment, StegoError, evaluate, load_run, open_dataset, train, training
from stego_lib.experiment import SUCCESSORS, recipe_of
from stego_lib.successors import cause, hp
from stego_lib.training import trainer_of
from stego_lib.utils.files import read_json
from stego_lib.utils.notices import Notice

METHODS = {
    "smooseg": ["loss", "loss_self", "loss_rand", "loss_data"],
    "hp": ["loss", "loss_global", "loss_local", "lambda"],
    "cause": ["loss", "positives", "negatives", "bank"],
    "primaps": ["loss", "confidence", "clusters"],
    "depthg": ["loss", "loss_self", "loss_knn", "loss_rand", "code_self", "code_knn", "code_rand", "loss_depth"],
}
"""Successors and the columns of their logs."""
pytestmark = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    few_samples(monkeypatch)
    monkeypatch.setattr(hp, "POOL_SIZE", 20)
    monkeypatch.setattr(hp, "RENEWAL", 3)
    monkeypatch.setattr(hp, "POSITIONS", 30)
    monkeypatch.setattr(cause, "CODEBOOK", 16)
    monkeypatch.setattr(cause, "FITTING", 5)
    monkeypatch.setattr(cause, "POSITIONS", 30)
    monkeypatch.setattr(cause, "BANK", 4)


def tiny(root: Path, backbone: Path, method: str, **changes: object) -> Experiment:
    return tiny_experiment(root, backbone, method=method, **(SUCCESSORS[method] | {"code_dim": 8} | changes))


@pytest.fixture
def experiment(scenes_root, backbone_file, method):
    return tiny(scenes_root, backbone_file, method)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *parts: str) -> None:
    """Equal weights, of all parts of the model or of those named."""
    names = [name for name in expected if not parts or name.split(".")[0] in parts]
    assert names and found.keys() == expected.keys()
    for name in names:
        assert torch.equal(found[name], expected[name]), name


def test_a_run_trains_is_scored_and_predicts(experiment, scenes_root, tmp_path, method):
    before = training.build_model(experiment, 32, 8).state_dict()
    run = train(experiment, runs_dir=tmp_path)
    assert run.step == len(run.log) == experiment.steps
    assert list(run.log.columns) == METHODS[method]
    assert np.isfinite(run.log.to_numpy()).all()
    changed = {
        name.split(".")[0] for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"cluster_probe", "linear_probe"} | ({"head"} if experiment.head != "none" else set())
    scores = evaluate(run)["scores"]
    assert {"cluster", "linear"} <= set(scores) and all(0 < scores[name]["accuracy"] <= 100 for name in scores)
    image = open_dataset("scenes", scenes_root, "val").images[0]
    labels, classes = run.predict(image), len(run.classes)
    assert labels.shape == (64, 64) and labels.max() < classes
    np.testing.assert_array_equal(load_run(run.folder).predict(image), labels)


@pytest.mark.parametrize("after", [1, 4])
def test_a_run_goes_on_after_a_break(experiment, tmp_path, method, monkeypatch, after):
    """It ends with the weights and the log of an uninterrupted run."""
    broken_off(experiment, tmp_path / "broken", monkeypatch, after)
    (folder,) = (path.parent for path in (tmp_path / "broken").glob("*/checkpoint.safetensors"))
    resumed = train(experiment, runs_dir=tmp_path / "broken", resume=True)
    straight = train(experiment, runs_dir=tmp_path / "straight")
    assert resumed.folder == folder
    assert_same(resumed.model.state_dict(), straight.model.state_dict())
    assert resumed.log.equals(straight.log)


def test_joint_probes_and_optional_terms_are_refused_before_any_work(experiment, tmp_path, method):
    with pytest.raises(StegoError, match=f"method='{method}' fits its probes after training: probes='after'"):
        train(experiment.but(probes="joint"), runs_dir=tmp_path)
    with pytest.raises(StegoError, match=rf"crf\w*: terms of STEGO's loss, which method='{method}' does not have"):
        train(experiment.but(crf_weight=0.5), runs_dir=tmp_path)
    if method == "cause":
        with pytest.raises(StegoError, match=r"fits its clusters after the last step.*validate_every=0"):
            train(experiment.but(validate_every=2), runs_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_labels_shape_neither_head_nor_clusters(scenes_root, backbone_file, tmp_path, method):
    """Of a run with labels, of one with those of other images, and of one without; the linear probe alone differs."""
    found = {}
    for kind in ("own", "others", "none"):
        folder = shutil.copytree(scenes_root / "scenes", tmp_path / kind / "folder")
        labels = sorted((folder / "labels" / "train").glob("*.png"))
        if kind == "others":
            contents = [path.read_bytes() for path in labels]
            for path, content in zip(labels, contents[1:] + contents[:1], strict=True):
                path.write_bytes(content)
        if kind == "none":
            shutil.rmtree(folder / "labels")
        asked = tiny(tmp_path / kind, backbone_file, method, dataset="folder", steps=4)
        found[kind] = train(asked, runs_dir=tmp_path / kind / "runs").model
    for kind in ("others", "none"):
        assert_same(found[kind].state_dict(), found["own"].state_dict(), "head", "cluster_probe", "feature_mean")
    weights = [found[kind].linear_probe.classifier.weight for kind in found]
    assert not torch.equal(weights[0], weights[1]) and not weights[2].any()


def test_other_seeds_give_other_weights(experiment, tmp_path, method):
    first, again, other = (
        train(experiment.but(seed=seed, steps=2), runs_dir=tmp_path / name)
        for seed, name in ((0, "first"), (0, "again"), (1, "other"))
    )
    assert_same(first.model.state_dict(), again.model.state_dict())
    for part in ("cluster_probe.clusters", *(["head.linear.weight"] if experiment.head != "none" else [])):
        assert not torch.equal(first.model.state_dict()[part], other.model.state_dict()[part])
    assert read_json(first.folder / "correspondences.json")["shifts"] == list(first.shifts)


def test_settings_that_change_nothing_are_named(experiment, method):
    """Those of STEGO's loss that a method lacks, where they differ from the recipe's; all others pass in silence."""
    asked = experiment.but(
        points=recipe_of("scenes", experiment.backbone).points + 1, shifts=(0.1, 0.2, 0.3), lr_head=1e-3
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer_of(asked).refuse(asked)
    texts = [str(one.message) for one in seen if one.category is Notice]
    if method == "depthg":
        assert not texts
    else:
        assert len(texts) == 1 and f"method='{method}' has no use for" in texts[0] and "points" in texts[0]
        assert ("shifts" in texts[0]) == (method != "smooseg") and ("lr_head" in texts[0]) == (method == "primaps")
    plain = Experiment.preset("scenes", method=method, data_root=experiment.data_root)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        trainer_of(plain).refuse(plain)
