"""Your own images: layouts, classes.json, images without labels, files that contradict each other."""

import json

import numpy as np
import pytest
import standins
import torch

from stego_lib import DataNotFound, Experiment, StegoError, open_dataset
from stego_lib.datasets import Classes, open_split, open_training_set
from stego_lib.datasets.classes import Rules, cluster_classes, read_classes, write_classes
from stego_lib.datasets.images import as_tensor
from stego_lib.datasets.layout import list_images
from stego_lib.utils.notices import Notice

IMAGE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
STORED = np.array([[0, 1, 2, 255, 255, 1, 0, 0]] * 6, np.uint8)
NAMES = {"names": ["road", "tree", "car"], "colors": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]}


@pytest.fixture
def labeled(tmp_path):
    """Two labeled images a split."""
    for split in ("train", "val"):
        for name in "ba":
            standins.save(tmp_path / f"folder/imgs/{split}/{name}.png", IMAGE)
            standins.save(tmp_path / f"folder/labels/{split}/{name}.png", STORED)
    (tmp_path / "folder/classes.json").write_text(json.dumps(NAMES))
    return tmp_path


@pytest.fixture
def images(tmp_path):
    """Two images a split, nothing else."""
    for split in ("train", "val"):
        for name in ("a.jpg", "b.png"):
            standins.save(tmp_path / "folder/imgs" / split / name, IMAGE)
    return tmp_path


@pytest.mark.parametrize("place", [".", "folder"])
def test_a_labeled_folder(labeled, place):
    dataset = open_dataset("folder", labeled / place, "val")
    assert dataset.names == ["a", "b"] and dataset.has_labels
    assert dataset.classes == Classes(("road", "tree", "car"), ((1, 2, 3), (4, 5, 6), (7, 8, 9)))
    image, label = dataset[1]
    np.testing.assert_array_equal(image.movedim(0, -1), IMAGE)
    assert label.dtype == torch.int64 and label[0].tolist() == [0, 1, 2, -1, -1, 1, 0, 0]


def test_images_alone_have_clusters(images):
    dataset = open_dataset("folder", images, "train")
    assert not dataset.has_labels and dataset.label(0) is None
    assert dataset.classes.names == tuple(f"cluster {i}" for i in range(27))
    experiment = Experiment.preset("folder", data_root=str(images), n_classes=3)
    assert len(open_split(experiment, "train").classes) == len(open_training_set(experiment).classes) == 3


def test_names_without_labels_and_n_classes(images, scenes_root):
    (images / "folder/classes.json").write_text('{"names": ["road", "tree"]}')
    assert open_dataset("folder", images, "train").classes.names == ("road", "tree")
    assert len(open_dataset("folder", images, "train", n_classes=2).classes) == 2
    for name, root in (("folder", images), ("scenes", scenes_root)):
        with pytest.raises(StegoError, match="n_classes"):
            open_dataset(name, root, "train", n_classes=5)


@pytest.mark.parametrize("place", ["folder", "."])
def test_just_images_serve_as_both_splits(tmp_path, place):
    for i in range(3):
        standins.save(tmp_path / place / f"{i}.jpg", IMAGE)
    (tmp_path / place / "notes.txt").write_text("no image")
    standins.save(tmp_path / place / "._0.jpg", IMAGE)
    train = open_dataset("folder", tmp_path, "train")
    with pytest.warns(Notice, match="training and validation"):
        val = open_dataset("folder", tmp_path, "val")
    assert train.images == val.images == [tmp_path / place / f"{i}.jpg" for i in range(3)]


@pytest.mark.parametrize("place", ["", "imgs/train"])
def test_folders_without_images_say_what_they_hold(tmp_path, place):
    for name in ("a.heic", "b.heic"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / name).touch()
    standins.save(tmp_path / place / "more/c.png", IMAGE)
    with pytest.raises(StegoError, match=r"2 \.heic, 1 images in subfolders"):
        open_dataset("folder", tmp_path, "train")
    with pytest.raises(StegoError, match="does not exist"):
        list_images(tmp_path / "nowhere")
    (tmp_path / "b.png").mkdir()  # a folder called like an image
    standins.save(tmp_path / "a.png", IMAGE)
    assert list_images(tmp_path) == [tmp_path / "a.png"]


