"""Runs in any state: unfinished, of few images, with other classes, in a process with settings of its own."""

import shutil
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from common import broken_off, tiny_experiment
from PIL import Image
from standins import noise_images

from stego_lib import StegoError, evaluate, load_run, open_dataset, train
from stego_lib.segment import segment_folder
from stego_lib.utils.files import read_json, write_json
from stego_lib.utils.notices import Notice
from stego_lib.utils.states import load_state, save_state
from stego_lib.utils.torch_state import drawing

pytestmark = pytest.mark.usefixtures("few_samples")


@pytest.fixture
def experiment(scenes_root, backbone_file):
    return tiny_experiment(scenes_root, backbone_file)


def test_draws_of_two_threads_do_not_mix():
    def other() -> None:
        with drawing(1):
            time.sleep(0.3)

    with ThreadPoolExecutor(1) as pool, drawing(0):
        pool.submit(other)
        time.sleep(0.1)  # until the other thread has begun or waits
        values = torch.rand(3)
    assert torch.equal(values, torch.rand(3, generator=torch.Generator().manual_seed(0)))


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


@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_handful_of_images_trains(backbone_file, tmp_path, count):
    noise_images(tmp_path / "folder", *[(64, 64)] * count)
    values = dict(dataset="folder", steps=2, batch_size=16, neighbors=7, probes="after", n_classes=3)
    with pytest.warns(Notice, match=f"batch_size is {count}"):
        run = train(tiny_experiment(tmp_path, backbone_file, **values), runs_dir=tmp_path / "runs")
    assert (run.experiment.batch_size, run.experiment.neighbors, run.step) == (count, count - 1, 2)


def test_a_single_image_is_refused_unless_it_is_cropped(backbone_file, tmp_path):
    noise_images(tmp_path / "folder", (64, 64))
    one = tiny_experiment(tmp_path, backbone_file, dataset="folder", steps=2, n_classes=3)
    with pytest.raises(StegoError, match="crop"):
        train(one, runs_dir=tmp_path / "runs")
    assert train(one.but(crop="five"), runs_dir=tmp_path / "runs").step == 2


def test_too_many_clusters_are_refused_before_training(experiment, backbone_file, tmp_path):
    noise_images(tmp_path / "folder", *[(16, 16)] * 3)
    few = dict(dataset="folder", batch_size=2, neighbors=2, train_size=16, eval_size=16)
    with pytest.raises(StegoError, match="15 clusters"):
        train(tiny_experiment(tmp_path, backbone_file, n_classes=15, **few), runs_dir=tmp_path / "runs")
    with pytest.raises(StegoError, match="258 clusters"):
        train(experiment.but(official={"extra_clusters": 250}), runs_dir=tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("*/experiment.json"))


def test_images_that_are_all_alike_are_reported(backbone_file, tmp_path):
    noise_images(tmp_path / "folder", (64, 64))
    for i in range(1, 5):
        shutil.copy(tmp_path / "folder" / "0.png", tmp_path / "folder" / f"{i}.png")
    values = dict(dataset="folder", steps=1, n_classes=3, batch_size=2, probes="after")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tiny_experiment(tmp_path, backbone_file, **values), runs_dir=tmp_path / "runs")
    assert any("identical" in str(one.message) for one in caught)


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


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_file_that_was_read_is_not_mapped(tmp_path):
    """Windows cannot replace a file that is mapped."""
    save_state(tmp_path / "a.safetensors", {"a": torch.ones(3)})
    state = load_state(tmp_path / "a.safetensors")
    assert "a.safetensors" not in Path("/proc/self/maps").read_text() and state["a"].sum() == 3
