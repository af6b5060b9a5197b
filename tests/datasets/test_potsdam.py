"""Potsdam-3: the published .mat patches, and raw tiles of the real size cut by this project."""

import shutil

import numpy as np
import pytest
import scipy.io
import standins
import torch
from PIL import Image

from stego_lib import StegoError, open_dataset
from stego_lib.datasets import potsdam
from stego_lib.datasets.potsdam import TILES, cut_tiles, decode_colors
from stego_lib.utils.notices import Notice

CLASS_OF = {0: 0, 1: 1, 2: 2, 3: 2, 4: 0, 5: 1}
"""Paper: roads and cars, buildings and clutter, vegetation and trees."""


@pytest.fixture
def patches(tmp_path):
    standins.potsdam_patches(tmp_path, train=3, val=2, unlabeled=2)
    return tmp_path


def test_the_lists_decide_the_splits(patches):
    names = {split: open_dataset("potsdam3", patches, split).names for split in ("train", "val", "all")}
    assert names["train"] == ["100", "101", "102"] and names["val"] == ["103", "104"] and len(names["all"]) == 7


def test_infrared_is_dropped_and_the_classes_are_merged(patches):
    dataset = open_dataset("potsdam3", patches, "train")
    assert dataset.has_labels and len(dataset.classes) == 3
    image, label = dataset[1]
    stored = scipy.io.loadmat(patches / "potsdam/imgs/101.mat")["img"]
    assert stored.shape == (200, 200, 4) and image.dtype == torch.uint8
    np.testing.assert_array_equal(image, stored[..., :3].transpose(2, 0, 1))
    fine = scipy.io.loadmat(patches / "potsdam/gt/101.mat")["gt"]
    assert label.dtype == torch.int64
    np.testing.assert_array_equal(label, np.vectorize(CLASS_OF.get)(fine))


def test_255_is_ignored_and_unknown_ids_are_refused(patches):
    stored = np.resize([0, 1, 2, 3, 4, 5, 255], (200, 200))
    scipy.io.savemat(patches / "potsdam/gt/100.mat", {"gt": stored.astype(np.int32)})
    assert open_dataset("potsdam3", patches, "train").label(0)[0, :7].tolist() == [0, 1, 2, 2, 0, 1, -1]
    scipy.io.savemat(patches / "potsdam/gt/100.mat", {"gt": (stored + 1).astype(np.int32)})
    with pytest.raises(StegoError, match=r"gt/100\.mat .*id 6, 256"):
        open_dataset("potsdam3", patches, "train").label(0)


def test_published_labels_make_unknown_ids_class_0_and_leave_255_and_missing_maps_ignored(patches):
    stored = np.resize([0, 1, 2, 3, 4, 5, 6, 254, 255, -1], (200, 200))
    scipy.io.savemat(patches / "potsdam/gt/100.mat", {"gt": stored.astype(np.int32)})
    dataset = open_dataset("potsdam3", patches, "all", published=True)
    assert dataset.label(0)[0, :10].tolist() == [0, 1, 2, 2, 0, 1, 0, 0, -1, 0]
    assert (dataset.label(6) == -1).all()


def test_a_patch_without_label_map_is_ignored_not_class_0(patches):
    """In "all" only: the labeled lists promise a label map."""
    dataset = open_dataset("potsdam3", patches, "all")
    assert dataset.has_labels and (dataset.label(6) == -1).all() and dataset.label(6).shape == (200, 200)
    assert (dataset.label(0) >= 0).all()
    (patches / "potsdam/gt/103.mat").unlink()
    with pytest.raises(StegoError, match=r"1 of 2 label maps.*103\.mat"):
        open_dataset("potsdam3", patches, "val")


def test_a_broken_patch_is_named(patches):
    folder = patches / "potsdam/imgs"
    (folder / "100.mat").write_bytes(b"no MATLAB file" * 20)
    scipy.io.savemat(folder / "101.mat", {"other": np.zeros(3)})
    for number in (0, 1):
        with pytest.raises(StegoError, match=rf"imgs/10{number}.mat"):
            open_dataset("potsdam3", patches, "train").image(number)


