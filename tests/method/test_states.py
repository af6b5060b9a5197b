"""Runs in any state: unfinished, of few images, with other classes, in a process with settings of its own."""

import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from common import broken_off, few_samples, tiny_experiment
from PIL import Image
from safetensors.torch import save_file

from stego_lib import StegoError, evaluate, load_run, open_dataset, train
from stego_lib.segment import segment_folder
from stego_lib.utils.files import read_json, write_json
from stego_lib.utils.notices import Notice
from stego_lib.utils.states import load_state, save_state


@pytest.fixture
def experiment(scenes_root, backbone_file):
    return tiny_experiment(scenes_root, backbone_file)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    few_samples(monkeypatch)


def images_folder(root: Path, count: int, side: int = 64) -> Path:
    """root/folder with `count` different images, without labels."""
    (root / "folder").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((side, side)).save(root / "folder" / f"{i}.png")
    return root


# ---------------------------------------------------------------------------------------------- unfinished runs


def test_an_unfinished_run_without_fitted_probes_is_refused(experiment, scenes_root, tmp_path, monkeypatch):
    after = experiment.but(probes="after")
    broken_off(after, tmp_path, monkeypatch, after=5)
    (folder,) = (path.parent for path in tmp_path.glob("*/experiment.json"))
    run, image = load_run(folder), open_dataset("scenes", scenes_root, "val").images[0]
    for use in (
        evaluate,
        lambda run: run.predict(image),
        lambda run: segment_folder(run, image.parent, tmp_path / "out"),
    ):
        with pytest.raises(StegoError, match="step 4 of 7"):
            use(run)
    assert not list(run.folder.glob("metrics*")) and not (tmp_path / "out").exists()


