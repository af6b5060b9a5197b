"""Any state of a run: unfinished, moved, on other data, of very few images; it goes on, or says what is the matter."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from common import ROOT, few_samples, tiny_experiment
from PIL import Image
from sklearn.linear_model import LogisticRegression
from standins import camvid

from stego_lib import Experiment, StegoError, evaluate, load_run, open_dataset, train, training
from stego_lib.baselines import kmeans_on_features
from stego_lib.calibration import measure_correspondences
from stego_lib.model import Stego
from stego_lib.probes import fit_probes, multinomial_regression
from stego_lib.segment import segment_folder
from stego_lib.utils.files import load_state, read_json, save_state, write_json
from stego_lib.utils.notices import Notice


@pytest.fixture
def experiment(scenes_root, backbone_file):
    return tiny_experiment(scenes_root, backbone_file)


@pytest.fixture
def quick(monkeypatch):
    few_samples(monkeypatch)


def break_off(experiment: Experiment, runs_dir: Path, monkeypatch, after: int = 4) -> Path:
    """Trains until it is interrupted behind step `after`, with a checkpoint every second step; the run folder."""
    step, done = training.train_step, []

    def breaks(*arguments):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(None)
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "SAVE_EVERY", 2)
        patch.setattr(training, "train_step", breaks)
        with pytest.raises(KeyboardInterrupt):
            train(experiment, runs_dir=runs_dir)
    (folder,) = (path.parent for path in runs_dir.glob("*/checkpoint.pt"))
    return folder


def images_folder(root: Path, count: int, side: int = 64) -> Path:
    """root/folder with `count` different images, without labels."""
    (root / "folder").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((side, side)).save(root / "folder" / f"{i}.png")
    return root


# ---------------------------------------------------------------------------------------------- unfinished runs


def test_an_unfinished_run_whose_probes_wait_for_the_end_is_neither_scored_nor_segments(
    experiment, scenes_root, tmp_path, monkeypatch, quick
):
    """Its probes are random numbers; the error says where it stopped and how it goes on. Finished, it does both."""
    after = experiment.but(probes="after")
    run = load_run(break_off(after, tmp_path, monkeypatch))
    image = open_dataset("scenes", scenes_root, "val").images[0]
    for use in (
        lambda: evaluate(run),
        lambda: run.predict(image),
        lambda: segment_folder(run, image.parent, tmp_path / "out"),
    ):
        with pytest.raises(StegoError, match=r"stopped at step 4 of 7, before its probes were fitted.*resume=?.?True"):
            use()
    assert not list(run.folder.glob("metrics*")) and not (tmp_path / "out").exists()
    finished = train(after, runs_dir=tmp_path, resume=True)
    assert finished.folder == run.folder and evaluate(load_run(run.folder))["step"] == 7
    straight = train(after, runs_dir=tmp_path / "straight")
    assert torch.equal(straight.model.cluster_probe.clusters, finished.model.cluster_probe.clusters)


def test_an_unfinished_run_with_joint_probes_is_used_and_says_so(experiment, tmp_path, monkeypatch, quick):
    run = load_run(break_off(experiment, tmp_path, monkeypatch))
    with pytest.warns(Notice, match=r"stopped at step 4 of 7; to finish it: "):
        assert evaluate(run)["step"] == 4
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_run(run.folder).predict([np.zeros((8, 64, 3), np.uint8)] * 3)
    said = [str(warned.message) for warned in caught if warned.category is Notice]
    assert len(said) == 2 and "stopped at step 4 of 7" in said[0] and "longer side" in said[1], (
        "once, not for each image"
    )


def test_going_on_from_the_head_of_an_unfinished_run_is_said(experiment, tmp_path, monkeypatch):
    folder = break_off(experiment, tmp_path, monkeypatch)
    with pytest.warns(Notice, match=r"start_from: .* stopped at step 4 of 7"):
        train(experiment.but(start_from=folder, steps=1), runs_dir=tmp_path)


# ---------------------------------------------------------------------------------------------- run records


@pytest.fixture
def street(tmp_path, backbone_file):
    """A root with a few made-up street images in three splits, and an experiment on them."""
    camvid(tmp_path / "data", dict(train=5, val=3, test=2), height=48, width=64)
    values = dict(dataset="camvid", train_size=(48, 64), eval_size=(48, 64), steps=2)
    return tiny_experiment(tmp_path / "data", backbone_file, **values)


def test_each_evaluation_has_its_own_record_and_predict_uses_that_of_the_validation_split(street, tmp_path, quick):
    run = train(street, runs_dir=tmp_path / "runs")
    record, path = evaluate(run), run.folder / "metrics.json"
    stored = path.read_bytes()
    image = open_dataset("camvid", street.data_root, "val").images[0]
    labels = run.predict(image)
    shutil.copytree(tmp_path / "data", tmp_path / "other")
    for split in ("train", "val"):  # other images under the same names
        for file in sorted((tmp_path / "other" / "camvid" / split).iterdir()):
            Image.open(file).transpose(Image.Transpose.ROTATE_180).save(file)
    others = [
        evaluate(run, "test"),
        evaluate(load_run(run.folder, data_root=str(tmp_path / "other"))),
        evaluate(load_run(run.folder, eval_size=(24, 32))),
    ]
    assert path.read_bytes() == stored and run.metrics == record
    kept = [read_json(found) for found in sorted(run.folder.glob("metrics-*.json"))]
    assert len(kept) == 3 and all(other in kept for other in others), "each in a file of its own"
    assert (run.folder / "metrics-test.json").exists()
    np.testing.assert_array_equal(run.predict(image), labels)
    evaluate(run, "test")
    assert len(list(run.folder.glob("metrics*.json"))) == 4, "the same evaluation again replaces its record"


def test_the_same_data_in_another_place_is_the_runs_own(street, tmp_path, quick):
    run = train(street, runs_dir=tmp_path / "runs")
    shutil.move(tmp_path / "data", tmp_path / "moved")
    record = evaluate(load_run(run.folder, data_root=str(tmp_path / "moved")))
    assert read_json(run.folder / "metrics.json") == record
    assert not list(run.folder.glob("metrics-*"))


@pytest.mark.filterwarnings("ignore:camvid (train|val). 1 of 11 classes occur in none:stego_lib.utils.notices.Notice")
def test_what_evaluate_returns_is_what_the_file_holds(street, tmp_path, quick):
    """Also for a class that does not occur, which has no IoU."""
    for file in (tmp_path / "data" / "camvid").glob("*annot/*.png"):
        label = np.array(Image.open(file))
        Image.fromarray(np.where(label == 9, 11, label).astype(np.uint8)).save(file)
    run = train(street, runs_dir=tmp_path / "runs")
    record = evaluate(run)
    text = (run.folder / "metrics.json").read_text()
    assert record == json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert record["scores"]["linear_features"]["iou"][9] is None


@pytest.mark.parametrize("matching", [[0], [0] * 10 + [11], [0] * 12])
def test_a_run_record_that_is_not_the_runs_own_is_refused(street, tmp_path, matching):
    """Copied from another run, or edited by hand."""
    run = train(street, runs_dir=tmp_path / "runs")
    write_json(run.folder / "metrics.json", {"step": run.step, "matching": matching})
    with pytest.raises(StegoError, match=r"metrics\.json does not fit the run.*11 clusters and 11 classes; remove it"):
        run.predict(np.zeros((32, 32, 3), np.uint8))


def test_a_log_that_is_missing_is_named(street, tmp_path):
    run = train(street, runs_dir=tmp_path / "runs")
    (run.folder / "log.csv").unlink()
    with pytest.raises(StegoError, match=r"has no log\.csv"):
        _ = run.log


@pytest.mark.filterwarnings("ignore:camvid (train|val). 'road' is the only class:stego_lib.utils.notices.Notice")
def test_labels_of_a_single_class_give_no_scores(street, tmp_path, quick):
    """Any segmentation would score 100."""
    for file in (tmp_path / "data" / "camvid" / "valannot").iterdir():
        label = np.array(Image.open(file))
        Image.fromarray(np.where(label == 3, 3, 11).astype(np.uint8)).save(file)
    run = train(street, runs_dir=tmp_path / "runs")
    with pytest.warns(Notice, match=r"camvid val has no label but 'road' \(id 3\), so nothing is scored"):
        record = evaluate(run)
    assert record["scores"] == {} and "matching" not in record


@pytest.mark.filterwarnings("ignore:folder (train|val). 'all' is the only class:stego_lib.utils.notices.Notice")
def test_a_dataset_of_one_class_gives_no_scores(scenes_root, backbone_file, tmp_path, quick):
    folder = shutil.copytree(scenes_root / "scenes", tmp_path / "folder")
    (folder / "classes.json").write_text('{"names": ["all"]}')
    for file in (folder / "labels").rglob("*.png"):
        Image.fromarray(np.where(np.array(Image.open(file)) == 0, 0, 255).astype(np.uint8)).save(file)
    run = train(
        tiny_experiment(tmp_path, backbone_file, dataset="folder", steps=1, probes="after"), runs_dir=tmp_path / "runs"
    )
    with pytest.warns(Notice, match=r"has no label but 'all' \(id 0\), so nothing is scored"):
        assert evaluate(run)["scores"] == {}


# ---------------------------------------------------------------------------------------------- resuming


def test_a_run_goes_on_wherever_its_data_lie_and_it_computes(experiment, scenes_root, tmp_path, monkeypatch):
    """Another spelling, another disk, a named device, other settings of scoring: the same run, and no feature is computed again."""
    root = shutil.copytree(scenes_root, tmp_path / "data")
    asked, runs_dir = experiment.but(data_root=str(root), device="auto"), tmp_path / "runs"
    folder = break_off(asked, runs_dir, monkeypatch)
    stores = sorted((runs_dir / "features").glob("scenes-*"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root, tmp_path / "scratch" / "job", copy_function=shutil.copyfile)  # and other times of change
    for changes in (
        dict(data_root=f"{root}/"),
        dict(data_root="data"),
        dict(data_root="scratch/job", device="cpu"),
        dict(mirror=False, crf=True, eval_size=32),
    ):
        assert train(asked.but(**changes), runs_dir=runs_dir, resume=True).folder == folder, changes
    assert sorted((runs_dir / "features").glob("scenes-*")) == stores
    assert Experiment.from_dict(read_json(folder / "experiment.json")).eval_size == 32, (
        "how it is scored is as asked last"
    )
    straight = train(asked, runs_dir=tmp_path / "straight")
    assert torch.equal(straight.model.cluster_probe.clusters, load_run(folder).model.cluster_probe.clusters)


def test_what_keeps_a_run_from_going_on_is_said(experiment, scenes_root, tmp_path):
    root = shutil.copytree(scenes_root, tmp_path / "data")
    asked, runs_dir = experiment.but(data_root=str(root), steps=2), tmp_path / "runs"
    run = train(asked, runs_dir=runs_dir)
    with pytest.warns(Notice, match=rf"no run of exactly this experiment.*{run.folder.name}, has steps 2, now 3"):
        train(asked.but(steps=3), runs_dir=runs_dir, resume=True)
    first = open_dataset("scenes", root, "train").labels[0]
    Image.fromarray(np.array(Image.open(first)).T.copy()).save(first)
    with pytest.warns(Notice, match=r"passed over: the label maps of its training images have changed"):
        train(asked, runs_dir=runs_dir, resume=True)
    first = open_dataset("scenes", root, "train").images[0]
    Image.open(first).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(first)
    with pytest.warns(Notice, match=r"passed over: its training images were others"):
        train(asked, runs_dir=runs_dir, resume=True)


def test_going_on_in_another_precision_is_said(experiment, tmp_path, monkeypatch):
    asked = experiment.but(precision="auto")
    monkeypatch.setattr("stego_lib.backbone.choose_precision", lambda *_: torch.bfloat16)
    folder = break_off(asked, tmp_path, monkeypatch)
    monkeypatch.setattr("stego_lib.backbone.choose_precision", lambda *_: torch.float32)
    with pytest.warns(Notice, match=r"begun on features computed in torch\.bfloat16, here they are in torch\.float32"):
        assert train(asked, runs_dir=tmp_path, resume=True).folder == folder


# ---------------------------------------------------------------------------------------------- few images, many clusters


@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_handful_of_images_trains(backbone_file, tmp_path, count):
    root = images_folder(tmp_path, count)
    asked = tiny_experiment(
        root, backbone_file, dataset="folder", steps=2, batch_size=16, neighbors=7, probes="after", n_classes=3
    )
    with pytest.warns(
        Notice, match=rf"folder has {count} training images, so batch_size is {count} \(asked: 16\), neigh"
    ):
        run = train(asked, runs_dir=tmp_path / "runs")
    assert (run.experiment.batch_size, run.experiment.neighbors) == (count, count - 1) and run.step == 2
    with pytest.warns(Notice, match=rf"batch_size is {count}"):
        assert train(asked, runs_dir=tmp_path / "runs", resume=True).folder == run.folder


def test_a_single_image_is_refused_unless_it_is_cut(backbone_file, tmp_path):
    root = images_folder(tmp_path, 1)
    asked = tiny_experiment(root, backbone_file, dataset="folder", steps=2, n_classes=3, neighbors=2)
    with pytest.raises(StegoError, match=r"folder has one training image.*crop='five'"):
        train(asked, runs_dir=tmp_path / "runs")
    assert train(asked.but(crop="five"), runs_dir=tmp_path / "runs").step == 2


def test_more_clusters_than_can_be_found_or_numbered_are_refused_before_training(experiment, backbone_file, tmp_path):
    root = images_folder(tmp_path, 3, side=16)
    few = dict(dataset="folder", batch_size=2, neighbors=2, train_size=16, eval_size=16)
    with pytest.raises(StegoError, match=r"15 clusters cannot be found in 3 training images of 2 x 2 grid cells"):
        train(tiny_experiment(root, backbone_file, n_classes=15, **few), runs_dir=tmp_path / "runs")
    with pytest.raises(
        StegoError, match=r"8 classes and extra_clusters = 250 make 258 clusters; label maps number 255"
    ):
        train(experiment.but(extra_clusters=250), runs_dir=tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("*/experiment.json"))


def test_images_that_are_all_alike_are_told(backbone_file, tmp_path):
    root = images_folder(tmp_path, 1)
    for i in range(1, 5):
        shutil.copy(root / "folder" / "0.png", root / "folder" / f"{i}.png")
    asked = tiny_experiment(root, backbone_file, dataset="folder", steps=2, n_classes=3)
    with pytest.warns(Notice, match=r"the 5 training images look all alike to the backbone"):
        train(asked, runs_dir=tmp_path / "runs")


# ---------------------------------------------------------------------------------------------- probes and baselines


@pytest.mark.parametrize("names", [[0, 1], [3, 1]], ids=str)
def test_a_probe_of_two_classes_has_scikit_learns_probabilities(names):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(300, 4, generator=generator)
    labels = torch.tensor(names)[(points[:, 0] + torch.randn(300, generator=generator) > 0).long()]
    weight, bias = multinomial_regression(points, labels, 4)
    found = (points @ weight.T + bias).softmax(1)
    # Without its penalty scikit-learn's model does not depend on the channels' scale, so it is fitted to the points as they are.
    spread = points.std(0, correction=0)
    fitted = LogisticRegression(tol=1e-8).fit((points - points.mean(0)) / spread, labels)
    expected = fitted.predict_proba((points - points.mean(0)) / spread)
    np.testing.assert_allclose(found[:, sorted(names)], expected, atol=2e-3)
    assert found.sum(1).allclose(torch.ones(300))


class Maps:
    """Features and no labels of a few images, in memory."""

    has_labels = False

    def __init__(self, features: torch.Tensor):
        self.features, self.shape = features, tuple(features.shape)

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, index, device="cpu"):
        return self.features[index]


def test_the_cluster_probe_of_the_features_themselves_is_k_means_on_the_features():
    """Probes and baselines are fitted to the same cells, so that they differ by the head alone."""
    features = torch.randn(300, 6, 20, 20, generator=torch.Generator().manual_seed(1))
    store, model = Maps(features), Stego(6, 6, 5, head="none")
    fit_probes(model, store, 3, linear=False)
    centers = kmeans_on_features(store, 5, seed=3).weight / 2
    torch.testing.assert_close(model.cluster_probe.clusters.detach(), centers)


@pytest.mark.parametrize("published", [False, True])
def test_calibration_measures_the_negatives_that_the_loss_uses(published):
    """By default every image of a batch is somebody's negative once; the published code repeats some and leaves out others."""
    angles = 2 ** torch.arange(8.0) / 128  # so that the difference of two angles tells which they are of
    features = torch.stack([angles.cos(), angles.sin()], 1)[:, :, None, None].expand(-1, -1, 2, 2)
    repeated = 0
    for seed in range(6):
        asked = Experiment(points=2, batch_size=8, seed=seed, published=published)
        neighbors = torch.arange(8).roll(1)[:, None]
        found = measure_correspondences(Maps(features), neighbors, torch.zeros(1, 2, 1, 1), asked)["rand"]
        each = found.view(8, -1).mean(1)
        pairs = {round(torch.cos(angles[i] - angles[j]).item(), 5): {i, j} for i in range(8) for j in range(8) if i < j}
        used = [pairs[min(pairs, key=lambda value: abs(value - cosine))] for cosine in each.tolist()]
        counts = np.bincount([i for pair in used for i in pair], minlength=8)
        repeated += int((counts != 2).any())
    assert (repeated > 0) == published, "each image stands in two pairs of a cycle: with its negative, and as one"


