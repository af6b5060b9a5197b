"""From images to scores on a few small scenes: training, resuming, evaluating, predicting."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from common import BASELINES, broken_off, tiny_experiment, write_backbone
from PIL import Image
from torch.testing import assert_close

from stego_lib import (
    DataNotFound,
    Run,
    StegoError,
    evaluate,
    load_run,
    open_dataset,
    train,
    training,
)
from stego_lib.batches import Draw
from stego_lib.calibration import measure_correspondences, resolve_shifts
from stego_lib.features import open_features
from stego_lib.metrics import border_counts, confusion, match, own_assigned, scores
from stego_lib.model import build_model
from stego_lib.neighbors import nearest_neighbors
from stego_lib.utils.files import TEMPORARY, read_json

pytestmark = pytest.mark.usefixtures("few_samples")

PARTS = ("loss", "loss_self", "loss_knn", "loss_rand", "loss_cluster", "loss_linear")
CODES = ("code_self", "code_knn", "code_rand")


@pytest.fixture(scope="module")
def experiment(scenes_root, backbone_file):
    return tiny_experiment(scenes_root, backbone_file)


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory) -> Path:
    """Where the runs of this file lie, so that they share their features."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(experiment, runs_dir) -> Run:
    """A run that was trained without a break and has not been evaluated. Not to be changed."""
    return train(experiment, runs_dir=runs_dir)


@pytest.fixture(scope="module")
def evaluated(runs_dir, run) -> tuple[Run, dict]:
    """A copy of that run, evaluated: run and record."""
    again = load_run(shutil.copytree(run.folder, runs_dir / "evaluated"))
    return again, evaluate(again)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return run.model.state_dict()


def same_weights(a: Run, b: Run) -> bool:
    return all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


def test_a_run_is_a_folder(run, experiment, runs_dir):
    assert run.folder.parent == runs_dir and run.folder.name.endswith(experiment.name)
    assert read_json(run.folder / "experiment.json") == experiment.to_dict()
    assert read_json(run.folder / "provenance.json")["weights"] == run.backbone.weights_id
    assert run.step == experiment.steps and not run.model.training
    assert load_run(run.folder).shifts == run.shifts and same_weights(load_run(run.folder), run)


def test_the_log_has_one_line_a_step_and_the_loss_is_the_sum_of_its_parts(run, experiment):
    log = run.log
    assert log.index.tolist() == list(range(experiment.steps)) and set(log.columns) == {*PARTS, *CODES}
    terms = zip(experiment.weights, ("self", "knn", "rand"), strict=True)
    total = log.loss_cluster + log.loss_linear + sum(weight * log[f"loss_{kind}"] for weight, kind in terms)
    np.testing.assert_allclose(log.loss, total, rtol=1e-4)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(run, experiment, runs_dir):
    torch.manual_seed(123)  # whatever was drawn before must not matter
    state = torch.get_rng_state()
    again = train(experiment, runs_dir=runs_dir)
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is left alone"
    assert again.folder != run.folder and same_weights(again, run)
    assert (again.folder / "log.csv").read_text() == (run.folder / "log.csv").read_text()
    other = train(experiment.but(seed=1), runs_dir=runs_dir)
    assert not torch.equal(weights(other)["head.linear.weight"], weights(run)["head.linear.weight"])
    fresh = build_model(experiment, 32, len(run.classes)).state_dict()
    assert all(torch.equal(fresh[name], value) == (name == "feature_mean") for name, value in weights(run).items())


@pytest.mark.parametrize("changes", [{}, dict(rec_weight=0.5, aug_alignment_weight=0.5)], ids=str)
def test_an_interrupted_run_resumes_to_the_same_bits(scenes_root, backbone_file, tmp_path, monkeypatch, changes):
    experiment = tiny_experiment(scenes_root, backbone_file, **changes)
    whole = train(experiment, runs_dir=tmp_path / "whole")
    broken_off(experiment, tmp_path, monkeypatch, after=5)
    torch.rand(17)  # whatever was drawn meanwhile must not matter
    resumed = train(experiment, runs_dir=tmp_path, resume=True)
    assert len(list(tmp_path.glob("*/experiment.json"))) == 1 and resumed.shifts == whole.shifts
    assert not list(tmp_path.rglob(f"{TEMPORARY}*"))
    for name in ("checkpoint.safetensors", "log.csv", "correspondences.json"):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


