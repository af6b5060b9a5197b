"""What users do wrong, and what their data are like. `test_bad_input` tries every case of `CASES` and `VALID`."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from common import tiny_experiment, write_backbone
from PIL import Image
from safetensors.torch import load_file, save_file
from standins import flat_png

from stego_lib import Experiment, Run, evaluate, load_run, open_dataset, train
from stego_lib.segment import segment_folder
from stego_lib.utils.notices import Notice

TRAIN, VAL, SIDE = 5, 2, 32


@dataclass
class World:
    """A small labeled dataset of one's own, which a case may break; the files that it needs beside."""

    root: Path
    backbone: Path
    finished: Run
    """A run on it, trained and not evaluated; its folder may be broken too."""

    @property
    def folder(self) -> Path:
        return self.root / "folder"

    def image(self, number: int = 2, split: str = "train") -> Path:
        return self.folder / "imgs" / split / f"{number}.png"

    def label(self, number: int = 2, split: str = "train") -> Path:
        return self.folder / "labels" / split / f"{number}.png"

    def experiment(self, **changes: object) -> Experiment:
        values = dict(dataset="folder", train_size=SIDE, eval_size=SIDE, steps=2) | changes
        return tiny_experiment(self.root, values.pop("backbone", self.backbone), **values)

    def train(self, **changes: object) -> Run:
        return train(self.experiment(**changes), runs_dir=self.root / "runs")

    def evaluate(self) -> dict:
        return evaluate(load_run(self.finished.folder, data_root=str(self.root)), baselines=False)


def noise(*shape: int, high: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)


Case = Callable[[World], object]
CASES: dict[str, tuple[Case, tuple[str, ...]]] = {}
"""What is wrong -> what breaks it and uses it, and what the error must say: where, what, what to do."""
VALID: dict[str, Case] = {}
"""What is odd and works."""


def case(*said: str) -> Callable[[Case], Case]:
    def add(function: Case) -> Case:
        CASES[function.__name__.replace("_", " ")] = (function, said)
        return function

    return add


def valid(function: Case) -> Case:
    VALID[function.__name__.replace("_", " ")] = function
    return function


def spoil_image(name: str, write: Callable[[Path], object], *said: str) -> None:
    def spoil(world: World) -> None:
        path = world.image()
        content = path.read_bytes()
        path.unlink()
        write(path) if write.__code__.co_argcount == 1 else write(path, content)
        world.train()

    CASES[f"an image {name}"] = (spoil, said)