# ---------------------------------------------------------------------------------------------- manners


@pytest.mark.parametrize(
    "make",
    [
        lambda **changes: Experiment(**changes),
        lambda **changes: Experiment().but(**changes),
        lambda **changes: Experiment.preset("scenes", **changes),
        lambda **changes: Experiment.from_dict(changes),
    ],
    ids=["Experiment", "but", "preset", "from_dict"],
)
def test_every_way_to_an_experiment_raises_the_same_error(make):
    with pytest.raises(StegoError, match=r"^Experiment: steps = -1: Input should be greater than or equal to 1$"):
        make(steps=-1)
    with pytest.raises(StegoError, match=r"^Experiment: unknown key 'stepz' \(did you mean 'steps'\?\)$"):
        make(stepz=3)


def test_training_leaves_the_callers_random_numbers_alone(experiment, tmp_path, quick):
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(5)
        np.random.seed(5)
        run = train(experiment.but(seed=seed, steps=2), runs_dir=tmp_path)
        evaluate(run)
        drawn.append((torch.rand(3).tolist(), np.random.rand()))
    torch.manual_seed(5)
    np.random.seed(5)
    assert drawn == [(torch.rand(3).tolist(), np.random.rand())] * 2


def test_random_numbers_are_set_aside_for_the_devices_in_use_alone(experiment, tmp_path, monkeypatch):
    """Without a list of devices torch asks every GPU of the machine for its state, and warns where there are several."""
    fork, asked = torch.random.fork_rng, []
    monkeypatch.setattr(
        torch.random, "fork_rng", lambda *given, **named: (asked.append((given, named)), fork(*given, **named))[1]
    )
    run = train(experiment.but(steps=1, published=True), runs_dir=tmp_path)
    run.backbone.untrained()
    assert len(asked) > 3 and all(call == (([],), {}) for call in asked)


