"""Your own pictures: without labels, without class names, and files that contradict each other."""

import json

import numpy as np
import pytest
import standins

from stego_lib import StegoError, open_dataset
from stego_lib.datasets.folder import distinct_colors, open_folder


@pytest.fixture
def pictures(tmp_path):
    """Two pictures a split, nothing else."""
    for split in ("train", "val"):
        for name in ("a.jpg", "b.png"):
            standins.save(tmp_path / "folder/imgs" / split / name, np.zeros((6, 8, 3), np.uint8))
    return tmp_path


def label(root, split, name):
    standins.save(root / "folder/labels" / split / f"{name}.png", np.zeros((6, 8), np.uint8))


def test_pictures_alone_have_nameless_classes(pictures):
    dataset = open_dataset("folder", pictures, "train")
    assert not dataset.has_labels and dataset.label(0) is None and len(dataset) == 2
    assert dataset.classes.names == tuple(f"cluster {i}" for i in range(27))
    assert open_folder(pictures, "val", n_classes=5).classes.names[-1] == "cluster 4"


def test_class_names_are_used_without_labels(pictures):
    (pictures / "folder/classes.json").write_text('{"names": ["road", "tree"]}')
    assert open_dataset("folder", pictures, "train").classes.names == ("road", "tree")


def test_labels_of_one_split_need_names_for_both(pictures):
    """Else training would have another number of classes than scoring."""
    for name in "ab":
        label(pictures, "val", name)
    for split in ("train", "val"):
        with pytest.raises(StegoError, match=r"classes\.json is missing"):
            open_dataset("folder", pictures, split)
    (pictures / "folder/classes.json").write_text('{"names": ["road"]}')
    assert [open_dataset("folder", pictures, split).has_labels for split in ("train", "val")] == [False, True]


def test_labels_of_some_pictures_only_are_explained(pictures):
    (pictures / "folder/classes.json").write_text('{"names": ["road"]}')
    label(pictures, "train", "a")
    with pytest.raises(StegoError, match=r"1 of 2 label maps are missing.*b\.png"):
        open_dataset("folder", pictures, "train")


def test_two_pictures_of_one_name_are_explained(pictures):
    standins.save(pictures / "folder/imgs/train/a.png", np.zeros((6, 8, 3), np.uint8))
    with pytest.raises(StegoError, match=r"a\.(png|jpg) and another picture differ in their ending only"):
        open_dataset("folder", pictures, "train")


@pytest.mark.parametrize("color", [[1, 2], [1, 2, 256], [-1, 2, 3], ["red", 0, 0], [0.5, 0, 0]])
def test_a_wrong_colour_is_explained(pictures, color):
    (pictures / "folder/classes.json").write_text(json.dumps({"names": ["road"], "colors": [color]}))
    with pytest.raises(StegoError, match=r"is no colour; a colour is \[red, green, blue\]"):
        open_dataset("folder", pictures, "train")


@pytest.mark.parametrize("count", [1, 27, 100])
def test_made_up_colours_are_told_apart(count):
    colors = np.array(distinct_colors(count))
    assert len({tuple(color) for color in colors}) == count
    if count <= 27:
        distance = np.abs(colors[:, None] - colors[None]).max(-1) + 255 * np.eye(count)
        assert distance.min() >= 20
