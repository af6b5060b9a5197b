"""Your own images: without labels, without class names, and files that contradict each other."""

import json
import shutil

import numpy as np
import pytest
import standins
from PIL import Image

from stego_lib import DataNotFound, Experiment, StegoError, open_dataset
from stego_lib.datasets import open_split, open_training_set
from stego_lib.datasets.classes import distinct_colors
from stego_lib.utils.notices import Notice


@pytest.fixture
def images(tmp_path):
    """Two images a split, nothing else."""
    for split in ("train", "val"):
        for name in ("a.jpg", "b.png"):
            standins.save(tmp_path / "folder/imgs" / split / name, np.zeros((6, 8, 3), np.uint8))
    return tmp_path


def label(root, split, name):
    standins.save(root / "folder/labels" / split / f"{name}.png", np.zeros((6, 8), np.uint8))


def test_images_alone_have_nameless_classes(images):
    dataset = open_dataset("folder", images, "train")
    assert not dataset.has_labels and dataset.label(0) is None and len(dataset) == 2
    assert dataset.classes.names == tuple(f"cluster {i}" for i in range(27))
    five = open_dataset("folder", images, "val", n_classes=5)
    assert five.classes.names == tuple(f"cluster {i}" for i in range(5)) and len(five.classes.colors) == 5
    experiment = Experiment.preset("folder", data_root=str(images), n_classes=3)
    assert len(open_split(experiment, "train").classes) == len(open_training_set(experiment).classes) == 3


def test_a_number_of_clusters_beside_the_data_sets_own_classes_is_refused(images, scenes_root):
    (images / "folder/classes.json").write_text('{"names": ["road", "tree"]}')
    assert len(open_dataset("folder", images, "train", n_classes=2).classes) == 2
    with pytest.raises(StegoError, match=r"n_classes is 5, but folder has 2 classes of its own.*extra_clusters"):
        open_dataset("folder", images, "train", n_classes=5)
    assert len(open_dataset("scenes", scenes_root, "val", n_classes=8).classes) == 8
    with pytest.raises(StegoError, match=r"n_classes is 27, but scenes has 8 classes"):
        open_dataset("scenes", scenes_root, "val", n_classes=27)


def test_the_number_of_classes_changes_what_is_stored_only_where_there_are_labels(images):
    identities = [open_dataset("folder", images, "train", n_classes=n).identity() for n in (None, 5)]
    assert identities[0] == identities[1], "features of images without labels are the same"
    for name in "ab":
        label(images, "train", name)
    identities = []
    for names in (["road"], ["road", "tree"]):
        (images / "folder/classes.json").write_text(json.dumps({"names": names}))
        identities.append(open_dataset("folder", images, "train").identity())
    assert identities[0] != identities[1], "ids beyond the last class are stored as ignored"


@pytest.mark.parametrize("place", ["folder", "."])
def test_just_images_serve_as_both_splits(tmp_path, place):
    for i in range(3):
        standins.save(tmp_path / place / f"{i}.jpg", np.full((6, 8, 3), 40 * i, np.uint8))
    (tmp_path / place / "notes.txt").write_text("no image")
    train = open_dataset("folder", tmp_path, "train")
    with pytest.warns(Notice, match=r"no imgs/train and imgs/val: its 3 images serve as both, none is held out"):
        val = open_dataset("folder", tmp_path, "val")
    assert train.images == val.images == [tmp_path / place / f"{i}.jpg" for i in range(3)]
    assert not train.has_labels and len(train.classes) == 27


def test_images_beside_the_splits_are_not_taken(images):
    standins.save(images / "folder/cover.png", np.zeros((6, 8, 3), np.uint8))
    standins.save(images / "logo.png", np.zeros((6, 8, 3), np.uint8))
    assert open_dataset("folder", images, "val").names == ["a", "b"]


@pytest.mark.parametrize("there, missing", [("train", "val"), ("val", "train")])
def test_one_split_is_enough_not_to_take_the_images_beside_it(images, there, missing):
    standins.save(images / "folder/cover.png", np.zeros((6, 8, 3), np.uint8))
    shutil.rmtree(images / "folder/imgs" / missing)
    assert open_dataset("folder", images, there).names == ["a", "b"]
    with pytest.raises(DataNotFound, match="imgs/train"):
        open_dataset("folder", images, missing)


def test_labels_beside_just_images_are_explained(tmp_path):
    standins.save(tmp_path / "a.png", np.zeros((6, 8, 3), np.uint8))
    standins.save(tmp_path / "labels/a.png", np.zeros((6, 8), np.uint8))
    with pytest.raises(StegoError, match=r"has labels, but no imgs/train and imgs/val"):
        open_dataset("folder", tmp_path, "train")


def test_class_names_are_used_without_labels(images):
    (images / "folder/classes.json").write_text('{"names": ["road", "tree"]}')
    assert open_dataset("folder", images, "train").classes.names == ("road", "tree")


def test_labels_of_one_split_need_names_for_both(images):
    """Else training would have another number of classes than scoring."""
    for name in "ab":
        label(images, "val", name)
    for split in ("train", "val"):
        with pytest.raises(StegoError, match=r"classes\.json is missing"):
            open_dataset("folder", images, split)
    (images / "folder/classes.json").write_text('{"names": ["road"]}')
    assert [open_dataset("folder", images, split).has_labels for split in ("train", "val")] == [False, True]


def test_labels_of_some_images_only_are_explained(images):
    (images / "folder/classes.json").write_text('{"names": ["road"]}')
    label(images, "train", "a")
    with pytest.raises(StegoError, match=r"1 of 2 label maps are missing.*b\.png"):
        open_dataset("folder", images, "train")


def test_two_images_of_one_name_are_explained(images):
    standins.save(images / "folder/imgs/train/a.png", np.zeros((6, 8, 3), np.uint8))
    with pytest.raises(StegoError, match=r"a\.(png|jpg) and another image differ in their ending only"):
        open_dataset("folder", images, "train")


@pytest.mark.parametrize("color", [[1, 2], [1, 2, 256], [-1, 2, 3], ["red", 0, 0], [0.5, 0, 0]])
def test_a_wrong_color_is_explained(images, color):
    (images / "folder/classes.json").write_text(json.dumps({"names": ["road"], "colors": [color]}))
    with pytest.raises(StegoError, match=r"is no color; a color is \[red, green, blue\]"):
        open_dataset("folder", images, "train")


def test_the_darkest_and_the_brightest_colors_are_colors(images):
    (images / "folder/classes.json").write_text('{"names": ["road"], "colors": [[0, 255, 0]]}')
    assert open_dataset("folder", images, "train").classes.colors == ((0, 255, 0),)


@pytest.mark.parametrize("count", [1, 27, 100])
def test_made_up_colors_are_told_apart(count):
    colors = np.array(distinct_colors(count))
    assert len({tuple(color) for color in colors}) == count
    if count <= 27:
        distance = np.abs(colors[:, None] - colors[None]).max(-1) + 255 * np.eye(count)
        assert distance.min() >= 20


def test_a_label_map_stored_as_jpeg_is_refused_whatever_its_name(images):
    (images / "folder/classes.json").write_text('{"names": ["road", "tree"]}')
    for name in "ab":
        label(images, "train", name)
    Image.new("L", (8, 6)).save(images / "folder/labels/train/b.png", "JPEG")
    with pytest.raises(StegoError, match=r"labels/train/b\.png is a JPEG.*export the labels anew as PNG"):
        open_dataset("folder", images, "train").label(1)
