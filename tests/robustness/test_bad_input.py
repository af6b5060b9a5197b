"""Mistakes of users, and odd but valid input: one clear error each, before any training, or it works.

Formats of images and label maps are in tests/datasets, parameters out of range in test_experiment.py.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from common import TIMM_ARGUMENTS, tiny_experiment, write_backbone
from PIL import Image
from safetensors.torch import load_file, save_file
from standins import flat_png

from stego_lib import Run, StegoError, evaluate, load_run, train, training
from stego_lib.segment import segment_folder
from stego_lib.utils.notices import Notice

SIDE = 32


def noise(*shape: int, high: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)


@dataclass
class World:
    """A small labeled dataset and a run on it, trained and not evaluated; a case breaks one of them."""

    root: Path
    backbone: Path
    run: Run

    @property
    def folder(self) -> Path:
        return self.root / "folder"

    @property
    def image(self) -> Path:
        return self.folder / "imgs/train/2.png"

    @property
    def label(self) -> Path:
        return self.folder / "labels/train/2.png"

    def train(self, runs_dir: str = "runs", **changes: object) -> Run:
        values = dict(dataset="folder", train_size=SIDE, eval_size=SIDE, steps=2) | changes
        experiment = tiny_experiment(self.root, values.pop("backbone", self.backbone), **values)
        return train(experiment, runs_dir=self.root / runs_dir)

    def evaluate(self) -> dict:
        return evaluate(load_run(self.run.folder, data_root=str(self.root)), baselines=False)

    def classes(self, text: str) -> None:
        (self.folder / "classes.json").write_text(text)


@pytest.fixture(scope="module")
def template(tmp_path_factory, backbone_file) -> World:
    root = tmp_path_factory.mktemp("template")
    for split, count in (("train", 5), ("val", 2)):
        for i in range(count):
            for kind, array in (("imgs", noise(SIDE, SIDE, 3, seed=i)), ("labels", noise(SIDE, SIDE, high=3, seed=i))):
                path = root / "folder" / kind / split / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    world = World(root, backbone_file, None)
    world.classes('{"names": ["road", "tree", "car"]}')
    world.run = world.train()
    return world


@pytest.fixture
def world(template, tmp_path) -> World:
    shutil.copytree(template.folder, tmp_path / "folder")
    run = shutil.copytree(template.run.folder, tmp_path / "runs" / "finished")
    return World(tmp_path, template.backbone, load_run(run))


def write(path: Path, array: np.ndarray) -> None:
    Image.fromarray(array).save(path)


# Changes to the files of a dataset that training must name -> a word of the error.
FILES = {
    "a web page called .png": (lambda w: w.image.write_text("<html>404</html>"), r"2\.png cannot be read"),
    "a dangling link": (lambda w: (w.image.unlink(), w.image.symlink_to("nowhere")), r"2\.png cannot be read"),
    "400 megapixels": (lambda w: flat_png(w.image, 20_000), r"2\.png cannot be read"),
    "an unknown id": (lambda w: write(w.label, noise(SIDE, SIDE, high=4)), r"2\.png contains id 3"),
    "a missing classes.json": (lambda w: (w.folder / "classes.json").unlink(), r"classes\.json"),
    "an empty folder": (lambda w: [path.unlink() for path in w.image.parent.iterdir()], "no image"),
    "a single image": (lambda w: [w.image.with_name(f"{i}.png").unlink() for i in (0, 1, 3, 4)], "one training image"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_training_names_what_is_wrong_with_the_files(world, monkeypatch, name):
    spoil, said = FILES[name]
    spoil(world)
    monkeypatch.setattr(training, "train_step", lambda *_: pytest.fail("training began"))
    with pytest.raises(StegoError, match=said):
        world.train()


PARAMETERS = {
    "n_classes beside class names": (dict(n_classes=7), "n_classes"),
    "a file for a folder of runs": (dict(runs_dir="folder/classes.json"), "classes.json"),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_training_names_a_wrong_parameter(world, name):
    changes, said = PARAMETERS[name]
    with pytest.raises(StegoError, match=said):
        world.train(**changes)


def test_weights_that_are_no_numbers_are_named(world):
    path = write_backbone(world.root / "own.safetensors")
    weights = load_file(path)
    save_file(weights | {"norm.weight": weights["norm.weight"] * math.nan}, path, {"timm": json.dumps(TIMM_ARGUMENTS)})
    with pytest.raises(StegoError, match="weights"):
        world.train(backbone=str(path))


def change_experiment(world: World, **values: object) -> None:
    path = world.run.folder / "experiment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def score_other_classes(world: World) -> None:
    world.classes('{"names": ["road", "tree", "car", "dog"]}')
    world.evaluate()


def ignore_all_of_val(world: World) -> None:
    for path in (world.folder / "labels/val").iterdir():
        write(path, np.full((SIDE, SIDE), 255, np.uint8))
    with pytest.warns(Notice, match="no class"):
        world.evaluate()


# What is done with a run -> a word of the error.
RUNS = {
    "a key of another version": (lambda w: change_experiment(w, stepz=9), "stepz"),
    "the checkpoint of another head": (lambda w: change_experiment(w, code_dim=9), "checkpoint"),
    "the checkpoint of other classes": (
        lambda w: (w.run.folder / "classes.json").write_text('{"names": ["a", "b", "c", "d"]}'), "checkpoint",
    ),
    "scores on other classes": (score_other_classes, "4 classes"),
    "scores without labels": (ignore_all_of_val, "ignored"),
    "a change of what was trained": (lambda w: load_run(w.run.folder, code_dim=3), "code_dim"),
    "a start from another head": (lambda w: w.train(start_from=str(w.run.folder), code_dim=9), "start_from"),
    "scores before evaluation": (lambda w: w.run.metrics, "evaluate"),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_checked(world, name):
    use, said = RUNS[name]
    with pytest.raises(StegoError, match=said):
        use(world)
        load_run(world.run.folder)


def odd_names(world: World) -> None:
    for number, name in enumerate(("with space", "ünïcode 日本", "price$HOME", "<b>bold<b>")):
        for path in (world.image, world.label):
            path.with_name(f"{number}.png").rename(path.with_name(f"{name}.png"))


def other_files(world: World) -> None:
    for name in ("Thumbs.db", ".hidden.png", "notes.txt"):
        (world.image.parent / name).write_bytes(b"x")
    shutil.copy(world.label, world.label.with_name("99.png"))


# Odd and valid.
VALID = {
    "two views, as phones save them": lambda w: Image.fromarray(noise(SIDE, SIDE, 3)).save(w.image, "MPO"),
    "one pixel": lambda w: (Image.new("RGB", (1, 1)).save(w.image), Image.new("L", (1, 1)).save(w.label)),
    "a label map that is all ignored": lambda w: write(w.label, np.full((SIDE, SIDE), 255, np.uint8)),
    "no labels": lambda w: shutil.rmtree(w.folder / "labels"),
    "other files beside": other_files,
    "odd names": odd_names,
}


@pytest.mark.filterwarnings("ignore:.*was not evaluated")
def test_odd_names_of_results(world):
    odd_names(world)
    segment_folder(world.run, world.image.parent, world.root / "out")
    stems = [{path.stem for path in folder.iterdir()} for folder in (world.image.parent, world.root / "out" / "labels")]
    assert stems[0] == stems[1] and "price$HOME" in stems[0]


@pytest.mark.parametrize("name", VALID)
def test_odd_input_works(world, name):
    VALID[name](world)
    assert world.train().step == 2
