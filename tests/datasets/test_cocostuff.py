"""COCO-Stuff in its three forms: which images, which classes, what is said when files are missing."""

import json

import numpy as np
import pytest
import standins

from stego_lib import DataNotFound, StegoError, open_dataset
from stego_lib.datasets.cocostuff import TABLE

ALL, SEVEN, SIX = "Coco164kFull_Stuff_Coarse.txt", "Coco164kFull_Stuff_Coarse_7.txt", "Coco164kFew_Stuff_6.txt"


@pytest.fixture
def root(tmp_path):
    standins.cocostuff(tmp_path, {"train": 3, "val": 2}, (SEVEN, SIX), 48, 182)
    return tmp_path


def test_the_table_is_the_reference(shared):
    reference = json.loads((shared / "reference" / "cocostuff27.json").read_text())
    assert TABLE["names"] == reference["names"] and TABLE["fine_to_coarse"] == reference["fine_to_coarse"]


@pytest.mark.parametrize("name", ["cocostuff27", "cocostuff15", "cocostuff3"])
def test_every_stored_id_becomes_its_class_by_name(root, name):
    stored = np.append(np.arange(182, dtype=np.uint8), np.uint8(255)).reshape(3, 61)
    standins.save(root / "cocostuff/images/val2017/000000000009.jpg", np.zeros((3, 61, 3), np.uint8))
    standins.save(root / "cocostuff/annotations/val2017/000000000009.png", stored)
    dataset = open_dataset(name, root, "val")
    found = dataset.label(0).flatten().tolist()
    for id_, class_ in zip(stored.ravel().tolist(), found, strict=True):
        coarse = TABLE["fine_to_coarse"][id_] if id_ < 182 else None
        expected = None if coarse is None else TABLE["names"][coarse]
        assert (dataset.classes.names[class_] if class_ >= 0 else None) == (
            expected if expected in dataset.classes.names else None
        ), id_
    assert set(found) == {-1, *range(len(dataset.classes))}
    assert name != "cocostuff27" or [found[i] for i in (0, 17, 181, 182)] == [9, 7, 24, -1]


@pytest.mark.parametrize("name", ["cocostuff27", "cocostuff15", "cocostuff3"])
def test_published_labels_are_those_of_the_published_loader(root, name):
    """Pixel by pixel: an id without a coarse class becomes 0, 255 is ignored, the smaller forms come after."""
    standins.save(root / "cocostuff/images/val2017/000000000009.jpg", np.zeros((16, 16, 3), np.uint8))
    standins.save(
        root / "cocostuff/annotations/val2017/000000000009.png", np.arange(256, dtype=np.uint8).reshape(16, 16)
    )
    expected = []
    for stored in range(256):
        coarse = -1 if stored == 255 else TABLE["fine_to_coarse"][stored] if stored < 182 else 0
        if name == "cocostuff15":
            coarse -= 12  # things come out negative, which no score counts
        if name == "cocostuff3":
            coarse = [23, 22, 21].index(coarse) if coarse in (23, 22, 21) else -1
        expected.append(max(coarse, -1))
    found = open_dataset(name, root, "val", published=True).label(0).flatten().tolist()
    assert found == expected
    with pytest.raises(StegoError, match="182, 183"):
        open_dataset(name, root, "val").label(0)


def test_the_order_is_that_of_the_list(root):
    (root / "cocostuff/curated/val2017" / SEVEN).write_text("000000000010\n000000000009\n")
    assert open_dataset("cocostuff27", root, "val").names == ["000000000010", "000000000009"]


@pytest.mark.parametrize("split, expected", [("train", ["000000000011"]), ("val", ["000000000009", "000000000010"])])
def test_the_published_training_list_is_preferred_where_it_is(root, split, expected):
    """It is for training only: scores are of the 2,175 of list 7."""
    (root / f"cocostuff/curated/{split}2017" / ALL).write_text("000000000011\n")
    assert open_dataset("cocostuff27", root, split).names == expected
    assert len(open_dataset("cocostuff15", root, split)) == (3 if split == "train" else 2)


@pytest.mark.parametrize(
    "path, message",
    [
        ("images/val2017/000000000010.jpg", r"1 of 2 images are missing.*000000000010\.jpg"),
        ("annotations/val2017/000000000010.png", r"1 of 2 label maps.*000000000010\.png"),
        (f"curated/val2017/{SEVEN}", rf"{SEVEN}"),
    ],
)
def test_what_is_missing_is_named(root, path, message):
    (root / "cocostuff" / path).unlink()
    with pytest.raises(StegoError, match=message):
        open_dataset("cocostuff27", root, "val")


def test_where_it_is_looked_for(tmp_path):
    with pytest.raises(DataNotFound, match="prepare cocostuff3"):
        open_dataset("cocostuff3", tmp_path, "train")