UNREADABLE = (r"imgs/train/2\.png", "cannot be read", "replace or remove")
spoil_image("cut short", lambda path, content: path.write_bytes(content[: len(content) // 2]), *UNREADABLE)
spoil_image("of zero bytes", lambda path: path.touch(), *UNREADABLE)
spoil_image("that is text", lambda path: path.write_text("<html>404 not found</html>"), *UNREADABLE)
spoil_image("that is a folder", lambda path: path.mkdir(), *UNREADABLE)
spoil_image(
    "that is a link to nowhere",
    lambda path: path.symlink_to("nowhere"),
    r"imgs/train/2\.png",
    "cannot be read",
    "remove",
)
spoil_image(
    "that is a link to itself", lambda path: path.symlink_to(path), r"imgs/train/2\.png", "cannot be read", "remove"
)
spoil_image(
    "with a bit flipped in its data",
    lambda path, content: path.write_bytes(content[:200] + b"\x00\xff" + content[202:]),
    *UNREADABLE,
)
spoil_image(
    "of 32-bit numbers",
    lambda path: Image.fromarray(np.ones((SIDE, SIDE), np.float32)).save(path, "TIFF"),
    r"imgs/train/2\.png",
    "1 of 5 images.*32-bit floating-point grayscale values from 1 to 1",
    r'"range": \[LOW, HIGH\].*classes\.json.*8 bits',
)
spoil_image(
    "of 32-bit integers",
    lambda path: Image.fromarray(np.ones((SIDE, SIDE), np.int32)).save(path, "TIFF"),
    r"imgs/train/2\.png",
    "signed 32-bit grayscale values from 1 to 1",
    r'"range": \[LOW, HIGH\].*classes\.json.*8 bits',
)
spoil_image("of 400 megapixels", lambda path: flat_png(path, 20_000), *UNREADABLE, "exceeds limit")
spoil_image("of a kind that programs run", lambda path: Image.fromarray(noise(9, 9, 3)).save(path, "EPS"), *UNREADABLE)


@case("3 of 5 images of folder train cannot be used", r"0\.png", r"1\.png", r"2\.png", "replace or remove")
def several_broken_images_told_at_once(world):
    for number in range(3):
        world.image(number).write_bytes(b"")
    world.train()


@case(r"image .*imgs/train/2\.png", r"\(1, 1\) pixels", "too small to be cut into crops", "crop='none'")
def a_image_of_one_pixel_to_be_cut(world):
    Image.new("RGB", (1, 1)).save(world.image())
    Image.new("L", (1, 1)).save(world.label())
    world.train(crop="five")


def spoil_label(name: str, array: np.ndarray | Callable[[Path], object], *said: str) -> None:
    def spoil(world: World) -> None:
        if callable(array):
            array(world.label())
        else:
            Image.fromarray(array).save(world.label())
        world.train()

    CASES[f"a label map {name}"] = (spoil, (r"labels/train/2\.png", *said))


spoil_label("of another size", np.zeros((SIDE, SIDE + 1), np.uint8), r"imgs/train/2\.png is \(32, 32\)", "must agree")
spoil_label("turned on its side", np.zeros((2 * SIDE, SIDE), np.uint8), r"\(64, 32\)", "must agree")
spoil_label("in colors", noise(SIDE, SIDE, 3), "has shape", "one class id per pixel")
spoil_label("with transparency", noise(SIDE, SIDE, 4), "has shape", "one class id per pixel")
spoil_label(
    "with an id that is no class",
    np.full((SIDE, SIDE), 3, np.uint8),
    "holds id 3",
    "3 classes",
    "0 to 2.*255 where ignored",
)
spoil_label(
    "of a network's probabilities",
    lambda path: Image.fromarray(np.full((SIDE, SIDE), 0.5, np.float32)).save(path, "TIFF"),
    "holds float32 values",
    "class ids are whole numbers",
)
spoil_label("of 16 bits with large ids", np.full((SIDE, SIDE), 1000, np.uint16), "holds id 1000", "0 to 2")
spoil_label("of zero bytes", lambda path: path.write_bytes(b""), "cannot be read", "replace")
spoil_label("cut short", lambda path: path.write_bytes(path.read_bytes()[:60]), "cannot be read", "replace")
spoil_label("of 400 megapixels", lambda path: flat_png(path, 20_000), "cannot be read", "replace")


@case("1 of 5 label maps are missing", "labels/train", r"the first is 2\.png")
def a_missing_label_map(world):
    world.label().unlink()
    world.train()


@case("5 of 5 label maps are missing", "labels/train")
def label_maps_of_other_names(world):
    for path in list((world.folder / "labels" / "train").iterdir()):
        path.rename(path.with_name(f"x{path.name}"))
    world.train()


@case(r"labels/val/0\.png", "every pixel", "ignored", "nothing to score")
def label_maps_that_are_all_ignored(world):
    for number in range(VAL):
        Image.fromarray(np.full((SIDE, SIDE), 255, np.uint8)).save(world.label(number, "val"))
    with pytest.warns(Notice, match="no pixel of 2 label maps has a class"):
        world.evaluate()


@case(r"classes\.json is missing", "names the classes", '"names"')
def labels_without_class_names(world):
    (world.folder / "classes.json").unlink()
    world.train()


def spoil_classes(name: str, content: object, *said: str) -> None:
    def spoil(world: World) -> None:
        (world.folder / "classes.json").write_text(content if isinstance(content, str) else json.dumps(content))
        world.train()

    CASES[f"classes.json {name}"] = (spoil, (r"folder/classes\.json", *said))


spoil_classes("cut short", '{"names": ["ro', "not valid JSON", "cut short or edited", "mend or remove")
spoil_classes("nested without end", "[" * 100_000, "not valid JSON", "mend or remove")
spoil_classes("that is a list", ["road"], "must hold", '"names"')
spoil_classes("without a name", {"names": []}, "one name at least")
spoil_classes("with one text for names", {"names": "road"}, "must hold", '"names"')
spoil_classes("with a number for a name", {"names": ["road", 3, "car"]}, "must hold", '"names"')
spoil_classes(
    "with too few colors", {"names": ["a", "b", "c"], "colors": [[1, 2, 3]]}, "3 class names and 1 colors", "as many"
)
spoil_classes(
    "with a color out of range", {"names": ["a"], "colors": [[1, 2, 256]]}, "no color", r"\[red, green, blue\]"
)
spoil_classes("with a number for colors", {"names": ["a"], "colors": 5}, "list with a color for each name")


@case(r"imgs/train holds no image", "put .jpg or .png files there")
def an_empty_folder(world):
    for path in (world.folder / "imgs" / "train").iterdir():
        path.unlink()
    world.train()


@case("folder was not found in", "belongs there: imgs/train", "data_root=FOLDER")
def no_folder_at_all(world):
    shutil.rmtree(world.folder)
    world.train()


@case("folder was not found in", "belongs there: imgs/train", "data_root=FOLDER")
def a_folder_that_is_a_file(world):
    shutil.rmtree(world.folder)
    world.folder.write_text("")
    world.train()


@case(r"imgs/train cannot be read|was not found", "imgs/train")
def a_folder_that_is_a_loop_of_links(world):
    shutil.rmtree(world.folder / "imgs" / "train")
    (world.folder / "imgs" / "train").symlink_to("train")
    world.train()


@case("imgs/train", r"2\.(png|jpg) and another image", "differ in their ending only", "rename")
def two_images_of_one_name(world):
    Image.new("RGB", (SIDE, SIDE)).save(world.image().with_suffix(".jpg"))
    world.train()


@case("folder has one training image", "add images", "crop='five'")
def a_single_image(world):
    for number in range(1, TRAIN):
        world.image(number).unlink()
    world.train()


@case("batch_size = 1", "greater than or equal to 2")
def a_batch_of_one(world):
    world.train(batch_size=1)


@case("n_classes is 7, but folder has 3 classes|n_classes", "3 classes")
def n_classes_that_are_not_those_of_the_labels(world):
    world.train(n_classes=7)


@case("unknown dataset 'foldr'", "did you mean 'folder'", "datasets: scenes")
def a_misspelled_data_set(world):
    world.train(dataset="foldr")


@case("no split 'test'", "train, val")
def a_split_that_is_not_there(world):
    open_dataset("folder", world.root, "test")


@case("unknown preset 'scens'", "did you mean 'scenes'")
def a_misspelled_preset(world):
    Experiment.preset("scens")


@case("unknown key 'batchsize'", "did you mean 'batch_size'")
def a_misspelled_parameter(world):
    world.train(batchsize=4)


@case("lr_head = nan", "finite number")
def a_parameter_that_is_no_number(world):
    world.train(lr_head=math.nan)


@case(
    "unknown backbone 'vit_smal_patch16_224'", "did you mean 'vit_small_patch16_224", r"\.safetensors"
)  # codespell:ignore smal
def a_misspelled_backbone(world):
    world.train(backbone="vit_smal_patch16_224")  # codespell:ignore smal


@case(
    r"backbone file .*/nowhere\.safetensors does not exist",
    "embedded backbones: photos_vit_tiny8, photos_vit_tiny8_d6, scenes_vit_tiny8",
)
def a_backbone_file_that_is_not_there(world):
    world.train(backbone=str(world.root / "nowhere.safetensors"))


@case("has 2 blocks", "block must be -2 to 1, not 5")
def a_block_that_the_backbone_lacks(world):
    world.train(block=5)


def spoil_backbone(name: str, change: Callable[[dict[str, torch.Tensor]], object], *said: str) -> None:
    def spoil(world: World) -> None:
        weights = load_file(world.backbone)
        change(weights)
        path = write_backbone(world.root / "own.safetensors")
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file(weights, path, metadata)
        world.train(backbone=str(path))

    CASES[f"a backbone {name}"] = (spoil, (r"own\.safetensors", *said))


spoil_backbone(
    "with weights of another shape",
    lambda w: w.update({"norm.bias": torch.zeros(5)}),
    r"norm\.bias",
    r"\(5,\), not \(32,\)",
)
spoil_backbone("with a weight missing", lambda w: w.pop("norm.bias"), r"norm\.bias", r"None, not \(32,\)")
spoil_backbone("with a weight too many", lambda w: w.update({"more": torch.zeros(5)}), "more", r"\(5,\), not None")
spoil_backbone(
    "whose weights are no numbers", lambda w: w["norm.weight"].fill_(torch.nan), "not finite numbers", "weights damaged"
)


@case("device 'cuda:99' cannot be used here", "'auto' or 'cpu'")
def a_device_that_is_absent(world):
    world.train(device="cuda:99")


@case("device 'gpu' cannot be used here", "'auto' or 'cpu'")
def a_device_that_does_not_exist(world):
    world.train(device="gpu")


@case("runs/features", "cannot be written", "Not a directory|File exists", "name a folder")
def a_results_folder_that_is_a_file(world):
    (world.root / "file").write_text("")
    train(world.experiment(), runs_dir=world.root / "file" / "runs")


# ---------------------------------------------------------------------------------------------- runs and checkpoints


@case("is not a run with a checkpoint", "checkpoint.pt missing")
def a_run_without_a_checkpoint(world):
    (world.finished.folder / "checkpoint.pt").unlink()
    load_run(world.finished.folder)


@case("is not a run with a checkpoint", r"experiment\.json, classes\.json, checkpoint\.pt missing")
def a_folder_that_is_no_run(world):
    load_run(world.folder / "imgs")


def spoil_checkpoint(name: str, change: Callable[[dict], object], *said: str) -> None:
    def spoil(world: World) -> None:
        path = world.finished.folder / "checkpoint.pt"
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)
        load_run(world.finished.folder)

    CASES[f"a checkpoint {name}"] = (spoil, (r"finished/checkpoint\.pt", *said))


def spoil_bytes(name: str, change: Callable[[bytes], bytes]) -> None:
    def spoil(world: World) -> None:
        path = world.finished.folder / "checkpoint.pt"
        path.write_bytes(change(path.read_bytes()))
        load_run(world.finished.folder)

    CASES[f"a checkpoint {name}"] = (
        spoil,
        (r"finished/checkpoint\.pt", "cannot be read", "remove it or put a whole one"),
    )


spoil_bytes("cut short", lambda content: content[: len(content) // 2])
spoil_bytes("of zero bytes", lambda content: b"")
spoil_bytes("that is text", lambda content: b"<html>404 not found</html>")
spoil_checkpoint("without weights", lambda s: s.pop("model"), "model missing", "train again")
spoil_checkpoint("without a step", lambda s: s.pop("step"), "step missing", "train again")
spoil_checkpoint("with two shifts", lambda s: s["shifts"].pop(), "shifts missing or of another kind")
spoil_checkpoint(
    "without the mean of the features", lambda s: s["model"].pop("feature_mean"), "feature_mean missing", "train again"
)
spoil_checkpoint(
    "with a number for the mean of the features",
    lambda s: s["model"].update({"feature_mean": torch.tensor(0.0)}),
    "feature_mean missing or of another kind",
    "train again",
)
spoil_checkpoint(
    "with text for a weight", lambda s: s["model"].update({"head.linear.bias": "x"}), "model", "another kind"
)
spoil_checkpoint(
    "with a weight of another shape",
    lambda s: s["model"].update({"head.linear.bias": torch.zeros(3)}),
    r"head\.linear\.bias",
    "of one run",
)
spoil_checkpoint(
    "with a weight missing", lambda s: s["model"].pop("linear_probe.classifier.bias"), r"classifier\.bias", "of one run"
)


@case(r"checkpoint\.pt does not fit", r"experiment\.json", r"head\.linear", "of one run")
def the_checkpoint_of_another_experiment(world):
    values = json.loads((world.finished.folder / "experiment.json").read_text())
    (world.finished.folder / "experiment.json").write_text(json.dumps(values | {"code_dim": 9}))
    load_run(world.finished.folder)


@case(r"checkpoint\.pt does not fit", "linear_probe", "of one run")
def the_checkpoint_of_another_data_set(world):
    (world.finished.folder / "classes.json").write_text('{"names": ["a", "b", "c", "d"]}')
    load_run(world.finished.folder)


@case("unknown key 'stepz'", "did you mean 'steps'")
def a_run_of_a_later_version(world):
    values = json.loads((world.finished.folder / "experiment.json").read_text())
    (world.finished.folder / "experiment.json").write_text(json.dumps(values | {"stepz": 9}))
    load_run(world.finished.folder)


@case("has the classes cat, dog, pig", "trained for road, tree, car", "its own dataset")
def a_run_scored_on_other_classes(world):
    (world.folder / "classes.json").write_text('{"names": ["cat", "dog", "pig"]}')
    world.evaluate()


@case("has 4 classes, this run was trained for 3", "its own dataset")
def a_run_scored_on_more_classes(world):
    (world.folder / "classes.json").write_text('{"names": ["road", "tree", "car", "dog"]}')
    world.evaluate()


@case("cannot change code_dim", "it can change dataset, data_root")
def a_run_opened_with_what_it_was_trained_by_changed(world):
    load_run(world.finished.folder, code_dim=3)


@case("start_from", "another kind or size", "take backbone, features, head and code_dim")
def training_that_starts_from_a_head_that_does_not_fit(world):
    world.train(start_from=str(world.finished.folder), code_dim=9)


@case(r"no metrics\.json yet", r"call evaluate\(run\)")
def scores_of_a_run_that_was_not_evaluated(world):
    return world.finished.metrics


@case("uint8 with three channels", "float32")
def a_prediction_of_an_array_of_floats(world):
    world.finished.predict(np.zeros((8, 8, 3), np.float32))


@case(r"nowhere\.jpg", "cannot be read", "replace or remove")
def a_prediction_of_a_image_that_is_not_there(world):
    world.finished.predict(world.root / "nowhere.jpg")


@case("several images are called 2", "overwrite each other")
def segmenting_two_images_of_one_name(world):
    Image.new("RGB", (SIDE, SIDE)).save(world.image().with_suffix(".jpg"))
    segment_folder(world.finished, world.image().parent, world.root / "out")


# ---------------------------------------------------------------------------------------------- odd and valid


def odd_image(name: str, write: Callable[[Path], object]) -> None:
    def use(world: World) -> None:
        world.image().unlink()
        write(world.image())
        world.train()

    VALID[f"an image {name}"] = use


def saved(mode: str, kind: str) -> Callable[[Path], object]:
    return lambda path: Image.fromarray(noise(SIDE, SIDE, 3)).convert(mode).save(path, kind)


for mode, kind in (
    ("L", "PNG"),
    ("LA", "PNG"),
    ("1", "PNG"),
    ("P", "PNG"),
    ("RGBA", "PNG"),
    ("CMYK", "JPEG"),
    ("YCbCr", "TIFF"),
    ("LAB", "TIFF"),
):
    odd_image(f"of mode {mode}", saved(mode, kind))
odd_image("of two views, as phones save them", lambda path: Image.fromarray(noise(SIDE, SIDE, 3)).save(path, "MPO"))
odd_image("that is a JPEG called .png", saved("RGB", "JPEG"))


@valid
def a_image_of_one_pixel(world):
    Image.new("RGB", (1, 1)).save(world.image())
    Image.new("L", (1, 1)).save(world.label())
    world.train()


@valid
def a_label_map_with_a_palette(world):
    stored = Image.fromarray(noise(SIDE, SIDE, high=3))
    stored.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    stored.save(world.label())
    assert open_dataset("folder", world.root, "train").label(2).unique().tolist() == [0, 1, 2]
    world.train()


@valid
def a_label_map_that_is_all_ignored(world):
    Image.fromarray(np.full((SIDE, SIDE), 255, np.uint8)).save(world.label())
    world.train()


@valid
def label_maps_of_images_that_are_not_there(world):
    shutil.copy(world.label(), world.label(99))
    world.train()


@valid
def odd_names(world):
    for number, name in enumerate(("with space", "ünïcode 日本", "new\nline", "<b>bold</b>")):
        for path in (world.image(number), world.label(number)):
            path.rename(path.with_name(f"{name}.png".replace("/", "")))
    run = world.train()
    with pytest.warns(Notice, match="was not scored with labels, so its segments are clusters"):
        areas = segment_folder(run, world.folder / "imgs" / "train", world.root / "out")
    assert "new\nline.png" in areas.index and (world.root / "out" / "labels" / "ünïcode 日本.png").exists()


@valid
def a_data_root_with_odd_names(world):
    odd = world.root / "a b\n<i>ü"
    shutil.copytree(world.folder, odd / "folder")
    train(world.experiment(data_root=str(odd)), runs_dir=odd / "runs")


@valid
def a_link_to_a_image(world):
    target = world.image().rename(world.root / "elsewhere.png")
    world.image().symlink_to(target)
    world.train()


@valid
def no_labels_at_all(world):
    shutil.rmtree(world.folder / "labels")
    run = world.train()
    assert run.predict(world.image()).shape == (SIDE, SIDE)


@valid
def other_files_beside_the_images(world):
    for name in ("Thumbs.db", ".hidden.png", "notes.txt"):
        (world.folder / "imgs" / "train" / name).write_bytes(b"x")
    world.train()