def test_an_unfinished_run_with_joint_probes_is_used_with_one_notice(experiment, tmp_path, monkeypatch):
    broken_off(experiment, tmp_path, monkeypatch, after=5)
    (folder,) = (path.parent for path in tmp_path.glob("*/experiment.json"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        load_run(folder).predict([np.zeros((64, 64, 3), np.uint8)] * 3)
    assert ["step 4 of 7" in str(one.message) for one in caught if one.category is Notice] == [True]


# ---------------------------------------------------------------------------------------------- classes and labels


@pytest.fixture
def named(scenes_root, backbone_file, tmp_path):
    """A root with the scenes as a folder dataset of named classes, and an experiment on it."""
    folder = shutil.copytree(scenes_root / "scenes", tmp_path / "folder")
    names = open_dataset("scenes", scenes_root, "val").classes.names
    write_json(folder / "classes.json", {"names": list(names)})
    return folder / "classes.json", tiny_experiment(tmp_path, backbone_file, dataset="folder", steps=2)


def test_a_corrected_name_is_taken_and_another_order_of_classes_is_refused(named, tmp_path):
    """Ids decide: in another order, every score and every name would belong to another class."""
    path, experiment = named
    run, names = train(experiment, runs_dir=tmp_path / "runs"), read_json(named[0])["names"]
    write_json(path, {"names": ["corrected", *names[1:]]})
    assert evaluate(load_run(run.folder), baselines=False)["scores"]
    assert train(experiment, runs_dir=tmp_path / "runs", resume=True).folder == run.folder
    for wrong in ([names[1], names[0], *names[2:]], [f"new {name}" for name in names], names[:-1]):
        write_json(path, {"names": wrong})
        with pytest.raises(StegoError):
            evaluate(load_run(run.folder), baselines=False)
    write_json(path, {"names": [names[1], names[0], *names[2:]]})
    with pytest.raises(StegoError, match="order"):
        train(experiment, runs_dir=tmp_path / "runs", resume=True)


@pytest.mark.filterwarnings("ignore::stego_lib.utils.notices.Notice")
def test_labels_of_a_single_class_give_no_scores(named, tmp_path):
    """Any segmentation would score 100."""
    for file in (named[0].parent / "labels" / "val").iterdir():
        Image.fromarray(np.where(np.array(Image.open(file)) == 0, 0, 255).astype(np.uint8)).save(file)
    record = evaluate(train(named[1], runs_dir=tmp_path / "runs"))
    assert record["scores"] == {} and "matching" not in record and "only has labels" in record["unscored"]


# ---------------------------------------------------------------------------------------------- few images


@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_handful_of_images_trains(backbone_file, tmp_path, count):
    root = images_folder(tmp_path, count)
    values = dict(dataset="folder", steps=2, batch_size=16, neighbors=7, probes="after", n_classes=3)
    with pytest.warns(Notice, match=f"batch_size is {count}"):
        run = train(tiny_experiment(root, backbone_file, **values), runs_dir=tmp_path / "runs")
    assert (run.experiment.batch_size, run.experiment.neighbors, run.step) == (count, count - 1, 2)


def test_a_single_image_is_refused_unless_it_is_cropped(backbone_file, tmp_path):
    root = images_folder(tmp_path, 1)
    one = tiny_experiment(root, backbone_file, dataset="folder", steps=2, n_classes=3)
    with pytest.raises(StegoError, match="crop"):
        train(one, runs_dir=tmp_path / "runs")
    assert train(one.but(crop="five"), runs_dir=tmp_path / "runs").step == 2


def test_too_many_clusters_are_refused_before_training(experiment, backbone_file, tmp_path):
    root = images_folder(tmp_path, 3, side=16)
    few = dict(dataset="folder", batch_size=2, neighbors=2, train_size=16, eval_size=16)
    with pytest.raises(StegoError, match="15 clusters"):
        train(tiny_experiment(root, backbone_file, n_classes=15, **few), runs_dir=tmp_path / "runs")
    with pytest.raises(StegoError, match="258 clusters"):
        train(experiment.but(official={"extra_clusters": 250}), runs_dir=tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("*/experiment.json"))


def test_images_that_are_all_alike_are_reported(backbone_file, tmp_path):
    root = images_folder(tmp_path, 1)
    for i in range(1, 5):
        shutil.copy(root / "folder" / "0.png", root / "folder" / f"{i}.png")
    values = dict(dataset="folder", steps=1, n_classes=3, batch_size=2, probes="after")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tiny_experiment(root, backbone_file, **values), runs_dir=tmp_path / "runs")
    assert any("identical" in str(one.message) for one in caught)


# ---------------------------------------------------------------------------------------------- the process


@contextmanager
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def usual(scenes_root, backbone_file, tmp_path_factory):
    """A run that was trained and evaluated in the usual mode, and its scores."""
    experiment = tiny_experiment(scenes_root, backbone_file, steps=2, crf=True)
    with pytest.MonkeyPatch.context() as patch:
        few_samples(patch)
        run = train(experiment, runs_dir=tmp_path_factory.mktemp("usual"))
        return run, evaluate(run)["scores"]


@pytest.mark.parametrize(
    "mode",
    [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode, torch.no_grad, float64_by_default,
     lambda: torch.device("meta")],
    ids=["autocast", "inference", "no_grad", "float64", "device"],
)  # fmt: skip
def test_the_mode_that_the_caller_is_in_changes_nothing(usual, scenes_root, tmp_path, mode):
    (expected, scores), image = usual, open_dataset("scenes", scenes_root, "val").images[0]
    labels = expected.predict(image)
    with mode():
        run = train(expected.experiment, runs_dir=tmp_path)
        assert evaluate(load_run(run.folder))["scores"] == scores
        np.testing.assert_array_equal(load_run(run.folder).predict(image), labels)
    for name, value in expected.model.state_dict().items():
        assert torch.equal(value, run.model.state_dict()[name]), name


def test_threads_that_train_get_what_they_get_alone_and_disturb_nobody(experiment, tmp_path):
    experiments = [experiment.but(steps=20, seed=seed, dropout=0.5) for seed in (0, 1)]
    alone = [train(experiment, runs_dir=tmp_path / "runs").model.state_dict() for experiment in experiments]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda experiment: train(experiment, runs_dir=tmp_path / "runs"), experiments))
    assert torch.equal(torch.get_rng_state(), before)
    for expected, run in zip(alone, together, strict=True):
        for name, value in run.model.state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_a_state_survives_a_file_to_the_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shared = torch.rand(4, 6, generator=generator)
    state = {
        "a": {"b": shared, 3: shared[::2].T, "empty": torch.zeros(0, 5, dtype=torch.int64)},
        "c": [1, 0.1 + 0.2, "text", None, True, [torch.tensor(1.5), {}]],
    }
    save_state(tmp_path / "a.safetensors", state)
    again = load_state(tmp_path / "a.safetensors")
    if (maps := Path("/proc/self/maps")).exists():  # Windows cannot replace a file that is mapped
        assert "a.safetensors" not in maps.read_text()
    assert again["a"].keys() == state["a"].keys() and again["c"][:5] == state["c"][:5]
    pairs = [(again["a"][key], state["a"][key]) for key in state["a"]] + [(again["c"][5][0], state["c"][5][0])]
    assert all(torch.equal(ours, theirs) and ours.dtype == theirs.dtype for ours, theirs in pairs)
    save_file({"a": shared}, tmp_path / "other.safetensors")
    for name in ("other.safetensors", "text.safetensors"):
        (tmp_path / "text.safetensors").write_text("no tensors")
        with pytest.raises(StegoError, match=name):
            load_state(tmp_path / name)
