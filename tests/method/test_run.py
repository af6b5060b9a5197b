"""From images to scores on a few small scenes: training, resuming, evaluating, predicting, and what goes wrong."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import BASELINES, few_samples, tiny_experiment, write_backbone
from PIL import Image
from torch.testing import assert_close

from stego_lib import (
    DataNotFound,
    Run,
    StegoError,
    baselines,
    crf,
    evaluate,
    load_run,
    open_dataset,
    probes,
    train,
    training,
)
from stego_lib.baselines import LinearScorer, kmeans_on_colors, kmeans_on_features, linear_on_features
from stego_lib.batches import draw_batch
from stego_lib.calibration import measure_correspondences, resolve_shifts
from stego_lib.datasets import open_training_set
from stego_lib.datasets.crops import RandomCrop
from stego_lib.features import open_features
from stego_lib.features.store import FeatureStore
from stego_lib.loss import upsample
from stego_lib.metrics import confusion, match, scores
from stego_lib.neighbors import nearest_neighbors
from stego_lib.predict import probe_scores
from stego_lib.probes import labels_at
from stego_lib.utils.files import TEMPORARY, load_state, save_state, write_json
from stego_lib.utils.notices import Notice

VALUES = {
    "loss",
    "loss_self",
    "loss_knn",
    "loss_rand",
    "loss_cluster",
    "loss_linear",
    "code_self",
    "code_knn",
    "code_rand",
}


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
def evaluated(experiment, runs_dir, run) -> tuple[Run, dict]:
    """A copy of that run, evaluated: run and record."""
    copied = shutil.copytree(run.folder, runs_dir / "evaluated")
    again = load_run(copied)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "SAMPLES", 2000)  # k-means on fewer points
        patch.setattr(probes, "RESTARTS", 2)
        return again, evaluate(again)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return run.model.state_dict()


def same_weights(a: Run, b: Run) -> bool:
    return all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


def store_of(run: Run, split: str, **options) -> FeatureStore:
    dataset = open_dataset(run.experiment.dataset, run.experiment.data_root, split)
    return open_features(dataset, run.backbone, run.experiment.eval_size, run.folder.parent / "features", **options)


# ---------------------------------------------------------------------------------------------- training


def test_a_run_is_a_folder_with_all_that_it_takes(run, experiment, runs_dir):
    assert run.folder.parent == runs_dir and run.folder.name.endswith(experiment.name)
    assert json.loads((run.folder / "experiment.json").read_text()) == experiment.to_dict()
    assert json.loads((run.folder / "classes.json").read_text())["names"] == list(run.classes.names)
    assert (run.folder / "checkpoint.pt").exists() and run.step == experiment.steps and not run.model.training


def test_the_log_has_one_line_a_step(run, experiment):
    log = run.log
    assert log.index.tolist() == list(range(experiment.steps)) and set(log.columns) == VALUES
    assert np.isfinite(log.to_numpy()).all()
    total = (
        log.loss_cluster
        + log.loss_linear
        + sum(w * log[f"loss_{kind}"] for w, kind in zip(experiment.weights, ("self", "knn", "rand"), strict=True))
    )
    np.testing.assert_allclose(log.loss, total, rtol=1e-4)


def test_training_moves_head_and_probes(run, experiment):
    fresh = training.build_model(experiment, 32, len(run.classes)).state_dict()
    for name, value in weights(run).items():
        assert torch.equal(fresh[name], value) == (name == "feature_mean"), name


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(run, experiment, runs_dir):
    torch.manual_seed(123)  # whatever was drawn before must not matter
    again = train(experiment, runs_dir=runs_dir)
    assert again.folder != run.folder and same_weights(again, run)
    assert (again.folder / "log.csv").read_text() == (run.folder / "log.csv").read_text()
    other = train(experiment.but(seed=1), runs_dir=runs_dir)
    assert not torch.equal(weights(other)["head.linear.weight"], weights(run)["head.linear.weight"])


@pytest.mark.parametrize("stop", [4, 6], ids=["between checkpoints", "right after one"])
def test_a_run_that_was_broken_off_goes_on_to_the_same_weights_and_log(
    run, experiment, runs_dir, tmp_path, monkeypatch, stop
):
    shutil.copytree(runs_dir / "features", tmp_path / "features", copy_function=shutil.copy)
    monkeypatch.setattr(training, "SAVE_EVERY", 3)
    step, calls = training.train_step, []

    def breaks(*arguments):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(arguments)
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", breaks)
        with pytest.raises(KeyboardInterrupt):
            train(experiment, runs_dir=tmp_path)
    (folder,) = (path.parent for path in tmp_path.glob("*/experiment.json"))
    assert load_run(folder).step == stop // 3 * 3
    torch.rand(17)  # whatever was drawn meanwhile must not matter
    resumed = train(experiment, runs_dir=tmp_path, resume=True)
    assert resumed.folder == folder and resumed.step == experiment.steps and resumed.shifts == run.shifts
    for name, value in weights(run).items():
        assert torch.equal(value, weights(resumed)[name]), name
    assert (folder / "log.csv").read_text() == (run.folder / "log.csv").read_text()
    assert same_weights(load_run(folder), run)


def test_a_finished_run_is_returned_as_it_is(experiment, runs_dir, run, tmp_path, monkeypatch):
    shutil.copytree(run.folder, tmp_path / run.folder.name)
    shutil.copytree(runs_dir / "features", tmp_path / "features")
    monkeypatch.setattr(training, "train_step", lambda *_: pytest.fail("it was finished"))
    before = {path: path.read_bytes() for path in (tmp_path / run.folder.name).iterdir()}
    again = train(experiment, runs_dir=tmp_path, resume=True)
    assert again.folder == tmp_path / run.folder.name and same_weights(again, run)
    assert {path: path.read_bytes() for path in again.folder.iterdir()} == before


def test_resume_takes_no_run_of_another_experiment(experiment, runs_dir, run):
    with pytest.warns(Notice, match="no run of exactly this experiment"):
        other = train(experiment.but(steps=2), runs_dir=runs_dir, resume=True)
    assert other.folder != run.folder and other.step == 2


def test_a_run_goes_on_and_predicts_only_with_the_weights_it_was_trained_on(experiment, tmp_path):
    """A file may get other weights under the same name."""
    path = tmp_path / "backbone.safetensors"
    write_backbone(path, seed=1)
    one = experiment.but(backbone=str(path), steps=1)
    old = train(one, runs_dir=tmp_path)
    assert train(one, runs_dir=tmp_path, resume=True).folder == old.folder
    write_backbone(path, seed=2)
    with pytest.raises(StegoError, match=r"other weights of .*backbone\.safetensors than there are now"):
        _ = load_run(old.folder).backbone
    with pytest.warns(Notice, match="passed over: it was trained on other weights"):
        anew = train(one, runs_dir=tmp_path, resume=True)
    assert anew.folder != old.folder and load_run(anew.folder).backbone.weights_id != old.backbone.weights_id


def test_resume_without_a_checkpoint_begins_anew(experiment, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(experiment, runs_dir=tmp_path)
    with pytest.warns(Notice, match="no run of exactly this experiment"):
        assert train(experiment.but(steps=1), runs_dir=tmp_path, resume=True).step == 1


def test_a_run_is_found_only_when_all_that_it_takes_is_there(experiment, tmp_path, monkeypatch):
    """Files appear by being renamed, and what a run is found by comes after everything that resuming needs."""
    appeared, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: (appeared.append(Path(to).name), replace(path, to))[1])
    train(experiment.but(steps=1), runs_dir=tmp_path)
    found = appeared.index("experiment.json")
    assert {"correspondences.json", "checkpoint.pt", "classes.json"} <= set(appeared[:found])
    assert "log.csv" in appeared[found:]


def test_a_checkpoint_counts_no_step_whose_line_is_not_in_the_log(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    save, seen = Run.save, []

    def saving(self, optimizer, beside):
        path = self.folder / "log.csv"
        seen.append((self.step, path.read_text().splitlines()[1:] if path.exists() else []))
        save(self, optimizer, beside)

    monkeypatch.setattr(Run, "save", saving)
    train(experiment, runs_dir=tmp_path)
    assert [step for step, _ in seen] == [0, 2, 4, 6, 7]
    for step, lines in seen:
        assert [line.split(",")[0] for line in lines] == [str(i) for i in range(step)]


def test_a_checkpoint_of_another_run_is_not_gone_on_with(experiment, runs_dir, run, tmp_path):
    """Someone has mixed up the files of two runs."""
    folder = shutil.copytree(run.folder, tmp_path / run.folder.name)
    other = train(experiment.but(steps=1, head="linear"), runs_dir=runs_dir)
    shutil.copy(other.folder / "checkpoint.pt", folder / "checkpoint.pt")
    with pytest.raises(StegoError, match=r"checkpoint\.pt does not fit .*experiment\.json: head\.nonlinear"):
        train(experiment, runs_dir=tmp_path, resume=True)


def test_making_a_model_draws_nothing_from_what_others_draw_from(experiment):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    made = [training.build_model(experiment, 32, 8).state_dict() for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())


def test_every_epoch_goes_through_all_images_once(experiment, run, monkeypatch):
    store = store_of(run, "train")
    neighbors = nearest_neighbors(store.pooled, 2)
    rows, read = [], FeatureStore.rows
    monkeypatch.setattr(
        FeatureStore, "rows", lambda self, index, device: (rows.append(index.tolist()), read(self, index, device))[1]
    )
    batches = [draw_batch(store, neighbors, run.model, experiment, step, run.backbone) for step in range(6)]
    own, partners = [found[:4] for found in rows], [found[4:] for found in rows]
    for epoch in (own[:3], own[3:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(12))
    assert own[:3] != own[3:], "in another order"
    for mine, theirs in zip(own, partners, strict=True):
        assert all(partner in neighbors[row].tolist() for row, partner in zip(mine, theirs, strict=True))
    again = draw_batch(store, neighbors, run.model, experiment, 4, run.backbone)
    given = {name: value for name, value in vars(batches[4]).items() if value is not None}
    assert len(given) == 6 and all(torch.equal(value, vars(again)[name]) for name, value in given.items()), (
        "a batch depends on its step alone"
    )
    assert batches[0].permutations.shape == (experiment.negatives, 4) and batches[0].coords1.shape == (4, 3, 3, 2)
    assert not torch.equal(batches[0].coords1, batches[0].coords2)


def test_the_probes_do_not_shape_the_code(experiment, run):
    """Head weights after a step are the same whatever the labels and the clusters are."""
    store = store_of(run, "train")
    heads = []
    for changed in (False, True):
        model = training.build_model(experiment, 32, len(run.classes))
        batch = draw_batch(store, nearest_neighbors(store.pooled, 2), model, experiment, 0, run.backbone)
        if changed:
            batch.label = (batch.label + 1) % len(run.classes)
            model.cluster_probe.clusters.data.neg_()
        training.train_step(model, training.make_optimizer(model, experiment), batch, experiment, (0.1, 0.1, 0.1))
        heads.append(model.head.state_dict())
    assert all(torch.equal(value, heads[1][name]) for name, value in heads[0].items())


@pytest.mark.parametrize(
    "changes", [dict(head="linear"), dict(head="none"), dict(crop="five", train_size=32), dict(subtract_mean=True), dict(extra_clusters=3), dict(train_size=(32, 48))],
    ids=str,
)  # fmt: skip
def test_other_experiments_train_and_load(experiment, runs_dir, changes):
    run = train(experiment.but(steps=2, **changes), runs_dir=runs_dir)
    again = load_run(run.folder)
    assert same_weights(again, run) and np.isfinite(run.log.to_numpy()).all()
    assert len(run.model.cluster_probe.clusters) == 8 + run.experiment.official.extra_clusters
    assert (run.model.feature_mean.abs().max() > 0) == run.experiment.official.subtract_mean
    found = again.predict(np.zeros((40, 70, 3), np.uint8))
    assert found.shape == (40, 70)


# ---------------------------------------------------------------------------------------------- shifts


def test_percentiles_are_those_of_the_measured_correspondences(experiment):
    generator = torch.Generator().manual_seed(0)
    measured = {kind: torch.randn(501, generator=generator) + i for i, kind in enumerate(("self", "knn", "rand"))}
    asked = ("p0", "p33.4", "p100")
    found = resolve_shifts(experiment.but(shifts=asked), measured)
    for shift, percent, values in zip(found, asked, measured.values(), strict=True):
        assert shift == pytest.approx(np.percentile(values.numpy(), float(percent[1:]), method="nearest"))
    assert resolve_shifts(experiment.but(shifts=(0.1, "p50", -2)), measured) == (
        0.1,
        pytest.approx(np.median(measured["knn"])),
        -2.0,
    )


@pytest.mark.parametrize("centering", [True, False])
def test_what_is_measured_are_correspondences_of_each_kind(experiment, run, centering):
    store = store_of(run, "train")
    changed = experiment.but(centering=centering)
    arguments = (store, nearest_neighbors(store.pooled, 2), torch.zeros(1, 32, 1, 1), changed)
    measured = measure_correspondences(*arguments)
    assert list(measured) == ["self", "knn", "rand"]
    assert all(len(values) == 12 * 3**4 for values in measured.values()), "all images, every pair of 3 x 3 points"
    if not centering:
        assert max(values.abs().max() for values in measured.values()) <= 1 + 1e-5
        assert (measured["self"] > 1 - 1e-5).sum() >= 12 * 9, "every point corresponds to itself"
    assert all(torch.equal(values, measured[kind]) for kind, values in measure_correspondences(*arguments).items())


def test_the_runs_shifts_are_the_percentiles_of_its_features(experiment, run):
    store = store_of(run, "train")
    measured = measure_correspondences(store, nearest_neighbors(store.pooled, 2), torch.zeros(1, 32, 1, 1), experiment)
    assert run.shifts == resolve_shifts(experiment, measured) and run.shifts[1] == 0.1
    assert load_run(run.folder).shifts == run.shifts


# ---------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def test_the_scores_equal_a_naive_recomputation(evaluated):
    run, record = evaluated
    dataset = open_dataset("scenes", run.experiment.data_root, "val")
    counted = {"cluster": 0, "linear": 0}
    for i in range(len(dataset)):
        image, label = dataset[i]  # as large as eval_size, so nothing is resized
        features = [run.backbone(image[None]).half().float(), run.backbone(image[None].flip(-1)).half().float()]
        code = (run.model(features[0]) + run.model(features[1]).flip(-1)) / 2
        large = torch.nn.functional.interpolate(code, (64, 64), mode="bilinear", align_corners=False)
        clusters = torch.nn.functional.normalize(run.model.cluster_probe.clusters, dim=1)
        maps = {"cluster": torch.einsum("bkhw,nk->bnhw", large, clusters), "linear": run.model.linear_probe(large)}
        for name, values in maps.items():
            counted[name] = counted[name] + confusion(values[0].argmax(0), label, 8, 8)
    assert counted["cluster"].sum() == 6 * 64 * 64
    for name, table in counted.items():
        expected = scores(table, match(table) if name == "cluster" else torch.arange(8))
        # Features of a batch may differ in the last bit from those of one image: a few pixels of 24,576 are allowed to.
        assert record["scores"][name]["accuracy"] == pytest.approx(expected["accuracy"], abs=0.02), name
        assert record["scores"][name]["miou"] == pytest.approx(expected["miou"], abs=0.05), name


def test_the_record_is_written_and_whole(evaluated):
    run = evaluated[0]
    assert json.loads((run.folder / "metrics.json").read_text()) == json.loads(json.dumps(run.metrics))
    stored = run.metrics
    assert set(stored["scores"]) == {"cluster", "linear", *BASELINES}
    for values in stored["scores"].values():
        assert 0 <= values["accuracy"] <= 100 and 0 <= values["miou"] <= 100 and len(values["iou"]) == 8
    assert (
        stored["step"] == 7
        and stored["images"] == 6
        and stored["split"] == "val"
        and stored["classes"] == list(run.classes.names)
    )
    assert stored["shifts"] == list(run.shifts)
    table = np.array(stored["confusion"])
    assert table.shape == (8, 8) and table.sum() == 6 * 64 * 64 and stored["matching"] == match(table).tolist()
    assert stored["scores"]["cluster"]["accuracy"] == pytest.approx(
        100 * table[range(8), stored["matching"]].sum() / table.sum()
    )


def test_the_record_names_no_folder_of_this_machine(evaluated):
    run, record = evaluated
    assert str(run.folder.parent) not in json.dumps(record) and run.experiment.data_root not in json.dumps(record)
    assert record["experiment"]["backbone"] == "tiny.safetensors" and "data_root" not in record["experiment"]


def test_evaluating_again_gives_the_same_scores(evaluated, monkeypatch):
    run, record = evaluated
    monkeypatch.setattr(baselines, "SAMPLES", 2000)
    monkeypatch.setattr(probes, "RESTARTS", 2)
    again = evaluate(load_run(run.folder))
    assert json.dumps(again["scores"]) == json.dumps(record["scores"])


def test_with_extra_clusters_and_without_mirror(experiment, runs_dir, monkeypatch):
    few_samples(monkeypatch)
    run = train(experiment.but(steps=2, extra_clusters=3, mirror=False), runs_dir=runs_dir)
    record = evaluate(run)
    assert np.array(record["confusion"]).shape == (11, 8) and record["matching"].count(-1) == 3
    assert np.array(record["confusion"]).sum() == 6 * 64 * 64, "pixels of every cluster are counted"
    image = open_dataset("scenes", experiment.data_root, "val").image(0)
    found = run.predict(image)
    assert set(np.unique(found)) <= set(range(11)), "classes, and after them the clusters without a class"


def test_five_crops_are_trained_on_and_whole_images_scored(experiment, runs_dir, monkeypatch):
    few_samples(monkeypatch)
    record = evaluate(train(experiment.but(steps=2, crop="five", train_size=32), runs_dir=runs_dir))
    assert record["images"] == 6 and np.array(record["confusion"]).sum() == 6 * 64 * 64


def test_random_crops_are_made_once_for_every_seed_and_whole_images_scored(experiment, tmp_path, monkeypatch):
    few_samples(monkeypatch)
    experiment = experiment.but(steps=2, crop="random", train_size=32)
    record = evaluate(train(experiment, runs_dir=tmp_path))
    assert record["images"] == 6 and np.array(record["confusion"]).sum() == 6 * 64 * 64
    crops = open_training_set(experiment)
    assert isinstance(crops, RandomCrop) and len(crops) == 60
    (folder,) = tmp_path.glob("features/scenes-train-*")
    for row in (0, 7, 59):
        image, label = crops[row]
        assert torch.equal(FeatureStore(folder).image_rows(torch.tensor([row]))[0], image), "32 pixels, as cut"
        assert torch.equal(FeatureStore(folder).label_rows(torch.tensor([row]))[0], label)
    with monkeypatch.context() as patch:
        patch.setattr(RandomCrop, "image", lambda *_: pytest.fail("they were made before"))
        train(experiment.but(seed=1), runs_dir=tmp_path)
    train(experiment.but(crop="five"), runs_dir=tmp_path)
    assert len(list(tmp_path.glob("features/scenes-train-*"))) == 2, "other crops have other features"


def test_with_crf_both_probes_are_scored_twice(experiment, runs_dir, monkeypatch):
    few_samples(monkeypatch)
    run = train(experiment.but(steps=2, crf=True), runs_dir=runs_dir)
    record = evaluate(run)
    assert {"cluster", "linear", "cluster_crf", "linear_crf"} <= set(record["scores"])
    store, table = store_of(run, "val"), 0
    mirrored = store_of(run, "val", mirror=True)
    for i in range(6):
        row = torch.tensor([i])
        with torch.inference_mode():
            code = run.model.mean_code(store.rows(row), mirrored.rows(row))
            logits = probe_scores(run.model, code)["linear"].logits((64, 64))
        image = store.image_rows(row)[0].permute(1, 2, 0).numpy().copy()
        table = table + confusion(crf.dense_crf(image, logits[0]).argmax(0), store.label_rows(row)[0], 8, 8)
    assert record["scores"]["linear_crf"]["accuracy"] == pytest.approx(
        scores(table, torch.arange(8))["accuracy"], abs=0.05
    )


def test_pydensecrf_gives_the_same_scores_and_is_named(experiment, runs_dir, monkeypatch):
    few_samples(monkeypatch)
    pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf is not installed (make -B setup)")
    run = train(experiment.but(steps=2, crf=True), runs_dir=runs_dir)
    usual, record = evaluate(run), evaluate(run, crf_engine="pydensecrf")
    assert "crf" not in usual and record["crf"] == "pydensecrf"
    assert record["scores"].keys() == usual["scores"].keys() >= {"cluster_crf", "linear_crf", "kmeans_features_crf"}
    for name, scored in record["scores"].items():
        assert scored["accuracy"] == pytest.approx(usual["scores"][name]["accuracy"], abs=0.05), name


# ---------------------------------------------------------------------------------------------- reading runs, predicting


def test_a_run_that_was_read_predicts_the_same(run):
    images = [open_dataset("scenes", run.experiment.data_root, "val").image(i) for i in range(3)]
    for first, second in zip(run.predict(images), load_run(run.folder).predict(images), strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_run_says_which_it_is(run):
    assert repr(run) == f"Run('{run.folder}', {run.experiment.name}, step 7 of 7)"


def test_kept_weights_come_in_the_order_of_their_steps(run, tmp_path):
    """However many digits they have; what a killed write has left is none of them."""
    again = load_run(shutil.copytree(run.folder, tmp_path / "run"))
    assert list(again.kept_weights()) == []
    for step in (1000, 9, 12_345_678, 10):
        again.step = step
        again.model.feature_mean.fill_(step)
        again.keep_weights()
    (again.folder / "kept" / f"{TEMPORARY}0000011.x.pt").write_bytes(b"half")
    found = [(step, state["feature_mean"].unique().tolist()) for step, state in again.kept_weights()]
    assert found == [(step, [step]) for step in (9, 10, 1000, 12_345_678)]


def test_a_run_that_names_no_weights_of_its_backbone_is_taken_as_it_is(run, tmp_path):
    """Those of earlier versions."""
    folder = shutil.copytree(run.folder, tmp_path / "run")
    state = load_state(folder / "checkpoint.pt")
    del state["backbone_weights"]
    save_state(folder / "checkpoint.pt", state)
    again = load_run(folder)
    assert again.trained_on is None and again.backbone.dim == 32


def test_a_run_that_is_not_evaluated_says_so(run):
    with pytest.raises(StegoError, match=r"no metrics\.json yet"):
        _ = run.metrics


@pytest.mark.parametrize("height, width", [(64, 64), (37, 91), (200, 50), (8, 8)])
def test_a_prediction_is_as_large_as_its_image(run, height, width):
    found = run.predict(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    assert found.shape == (height, width) and found.dtype == np.uint8 and found.max() < 8


@pytest.mark.parametrize(
    "size, shape, expected",
    [
        (64, (64, 64), (64, 64)), (64, (37, 91), (64, 160)), (64, (91, 37), (160, 64)), (64, (200, 50), (256, 64)),
        (48, (100, 140), (48, 64)), (48, (100, 146), (48, 72)), (64, (8, 8), (64, 64)), ((32, 48), (500, 20), (32, 48)),
    ],
)  # fmt: skip
def test_images_are_worked_on_with_the_shorter_side_at_the_evaluation_size(run, monkeypatch, size, shape, expected):
    """The other side in proportion, to the nearest patch of 8 pixels, so that nothing is cut off; two sides are taken as given."""
    seen, code = [], Run.code
    monkeypatch.setattr(Run, "code", lambda self, batch: (seen.append(tuple(batch.shape)), code(self, batch))[1])
    found = load_run(run.folder, eval_size=size).predict(np.zeros((*shape, 3), np.uint8))
    assert seen == [(1, 3, *expected)] and found.shape == shape


@pytest.mark.parametrize("shape, expected", [((50, 400), (32, 256)), ((4000, 60), (256, 8)), ((1, 3000), (8, 256))])
def test_a_long_strip_takes_no_more_than_four_squares(run, monkeypatch, shape, expected):
    seen, code = [], Run.code
    monkeypatch.setattr(Run, "code", lambda self, batch: (seen.append(tuple(batch.shape[2:])), code(self, batch))[1])
    with pytest.warns(Notice, match="more than 4 times as long .* its longer side at 256 pixels") as told:
        found = load_run(run.folder).predict(np.zeros((*shape, 3), np.uint8))  # what is said is said once a run
    assert seen == [expected] and found.shape == shape and len(told) == 1


def test_a_fixed_evaluation_size_is_used_for_every_image(experiment, runs_dir):
    run = train(experiment.but(steps=1, eval_size=(32, 48)), runs_dir=runs_dir)
    assert run.predict(np.zeros((50, 50, 3), np.uint8)).shape == (50, 50)


def test_images_come_in_any_form(run, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    image = Image.fromarray(array)
    image.save(tmp_path / "image.png")
    forms = [
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        image,
        array,
        torch.from_numpy(array).permute(2, 0, 1),
    ]
    expected = run.predict(array)
    for form in forms:
        np.testing.assert_array_equal(run.predict(form), expected)
    np.testing.assert_array_equal(run.predict(image.convert("L")), run.predict(image.convert("L").convert("RGB")))
    together = run.predict(forms)
    assert isinstance(together, list) and len(together) == 5 and isinstance(run.predict(tuple(forms)), list)
    assert len(run.predict([array])) == 1, "a list in, a list out"
    for found in together:
        np.testing.assert_array_equal(found, expected)
    assert run.predict([]) == []


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((0, 8, 3), np.uint8), torch.zeros(8, 8, 3, dtype=torch.uint8), torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
    ],
    ids=lambda wrong: f"{wrong.dtype} {tuple(wrong.shape)}",
)  # fmt: skip
def test_what_is_no_image_is_refused(run, wrong):
    with pytest.raises(StegoError, match="an image must be uint8 with three channels"):
        run.predict(wrong)


def test_views_of_arrays_are_images_too(run):
    """OpenCV users turn BGR into RGB with [..., ::-1], and arrays of PIL are read-only."""
    array = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    turned = array[..., ::-1]
    np.testing.assert_array_equal(run.predict(turned), run.predict(turned.copy()))
    np.testing.assert_array_equal(run.predict(np.asarray(Image.fromarray(array))), run.predict(array))


def test_a_image_that_is_not_there_is_named(run, tmp_path):
    with pytest.raises(StegoError, match=r"nowhere\.png"):
        run.predict(tmp_path / "nowhere.png")


def test_after_evaluation_predictions_are_classes(evaluated, run):
    matching = torch.tensor(evaluated[1]["matching"])
    image = open_dataset("scenes", run.experiment.data_root, "val").image(1)
    clusters, classes = run.predict(image), evaluated[0].predict(image)
    np.testing.assert_array_equal(classes, matching[torch.from_numpy(clusters).long()].numpy())


@torch.inference_mode()
def test_what_is_predicted_is_what_is_scored(run):
    """predict and evaluate must take the same way from code to labels: code upsampled first, probed then."""
    for i in range(6):
        image = open_dataset("scenes", run.experiment.data_root, "val").image(i)
        scored = probe_scores(run.model, run.code(image[None]))["cluster"].logits((64, 64))[0].argmax(0)
        agreement = (run.predict(image) == scored.numpy()).mean()
        assert agreement >= 0.999, f"image {i}: {100 * agreement:.2f} % of the pixels agree"


def test_the_code_is_averaged_with_the_mirror_images(run):
    image = open_dataset("scenes", run.experiment.data_root, "val").image(0)[None]
    with torch.inference_mode():
        code = run.code(image)
        assert_close(run.code(image.flip(-1)), code.flip(-1), rtol=1e-4, atol=1e-5)
        alone = run.model(run.backbone(image))
    assert not torch.allclose(alone, code, atol=1e-3)


# ---------------------------------------------------------------------------------------------- baselines


@pytest.fixture(scope="module")
def store(run) -> FeatureStore:
    return store_of(run, "train")


@pytest.mark.parametrize("fit, channels", [(kmeans_on_features, 32), (kmeans_on_colors, 3)])
def test_kmeans_names_the_nearest_center(store, monkeypatch, fit, channels):
    few_samples(monkeypatch)
    scorer = fit(store, 5, 0)
    centers = scorer.weight / 2
    assert centers.shape == (5, channels)
    maps = torch.rand(2, channels, 4, 6, generator=torch.Generator().manual_seed(0))
    for b, y, x in np.ndindex(2, 4, 6):
        naive = min(range(5), key=lambda c: ((maps[b, :, y, x] - centers[c]) ** 2).sum().item())
        assert scorer(maps)[b, :, y, x].argmax() == naive
    assert torch.equal(fit(store, 5, 0).weight, scorer.weight), "the same seed gives the same centers"


def test_upsampling_scores_equals_upsampling_features():
    generator = torch.Generator().manual_seed(0)
    scorer = LinearScorer(torch.randn(4, 6, generator=generator), torch.randn(4, generator=generator))
    maps = torch.randn(2, 6, 3, 5, generator=generator)
    assert_close(upsample(scorer(maps), (12, 20)), scorer(upsample(maps, (12, 20))), rtol=1e-4, atol=1e-5)


def telling_store(folder: Path, n_classes: int, occurring: list[int]) -> FeatureStore:
    """A store whose features tell the class of each cell: 10 images, grid 4 x 6, labels of 32 x 48 pixels, some ignored."""
    rng = np.random.default_rng(0)
    cells = rng.choice(occurring, (10, 4, 6))
    features = 5 * np.eye(n_classes)[cells].transpose(0, 3, 1, 2) + rng.normal(0, 0.3, (10, n_classes, 4, 6))
    labels = cells.repeat(8, 1).repeat(8, 2)
    labels[:, :, :8] = 255
    folder.mkdir()
    np.save(folder / "features.npy", features.astype(np.float16))
    np.save(folder / "pooled.npy", features.mean((2, 3)).astype(np.float32))
    np.save(folder / "images.npy", np.zeros((10, 3, 32, 48), np.uint8))
    np.save(folder / "labels.npy", labels.astype(np.uint8))
    write_json(folder / "about.json", {"labels": True, "n_classes": n_classes})
    return FeatureStore(folder)


@pytest.mark.parametrize("n_classes, occurring", [(4, [0, 1, 2, 3]), (5, [1, 2, 4]), (3, [0, 2])], ids=str)
def test_the_linear_baseline_reads_the_label_of_each_cell(tmp_path, n_classes, occurring):
    store = telling_store(tmp_path / "store", n_classes, occurring)
    scorer = linear_on_features(store, 0)
    rows = torch.arange(10)
    found = scorer(torch.nn.functional.normalize(store.rows(rows), dim=1)).argmax(1)
    label = store.label_rows(rows)[:, 4::8, 4::8]
    assert (found[label >= 0] == label[label >= 0]).all()
    assert set(found.unique().tolist()) <= set(occurring), "a class without a label is never named"


def test_the_linear_baseline_with_a_single_class(tmp_path):
    """Labels that hold one class only leave nothing to learn; it must not break the evaluation."""
    store = telling_store(tmp_path / "store", 3, [1])
    found = linear_on_features(store, 0)(store.rows(torch.arange(10))).argmax(1)
    assert (found == 1).all()


# ---------------------------------------------------------------------------------------------- what goes wrong


def test_images_with_labels_for_scores_alone(scenes_root, backbone_file, tmp_path, monkeypatch):
    """No training labels: everything but the linear probe on features is scored."""
    few_samples(monkeypatch)
    shutil.copytree(scenes_root / "scenes", tmp_path / "folder")
    shutil.rmtree(tmp_path / "folder" / "labels" / "train")
    record = evaluate(
        train(tiny_experiment(tmp_path, backbone_file, dataset="folder", steps=2), runs_dir=tmp_path / "runs")
    )
    assert set(record["scores"]) == {"cluster", *BASELINES} - {"linear_features"}, "no linear probe was trained"


def test_as_many_neighbors_and_as_large_a_batch_as_can_be(experiment, runs_dir):
    assert train(experiment.but(steps=1, neighbors=11, batch_size=12), runs_dir=runs_dir).step == 1


def test_a_missing_data_set_or_backbone_leaves_no_run_behind(experiment, tmp_path):
    with pytest.raises(DataNotFound):
        train(experiment.but(dataset="camvid", data_root=str(tmp_path)), runs_dir=tmp_path / "runs")
    with pytest.raises(StegoError, match="unknown backbone"):
        train(experiment.but(backbone="dino"), runs_dir=tmp_path / "runs")
    assert not list(tmp_path.glob("runs/*/experiment.json"))


def test_a_folder_that_is_no_run_is_explained(tmp_path):
    with pytest.raises(
        StegoError, match=rf"{tmp_path} is not a run.*experiment\.json, classes\.json, checkpoint\.pt missing"
    ):
        load_run(tmp_path)
    with pytest.raises(StegoError, match="is not a run"):
        load_run(tmp_path / "nowhere")


@pytest.mark.parametrize("part", ["nothing", "half", "text"])
def test_a_broken_checkpoint_is_named(run, tmp_path, part):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    whole = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(
        {"nothing": b"", "half": whole[: len(whole) // 2], "text": b"no checkpoint"}[part]
    )
    with pytest.raises(ValueError, match=r"run/checkpoint\.pt cannot be read"):
        load_run(folder)


@pytest.mark.parametrize("name", ["experiment.json", "classes.json"])
def test_a_broken_json_file_is_named(run, tmp_path, name):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    (folder / name).write_text((folder / name).read_text()[:20])
    with pytest.raises(ValueError, match=rf"run/{name} is not valid JSON"):
        load_run(folder)


def test_a_checkpoint_with_code_in_it_is_refused(run, tmp_path):
    """Loading must run nothing that a file asks for."""
    folder = shutil.copytree(run.folder, tmp_path / "run")
    torch.save({"step": 1, "model": SimpleNamespace()}, folder / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read"):
        load_run(folder)


def test_a_run_goes_with_its_backbone(experiment, tmp_path, runs_dir):
    """The backbone is found again by its name; a file that is gone is named when it is needed, not before."""
    own = write_backbone(tmp_path / "own.safetensors", seed=3)
    run = train(experiment.but(steps=1, backbone=str(own)), runs_dir=runs_dir)
    own.unlink()
    again = load_run(run.folder)
    assert again.log.shape[0] == 1
    with pytest.raises(StegoError, match=r"own\.safetensors does not exist"):
        again.predict(np.zeros((64, 64, 3), np.uint8))


def test_probes_fitted_afterwards_leave_the_head_as_it_is(scenes_root, backbone_file, runs_dir):
    """They repeat, the clusters are at least as tight as the joint probe's, the linear probe fits its labels better."""
    joint = train(tiny_experiment(scenes_root, backbone_file), runs_dir=runs_dir)
    fitted = train(tiny_experiment(scenes_root, backbone_file, probes="after"), runs_dir=runs_dir)
    again = train(tiny_experiment(scenes_root, backbone_file, probes="after"), runs_dir=runs_dir)
    assert same_weights(fitted, again) and same_weights(load_run(fitted.folder), fitted)
    changed = {name for name, value in weights(fitted).items() if not torch.equal(value, weights(joint)[name])}
    assert changed == {"cluster_probe.clusters", "linear_probe.classifier.weight", "linear_probe.classifier.bias"}
    assert set(fitted.log.columns) == VALUES - {"loss_cluster", "loss_linear"}
    store = store_of(joint, "train")
    with torch.inference_mode():
        code = joint.model(store.rows(torch.arange(len(store))))
        assert fitted.model.cluster_probe.loss(code) < joint.model.cluster_probe.loss(code)
        label = store.label_rows(torch.arange(len(store)))
        assert fitted.model.linear_probe.loss(code, label) < joint.model.linear_probe.loss(code, label)


def test_labels_are_read_at_the_centers_of_cells():
    """Against every cell cut out and its middle pixel taken."""
    label = torch.arange(2 * 12 * 20).view(2, 12, 20)
    found = labels_at(label, torch.arange(15), (3, 5))
    middle = [label[:, 4 * row + 2, 4 * column + 2] for row in range(3) for column in range(5)]
    assert torch.equal(found, torch.stack(middle, 1))
