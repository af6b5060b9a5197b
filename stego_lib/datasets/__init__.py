"""Datasets: `open_dataset` is the way in."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..experiment import Experiment
from ..utils.errors import StegoError, did_you_mean
from ..utils.paths import user_path
from .base import IGNORED, SegmentationDataset
from .camvid import open_camvid
from .cityscapes import open_cityscapes
from .classes import Classes
from .cocostuff import open_cocostuff
from .crops import FiveCrop, RandomCrop, write_crops
from .folder import open_folder
from .potsdam import open_potsdam3
from .scenes import open_scenes

__all__ = [
    "CROPS",
    "DATASETS",
    "IGNORED",
    "Classes",
    "FiveCrop",
    "RandomCrop",
    "SegmentationDataset",
    "open_dataset",
    "open_split",
    "open_training_set",
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


CROPS = {"five": FiveCrop, "random": RandomCrop}
"""The crops that an experiment can ask for."""


def open_dataset(
    name: str, root: str | Path, split: str, n_classes: int | None = None, published: bool = False
) -> SegmentationDataset:
    """Opens a split of a dataset.

    Parameters
    ----------
    name
        A key of `DATASETS`.
    root
        Folder that holds the folders of the datasets.
    split
        "train", "val" or, where the dataset has it, "test".
    n_classes
        Clusters to look for in a `folder` that names no classes.
    published
        Decode labels as the published code does: COCO-Stuff and Potsdam map unknown ids to class 0.

    Raises
    ------
    StegoError
        For an unknown name or split, and for `n_classes` that are not the dataset's own.
    DataNotFound
        A StegoError for missing files: it says where it looked, what belongs there and where to get it.

    Examples
    --------
    >>> image, label = open_dataset("scenes", "data", "val")[0]
    """
    if name not in DATASETS:
        raise StegoError(
            f"unknown dataset {name!r}{did_you_mean(name, list(DATASETS))}; datasets: {', '.join(DATASETS)}"
        )
    root = user_path(root)
    dataset = open_folder(root, split, n_classes=n_classes) if name == "folder" else DATASETS[name](root, split)
    if n_classes not in (None, len(dataset.classes)):
        raise StegoError(
            f"n_classes is {n_classes}, but {name} has {len(dataset.classes)} classes of its own: leave n_classes out "
            "(extra_clusters looks for more clusters than classes)"
        )
    dataset.published = published
    return dataset


def open_split(experiment: Experiment, split: str) -> SegmentationDataset:
    """Opens split `split` of the experiment's dataset, whole images (training may cut them, see `CROPS`)."""
    return open_dataset(
        experiment.dataset, experiment.data_root, split, experiment.n_classes, published=experiment.official.published
    )


def open_training_set(experiment: Experiment) -> SegmentationDataset:
    """The training split of an experiment, cropped if it says so."""
    dataset = open_split(experiment, "train")
    return dataset if experiment.crop == "none" else CROPS[experiment.crop](dataset)