@pytest.mark.parametrize("place", ["", "imgs/val"])
def test_the_rules_of_the_folder_that_an_image_lies_in(tmp_path, place):
    path, deep = tmp_path / place / "a.png", IMAGE[..., 0].astype(np.uint16) * 16
    standins.save(path, deep)
    (tmp_path / "classes.json").write_text('{"range": [0, 4080]}')
    np.testing.assert_array_equal(as_tensor(path, Rules(range=(0, 1)))[0][0], IMAGE[..., 0])
    (tmp_path / "classes.json").unlink()
    np.testing.assert_array_equal(as_tensor(path, Rules(range=(0, 4080)))[0][0], IMAGE[..., 0])


def test_labels_of_one_split_need_names_for_both(images):
    for name in "ab":
        standins.save(images / f"folder/labels/val/{name}.png", STORED)
    for split in ("train", "val"):
        with pytest.raises(StegoError, match=r"classes\.json"):
            open_dataset("folder", images, split)
    (images / "folder/classes.json").write_text(json.dumps(NAMES))
    assert [open_dataset("folder", images, split).has_labels for split in ("train", "val")] == [False, True]


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda folder: (folder / "labels/train/b.png").unlink(), r"1 of 2 label maps.*b\.png"),
        (lambda folder: standins.save(folder / "imgs/train/b.jpg", IMAGE), r"b\.png and b\.jpg"),
    ],
    ids=["missing", "twin"],
)
def test_files_that_contradict_each_other(labeled, spoil, said):
    spoil(labeled / "folder")
    with pytest.raises(StegoError, match=said):
        open_dataset("folder", labeled, "train")


def test_a_missing_folder(tmp_path):
    with pytest.raises(DataNotFound, match="imgs/train") as caught:
        open_dataset("folder", tmp_path, "train")
    assert str((tmp_path / "folder").resolve()) in str(caught.value) and isinstance(caught.value, FileNotFoundError)


def test_identity_changes_with_the_files_and_the_rules(labeled):
    def identity():
        dataset = open_dataset("folder", labeled, "train")
        return [dataset.listing(), dataset.settings(labels=True)]

    seen = [identity()]
    assert identity() == seen[0]
    standins.save(labeled / "folder/labels/train/a.png", STORED[:, ::-1])
    seen.append(identity())
    (labeled / "folder/classes.json").write_text(json.dumps(NAMES | {"exif": "ignore"}))
    seen.append(identity())
    assert all(seen.count(one) == 1 for one in seen)


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", "3", '{"names": []}', '{"names": "road"}', '{"names": ["a", 3]}', '{"names": ["a", "A "]}',
        '{"names": [""]}', '{"names": ["a\\nb"]}', '{"names": ["no class"]}', '{"names": ["a"], "colors": 5}',
        '{"names": ["a", "b"], "colors": [[1, 2, 3]]}', '{"names": ["a"], "colors": [[1, 2, 256]]}',
        '{"names": ["a"], "colors": [[0.5, 2, 3]]}', '{"names": ["a"], "color": []}', '{"names": ["a"], "range": [1]}',
        '{"names": ["a"], "range": [5, 5]}', '{"names": ["a"], "exif": "no"}',
    ],
)  # fmt: skip
def test_wrong_classes_files_are_named(tmp_path, content):
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(StegoError, match=r"classes\.json"):
        read_classes(tmp_path / "classes.json")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_classes_files_are_utf_8(tmp_path, encoding):
    (tmp_path / "classes.json").write_text('{"names": ["Straße", "树"]}', encoding=encoding)
    classes = read_classes(tmp_path / "classes.json")
    assert classes.names == ("Straße", "树") and len(set(classes.colors)) == 2
    (tmp_path / "classes.json").write_text('{"names": ["Straße"]}', encoding="utf-16")
    with pytest.raises(StegoError, match="UTF-8"):
        read_classes(tmp_path / "classes.json")


def test_rules_survive_writing_and_need_no_names(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text('{"names": ["a"], "range": [-1000, 3000.5], "exif": "ignore"}')
    classes = read_classes(path)
    write_classes(tmp_path / "again.json", classes)
    assert read_classes(tmp_path / "again.json") == classes and classes.rules == Rules((-1000, 3000.5), "ignore")
    path.write_text('{"range": [0, 4095]}')
    unnamed = read_classes(path, cluster_classes(4))
    assert len(unnamed) == 4 and unnamed.rules.range == (0, 4095)
