"""Trainers of the successors on tiny scenes: a run, its scores, resuming, and what labels may not touch."""

import shutil

import numpy as np
import pytest
import torch
from common import broken_off, tiny_experiment

from stego_lib import Experiment, StegoError, evaluate, load_run, open_dataset, train, training
from stego_lib.experiment import SUCCESSORS
from stego_lib.successors import cause, hp, primaps

# Columns of the log, by method.
METHODS = {
    "smooseg": ["loss", "loss_self", "loss_rand", "loss_data"],
    "hp": ["loss", "loss_global", "loss_local", "lambda"],
    "cause": ["loss", "positives", "negatives", "bank"],
    "primaps": ["loss", "confidence", "clusters"],
    "depthg": ["loss", "loss_self", "loss_knn", "loss_rand", "code_self", "code_knn", "code_rand", "loss_depth"],
}
pytestmark = [pytest.mark.usefixtures("few_samples"), pytest.mark.parametrize("method", METHODS)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for module, sizes in (
        (hp, dict(POOL_SIZE=20, RENEWAL=3, POSITIONS=30)),
        (cause, dict(CODEBOOK=16, FITTING_STEPS=5, POSITIONS=30, BANK=4)),
        (primaps, dict(EMA_EVERY=2)),
    ):
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)


def tiny(root, backbone, method, **changes) -> Experiment:
    return tiny_experiment(root, backbone, method=method, **(SUCCESSORS[method] | {"code_dim": 8} | changes))


@pytest.fixture
def experiment(scenes_root, backbone_file, method):
    return tiny(scenes_root, backbone_file, method)


def assert_same(weights, expected, *parts: str) -> None:
    """Equal weights, of all parts of the model or of those named."""
    names = [name for name in expected if not parts or name.split(".")[0] in parts]
    assert names and weights.keys() == expected.keys()
    for name in names:
        assert torch.equal(weights[name], expected[name]), name


def test_a_run_trains_is_scored_and_predicts(experiment, scenes_root, tmp_path, method):
    before = training.build_model(experiment, 32, 8).state_dict()
    run = train(experiment, runs_dir=tmp_path)
    assert list(run.log.columns) == METHODS[method] and len(run.log) == experiment.steps
    assert np.isfinite(run.log.to_numpy()).all()
    changed = {
        name.split(".")[0] for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"cluster_probe", "linear_probe"} | ({"head"} if experiment.head != "none" else set())
    scores = evaluate(run, baselines=False)["scores"]
    assert all(0 < scores[name]["accuracy"] <= 100 for name in ("cluster", "linear"))
    image = open_dataset("scenes", scenes_root, "val").images[0]
    labels = run.predict(image)
    assert labels.shape == (64, 64) and labels.max() < len(run.classes)
    np.testing.assert_array_equal(load_run(run.folder).predict(image), labels)


def test_an_interrupted_run_resumes_to_the_bit(experiment, tmp_path, method, monkeypatch):
    straight = train(experiment, runs_dir=tmp_path / "straight")
    broken_off(experiment, tmp_path / "broken", monkeypatch, 4)
    resumed = train(experiment, runs_dir=tmp_path / "broken", resume=True)
    assert_same(resumed.model.state_dict(), straight.model.state_dict())
    assert resumed.log.equals(straight.log)
    assert len({path.parent for path in (tmp_path / "broken").glob("*/log.csv")}) == 1


def test_unsupported_options_are_refused(experiment, method):
    with pytest.raises(StegoError, match=rf"method='{method}' .*probes.*crf"):
        train(experiment.but(probes="joint", official={"crf_weight": 0.5}))
    if method == "cause":
        with pytest.raises(StegoError, match="keep_every"):
            train(experiment.but(official={"keep_every": 2}))


def test_labels_change_neither_head_nor_clusters(scenes_root, backbone_file, tmp_path, method):
    """A run with labels, one with those of other images, and one without; the linear probe alone differs."""
    models = {}
    for kind in ("own", "others", "none"):
        folder = shutil.copytree(scenes_root / "scenes", tmp_path / kind / "folder")
        labels = sorted((folder / "labels" / "train").glob("*.png"))
        if kind == "others":
            contents = [path.read_bytes() for path in labels]
            for path, content in zip(labels, contents[1:] + contents[:1], strict=True):
                path.write_bytes(content)
        if kind == "none":
            shutil.rmtree(folder / "labels")
        changed = tiny(tmp_path / kind, backbone_file, method, dataset="folder", steps=4)
        models[kind] = train(changed, runs_dir=tmp_path / kind / "runs").model
    for kind in ("others", "none"):
        assert_same(models[kind].state_dict(), models["own"].state_dict(), "head", "cluster_probe", "feature_mean")
    own, others, none = (model.linear_probe.classifier.weight for model in models.values())
    assert not torch.equal(own, others) and not none.any()
