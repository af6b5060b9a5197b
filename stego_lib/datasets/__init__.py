"""Data sets: `open_dataset` is the way in."""

from collections.abc import Callable
from pathlib import Path

from ..errors import StegoError
from ..experiment import did_you_mean
from .base import IGNORED, Classes, SegmentationDataset
from .camvid import open_camvid
from .cityscapes import open_cityscapes
from .crops import FiveCrop
from .folder import open_folder
from .scenes import open_scenes

__all__ = ["DATASETS", "IGNORED", "Classes", "FiveCrop", "SegmentationDataset", "open_dataset"]

DATASETS: dict[str, Callable[[str | Path, str], SegmentationDataset]] = {
    "scenes": open_scenes,
    "camvid": open_camvid,
    "cityscapes": open_cityscapes,
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