def test_every_patch_is_in_its_place(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "potsdam"
    raw, fine = rng.integers(0, 256, (800, 1200, 3), dtype=np.uint8), rng.integers(0, 6, (800, 1200))
    standins.save(folder / "2_Ortho_RGB/top_potsdam_7_13_RGB.tif", raw)
    standins.save(folder / "5_Labels_all/top_potsdam_7_13_label.tif", np.array(potsdam.COLORS, np.uint8)[fine])
    (patches,) = cut_tiles(folder, ("7_13",))
    assert len(list((patches / "imgs").iterdir())) == 6 == len(list((patches / "gt").iterdir()))
    mean = raw.reshape(400, 2, 600, 2, 3).mean((1, 3))
    for row, column in np.ndindex(2, 3):
        place = np.s_[200 * row : 200 * row + 200, 200 * column : 200 * column + 200]
        with Image.open(patches / f"imgs/7_13_{row:02d}_{column:02d}.png") as file:
            assert np.abs(np.asarray(file) - mean[place]).max() <= 0.5
        with Image.open(patches / f"gt/7_13_{row:02d}_{column:02d}.png") as file:
            np.testing.assert_array_equal(file, fine[::2, ::2][place])


def test_the_colors_are_those_of_the_benchmark():
    white, blue, cyan, green = (255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0)
    yellow, red, black, magenta, almost = (255, 255, 0), (255, 0, 0), (0, 0, 0), (255, 0, 255), (254, 0, 0)
    colored = np.array([[white, blue, cyan, green, yellow, red, black, magenta, almost]], np.uint8)
    assert decode_colors(colored).tolist() == [[0, 1, 2, 3, 4, 5, 255, 255, 255]]


def test_colors_of_no_class_give_a_notice_and_raw_tiles_may_be_removed(tmp_path):
    for tile in TILES["val"]:
        standins.potsdam_tile(tmp_path, tile, 400)
    standins.save(tmp_path / "potsdam/5_Labels_all/top_potsdam_2_12_label.tif", np.full((400, 400, 3), 7, np.uint8))
    with pytest.warns(Notice, match="2_12.*100.0 %"):
        dataset = open_dataset("potsdam3", tmp_path, "val")
    assert (dataset.label(0) == -1).all() and not (dataset.label(1) == -1).all()
    shutil.rmtree(tmp_path / "potsdam/2_Ortho_RGB")
    with pytest.raises(StegoError, match="potsdam"):
        open_dataset("potsdam3", tmp_path, "train")
    (tmp_path / "potsdam/2_Ortho_RGB").mkdir()
    assert len(open_dataset("potsdam3", tmp_path, "val")) == 4, "patches are enough"


def test_a_tile_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    standins.potsdam_tile(tmp_path, "2_12", 400)
    monkeypatch.setattr(Image.Image, "save", lambda *args, **options: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        cut_tiles(tmp_path / "potsdam", ("2_12",))
    assert list((tmp_path / "potsdam/patches").iterdir()) == []


def test_a_tile_that_another_process_has_cut_meanwhile_is_used(tmp_path, monkeypatch):
    standins.potsdam_tile(tmp_path, "2_12", 400)
    read = potsdam.read_image

    def slowly(path):
        monkeypatch.setattr(potsdam, "read_image", read)
        cut_tiles(tmp_path / "potsdam", ("2_12",))  # the other process
        return read(path)

    monkeypatch.setattr(potsdam, "read_image", slowly)
    (patches,) = cut_tiles(tmp_path / "potsdam", ("2_12",))
    assert len(list((patches / "imgs").iterdir())) == 1 and list(patches.parent.iterdir()) == [patches]


def test_whole_tiles_are_held_out():
    """20 and 4 of the 24 tiles that were labeled in the published data, 38 in all."""
    assert (len(TILES["train"]), len(TILES["val"]), len(set(TILES["all"]))) == (20, 4, 38)
    assert not set(TILES["train"]) & set(TILES["val"]) and {*TILES["train"], *TILES["val"]} < set(TILES["all"])


def test_all_tiles_without_the_labels_of_some(tmp_path):
    for tile in TILES["all"]:
        standins.potsdam_tile(tmp_path, tile, 400, labeled=tile in (*TILES["train"], *TILES["val"]))
    dataset = open_dataset("potsdam3", tmp_path, "all")
    assert len(dataset) == 38 and dataset.has_labels
    ignored = [dataset.names[i] for i in range(38) if (dataset.label(i) == -1).all()]
    assert len(ignored) == 14 and "7_13_00_00" in ignored


def test_missing_and_unfit_tiles_are_named(tmp_path):
    folder = tmp_path / "potsdam"
    for tile in TILES["val"][1:]:
        standins.potsdam_tile(tmp_path, tile, 400)
    with pytest.raises(StegoError, match=r"1 of 4 .*2_12_RGB\.tif"):
        open_dataset("potsdam3", tmp_path, "val")
    standins.potsdam_tile(tmp_path, "2_12", 400, labeled=False)
    with pytest.raises(StegoError, match=r"top_potsdam_2_12_label\.tif"):
        open_dataset("potsdam3", tmp_path, "val")
    standins.save(folder / "5_Labels_all/top_potsdam_2_12_label.tif", np.zeros((400, 800, 3), np.uint8))
    with pytest.raises(StegoError, match="6000 x 6000"):
        open_dataset("potsdam3", tmp_path, "val")
    standins.save(folder / "2_Ortho_RGB/top_potsdam_2_12_RGB.tif", np.zeros((400, 500, 3), np.uint8))
    with pytest.raises(StegoError, match="6000 x 6000"):
        open_dataset("potsdam3", tmp_path, "val")
