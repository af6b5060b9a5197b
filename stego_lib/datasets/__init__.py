"""Datasets, opened with `open_dataset`."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ..experiment import Experiment
from ..utils.errors import StegoError, check_choice
from ..utils.paths import user_path
from .classes import Classes

if TYPE_CHECKING:
    from .base import SegmentationDataset

__all__ = ["DATASETS", "Classes", "list_datasets", "open_dataset", "open_split", "open_training_set"]

# Name -> the module that opens it, imported on use.
DATASETS = {
    "scenes": "scenes",
    "camvid": "camvid",
    "cityscapes": "cityscapes",
    "cocostuff27": "cocostuff",
    "cocostuff15": "cocostuff",
    "cocostuff3": "cocostuff",
    "potsdam3": "potsdam",
    "labelmefacade": "labelmefacade",
    "folder": "folder",
}


def list_datasets() -> list[str]:
    """Names for `open_dataset`, whether their files are here or not.

    Examples
    --------
    >>> list_datasets()[-1]
    'folder'
    """
    return list(DATASETS)


def open_dataset(
    name: str, root: str | Path, split: str, n_classes: int | None = None, published: bool = False
) -> "SegmentationDataset":
    """Opens a split of a dataset.

    Parameters
    ----------
    name
        A key of `DATASETS`.
    root
        Parent folder of the datasets.
    split
        "train", "val" or, if the dataset has it, "test".
    n_classes
        Number of clusters for a `folder` that names no classes.
    published
        Decode labels as the authors' code does: COCO-Stuff and Potsdam map unknown ids to class 0.

    Returns
    -------
    SegmentationDataset
        A sequence of pairs: image, uint8 (3, H, W), and label, int64 (H, W) with -1 where ignored, or None.

    Raises
    ------
    StegoError
        For an unknown name or split, unreadable files, and a wrong `n_classes`.
    DataNotFound
        A StegoError for missing files, with the expected location and how to get them.

    Examples
    --------
    >>> image, label = open_dataset("scenes", "data", "val")[0]
    """
    check_choice("dataset", name, DATASETS)
    options = {"n_classes": n_classes} if name == "folder" else {}
    dataset = import_module(f".{DATASETS[name]}", __name__).load(name, user_path(root), split, **options)
    if n_classes not in (None, len(dataset.classes)):
        raise StegoError(
            f"n_classes is {n_classes}, but {name} has {len(dataset.classes)} classes. Leave n_classes out, or use "
            "extra_clusters for more clusters."
        )
    dataset.published = published
    return dataset


def open_split(experiment: Experiment, split: str) -> "SegmentationDataset":
    """Opens a split of the experiment's dataset, without cropping."""
    place = experiment.dataset, Path(experiment.data_root), split
    return open_dataset(*place, experiment.n_classes, published=experiment.official.published)


def open_training_set(experiment: Experiment) -> "SegmentationDataset":
    """Opens the training split of the experiment's dataset, cropped according to `Experiment.crop`."""
    dataset = open_split(experiment, "train")
    if experiment.crop == "none":
        return dataset
    from .crops import FiveCrop, RandomCrop, Tiles

    if experiment.crop == "tiles":
        return Tiles(dataset, experiment.train_size)
    return FiveCrop(dataset) if experiment.crop == "five" else RandomCrop(dataset)