def test_files_are_closed_by_who_opened_them(scenes_root, backbone_file, tmp_path):
    script = f"""
        import gc
        from pathlib import Path
        from common import tiny_experiment
        from stego_lib import evaluate, load_run, train
        run = train(tiny_experiment({str(scenes_root)!r}, {str(backbone_file)!r}, steps=1), runs_dir={str(tmp_path)!r})
        evaluate(run)
        load_run(run.folder).predict(next(Path({str(scenes_root)!r}).rglob("*.png")))
        del run
        gc.collect()
        print("done")
    """
    here = ROOT / "tests"
    ended = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-c", textwrap.dedent(script)],
        capture_output=True, text=True, cwd=here, env={**os.environ, "PYTHONPATH": f"{here}:{here.parent}"},
    )  # fmt: skip
    assert ended.stdout.endswith("done\n") and "ResourceWarning" not in ended.stderr, ended.stderr[-2000:]


def test_labels_decoded_the_published_way_are_stored_apart(tmp_path):
    camvid(tmp_path, dict(train=1, val=1), height=8, width=24)
    plain, published = (open_dataset("camvid", tmp_path, "val", published=way) for way in (False, True))
    assert plain.identity() != published.identity() and plain.state() != published.state()
    assert plain.identity(labels=False) == published.identity(labels=False)