def test_a_finished_run_is_not_trained_again(experiment, run, monkeypatch, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / run.folder.name)
    monkeypatch.setattr(training, "train_step", lambda *_: pytest.fail("it was finished"))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    again = train(experiment, runs_dir=tmp_path, resume=True)
    assert again.folder == folder and same_weights(again, run)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_predicts_only_with_the_weights_it_was_trained_on(experiment, tmp_path):
    """A file may get other weights under the same name, or another name."""
    path, other = tmp_path / "backbone.safetensors", tmp_path / "other.safetensors"
    write_backbone(path, seed=1)
    old = train(experiment.but(backbone=str(path), steps=1), runs_dir=tmp_path)
    shutil.move(path, other)
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(StegoError, match="does not exist"):
        load_run(old.folder).predict(image)
    np.testing.assert_array_equal(load_run(old.folder, backbone=str(other)).predict(image), old.predict(image))
    write_backbone(path, seed=2)
    with pytest.raises(StegoError, match="other weights"):
        _ = load_run(old.folder).backbone


def test_every_epoch_goes_through_all_images_once(experiment):
    neighbors = torch.arange(12)[:, None].roll(1)
    draws = [Draw(neighbors, experiment, step) for step in range(6)]
    for epoch in (draws[:3], draws[3:]):
        assert sorted(torch.cat([draw.rows for draw in epoch]).tolist()) == list(range(12))
    assert not torch.equal(draws[0].rows, draws[3].rows), "in another order"
    assert all(torch.equal(draw.partners, neighbors[draw.rows, 0]) for draw in draws)
    assert torch.equal(Draw(neighbors, experiment, 4).needed, draws[4].needed), "a batch depends on its step alone"


@pytest.mark.parametrize("fitted", ["joint", "after"])
def test_labels_change_neither_head_nor_clusters(scenes_root, backbone_file, tmp_path, fitted):
    """Label maps of all images are shuffled and their ids permuted."""
    root = shutil.copytree(scenes_root, tmp_path / "data")
    labels = sorted((root / "scenes" / "labels" / "train").iterdir())
    contents = [np.array(Image.open(path)) for path in labels]
    for path, content in zip(labels, contents[1:] + contents[:1], strict=True):
        Image.fromarray(((content + 3) % 8).astype(np.uint8)).save(path)
    runs = [
        train(tiny_experiment(place, backbone_file, steps=3, probes=fitted), runs_dir=tmp_path / "runs")
        for place in (scenes_root, root)
    ]
    ours, theirs = map(weights, runs)
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed == {"linear_probe.classifier.weight", "linear_probe.classifier.bias"}
    assert runs[0].provenance.differing(runs[1].provenance) == ["labels"]


@pytest.mark.parametrize(
    "changes",
    [
        dict(head="linear"), dict(head="none"), dict(crop="five", train_size=32), dict(crop="random", train_size=32),
        dict(crop="tiles", train_size=40), dict(train_size=(32, 48), neighbors=11, batch_size=12),
        dict(official={"subtract_mean": True, "extra_clusters": 3}),
    ],
    ids=str,
)  # fmt: skip
def test_other_experiments_train_and_load(experiment, runs_dir, changes):
    run = train(experiment.but(steps=2, **changes), runs_dir=runs_dir)
    again = load_run(run.folder)
    assert same_weights(again, run) and np.isfinite(run.log.to_numpy()).all()
    assert run.model.n_clusters == 8 + run.experiment.official.extra_clusters
    assert (run.model.feature_mean.abs().max() > 0) == run.experiment.official.subtract_mean
    assert again.predict(np.zeros((40, 70, 3), np.uint8)).shape == (40, 70)


def test_the_runs_shifts_are_the_percentiles_of_its_features(experiment, run, runs_dir):
    dataset = open_dataset("scenes", experiment.data_root, "train")
    features = open_features(dataset, run.backbone, 64, runs_dir / "features")
    neighbors = nearest_neighbors(features.pooled, 2)
    measured = measure_correspondences(features, neighbors, torch.zeros(1, 32, 1, 1), experiment)
    assert run.shifts == resolve_shifts(experiment, measured) and run.shifts[1] == 0.1


def test_training_starts_from_the_head_of_another_run(experiment, run, runs_dir):
    started = train(
        experiment.but(start_from=str(run.folder), steps=1, lr_head=1e-9, lr_probes=1e-9), runs_dir=runs_dir
    )
    for name, value in weights(run).items():
        assert_close(weights(started)[name], value, rtol=0, atol=1e-6)
    assert run.provenance.differing(started.provenance) == ["start"]
    with pytest.raises(StegoError, match="start_from"):
        train(experiment.but(start_from=str(run.folder), code_dim=4), runs_dir=runs_dir)


