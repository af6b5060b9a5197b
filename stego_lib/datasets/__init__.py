"""Data sets: `open_dataset` is the way in."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..errors import StegoError
from ..experiment import did_you_mean
from .base import IGNORED, Classes, SegmentationDataset
from .camvid import open_camvid
from .cityscapes import open_cityscapes
from .cocostuff import open_cocostuff
from .crops import FiveCrop, RandomCrop, write_crops
from .folder import open_folder
from .potsdam import open_potsdam3
from .scenes import open_scenes

__all__ = [
    "DATASETS",
    "IGNORED",
    "Classes",
    "FiveCrop",
    "RandomCrop",
    "SegmentationDataset",
    "open_dataset",
    "write_crops",
]

DATASETS: dict[str, Callable[[str | Path, str], SegmentationDataset]] = {
    "scenes": open_scenes,
    "camvid": open_camvid,
    "cityscapes": open_cityscapes,
    "cocostuff27": partial(open_cocostuff, "cocostuff27"),
    "cocostuff15": partial(open_cocostuff, "cocostuff15"),
    "cocostuff3": partial(open_cocostuff, "cocostuff3"),
    "potsdam3": open_potsdam3,
    "folder": open_folder,
}
"""Name -> function that opens a split below a root folder."""


def open_dataset(name: str, root: str | Path, split: str) -> SegmentationDataset:
    """Opens split `split` ("train" or "val") of data set `name` below the folder `root`.

    Raises StegoError for an unknown name or split, and DataNotFound (one of it) when the files are not there; its
    message says where it looked, what belongs there and where to get it.
    """
    if name not in DATASETS:
        raise StegoError(
            f"unknown data set {name!r}{did_you_mean(name, list(DATASETS))}; data sets: {', '.join(DATASETS)}"
        )
    return DATASETS[name](root, split)