def test_a_record_names_the_images_that_were_scored_wherever_they_lie(experiment, tmp_path):
    named = []
    for place in ("a", "b"):
        shutil.copytree(experiment.data_root, tmp_path / place)
        run = train(experiment.but(data_root=str(tmp_path / place), steps=1), runs_dir=tmp_path / "runs")
        named.append(evaluate(run, baselines=False)["data"])
    assert named[0] == named[1] != evaluate(run, "train", baselines=False)["data"]


def test_a_run_of_version_0_1_0_opens_and_resumes(experiment, tmp_path, monkeypatch):
    """It said "optimiser" in its checkpoint, and named `devices`. It ends with the weights of an uninterrupted run."""  # codespell:ignore optimiser
    folder = break_off(experiment, tmp_path / "old", monkeypatch)
    state = load_state(folder / "checkpoint.pt")
    state["optimiser"] = state.pop("optimizer")  # codespell:ignore optimiser
    save_state(folder / "checkpoint.pt", state)
    write_json(folder / "experiment.json", read_json(folder / "experiment.json") | {"devices": 1})
    assert load_run(folder).step == state["step"]
    resumed = train(experiment, runs_dir=tmp_path / "old", resume=True)
    assert resumed.folder == folder and resumed.step == experiment.steps
    expected = train(experiment, runs_dir=tmp_path / "new").model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