@torch.inference_mode()
def test_the_scores_equal_a_naive_recomputation(evaluated):
    run, record = evaluated
    dataset = open_dataset("scenes", run.experiment.data_root, "val")
    counted, own, borders = ({"cluster": 0, "linear": 0} for _ in range(3))
    for i in range(len(dataset)):
        image, label = dataset[i]  # as large as eval_size, so nothing is resized
        features = [run.backbone(image[None]).half().float(), run.backbone(image[None].flip(-1)).half().float()]
        code = (run.model(features[0]) + run.model(features[1]).flip(-1)) / 2
        large = torch.nn.functional.interpolate(code, (64, 64), mode="bilinear", align_corners=False)
        clusters = torch.nn.functional.normalize(run.model.cluster_probe.clusters, dim=1)
        maps = {"cluster": torch.einsum("bkhw,nk->bnhw", large, clusters), "linear": run.model.linear_probe(large)}
        for name, values in maps.items():
            table = confusion(values[0].argmax(0), label, 8, 8)
            counted[name], own[name] = counted[name] + table, own[name] + own_assigned(table)
            borders[name] = borders[name] + border_counts(values.argmax(1), label[None], 8)
    assert counted["cluster"].sum() == 6 * 64 * 64
    for name, table in counted.items():
        expected = scores(table, match(table) if name == "cluster" else torch.arange(8))
        # Features of a batch may differ in the last bit from those of one image: a few pixels of 24,576 may differ.
        assert record["scores"][name]["accuracy"] == pytest.approx(expected["accuracy"], abs=0.02), name
        assert record["scores"][name]["miou"] == pytest.approx(expected["miou"], abs=0.05), name
        own_miou = scores(own[name], torch.tensor([*range(8), -1]))["miou"]
        assert record["scores"][name]["own_miou"] == pytest.approx(own_miou, abs=0.05), name
        predicted, correct, true, detected = borders[name].tolist()
        f = 200 * correct / predicted * detected / true / (correct / predicted + detected / true)
        assert record["scores"][name]["border_f"] == pytest.approx(f, abs=0.05), name


def test_the_record_is_whole_and_names_no_folder_of_this_machine(evaluated):
    run, record = evaluated
    text = (run.folder / "metrics.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(record)) and run.metrics == record
    assert str(run.folder.parent) not in text and run.experiment.data_root not in text
    assert set(record["scores"]) == {"cluster", "linear", *BASELINES}
    assert record["experiment"] == run.experiment.to_record() and record["step"] == 7 and record["images"] == 6
    assert (record["provenance"]["precision"], record["provenance"]["store"]) == ("float32", "full")
    table = np.array(record["confusion"])
    assert table.shape == (8, 8) and table.sum() == 6 * 64 * 64 and record["matching"] == match(table).tolist()
    hits = table[range(8), record["matching"]].sum()
    assert record["scores"]["cluster"]["accuracy"] == pytest.approx(100 * hits / table.sum())


@torch.inference_mode()
def test_what_is_predicted_is_what_is_scored(evaluated, run):
    dataset, table = open_dataset("scenes", run.experiment.data_root, "val"), 0
    for i in range(6):
        image, label = dataset[i]
        predicted, clusters = (opened.predict(image) for opened in (evaluated[0], run))
        np.testing.assert_array_equal(predicted, np.array(evaluated[1]["matching"])[clusters])
        table = table + confusion(torch.from_numpy(clusters), label, 8, 8)
    assert (table - torch.tensor(evaluated[1]["confusion"])).abs().sum() <= 20, "a few pixels of 24,576 may differ"


def test_images_come_in_any_form(run, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "image.png")
    path, pixels = tmp_path / "image.png", torch.from_numpy(array).permute(2, 0, 1)
    forms = [path, str(path), Image.fromarray(array), pixels, array[..., ::-1][..., ::-1]]
    for predicted in run.predict(forms):
        np.testing.assert_array_equal(predicted, run.predict(array))
    assert run.predict([]) == [] and len(run.predict((array,))) == 1
    for wrong in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), torch.zeros(8, 8, 3, dtype=torch.uint8)):
        with pytest.raises(StegoError, match="uint8"):
            run.predict(wrong)


def test_a_missing_dataset_or_backbone_leaves_no_run_behind(experiment, tmp_path):
    with pytest.raises(DataNotFound):
        train(experiment.but(dataset="camvid", data_root=str(tmp_path)), runs_dir=tmp_path / "runs")
    with pytest.raises(StegoError, match="Unknown backbone"):
        train(experiment.but(backbone="dino"), runs_dir=tmp_path / "runs")
    assert not list(tmp_path.glob("runs/*/experiment.json"))


def test_a_folder_without_a_run_and_a_run_without_scores_are_errors(run, tmp_path):
    with pytest.raises(StegoError, match=r"experiment\.json"):
        load_run(tmp_path)
    with pytest.raises(StegoError, match=r"metrics\.json"):
        _ = run.metrics


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "experiment.json", "classes.json"])
def test_a_damaged_file_is_named(run, tmp_path, name):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StegoError, match=name):
        load_run(folder)
