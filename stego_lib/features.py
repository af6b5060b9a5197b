"""Frozen features of a data set, computed once and kept on disk."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from .backbone import Backbone
from .datasets import SegmentationDataset
from .datasets.transforms import Size, resize_label, resize_picture
from .errors import StegoError
from .files import fingerprint, read_json, write_json
from .progress import progress

VERSION = 2
"""To be raised whenever what is stored changes, so that old stores are not used."""
NO_LABEL = 255
"""How ignored pixels are stored."""


class FeatureStore:
    """Features, label maps and pictures of one data set at one size, memory-mapped.

    features: float16 (N, C, h, w). pooled: float32 (N, C), features averaged over positions. labels: uint8 (N, H, W),
    255 = ignored, or None. pictures: uint8 (N, 3, H, W). Rows are read without loading the rest. Made by `open_store`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.about = read_json(folder / "about.json")
        self.features = np.load(folder / "features.npy", mmap_mode="r")
        self.pictures = np.load(folder / "pictures.npy", mmap_mode="r")
        self.pooled = torch.from_numpy(np.load(folder / "pooled.npy"))
        self.labels = np.load(folder / "labels.npy", mmap_mode="r") if self.about["labels"] else None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def mean(self) -> Tensor:
        """Mean feature of the data set, float32 (C,)."""
        return self.pooled.mean(0)

    def rows(self, index: Tensor) -> Tensor:
        """Features of the pictures `index`, float32 (B, C, h, w)."""
        return torch.from_numpy(self.features[index.numpy()]).float()

    def label_rows(self, index: Tensor) -> Tensor:
        """Label maps of the pictures `index`, int64 (B, H, W), -1 = ignored."""
        label = torch.from_numpy(self.labels[index.numpy()]).long()
        return label.masked_fill(label == NO_LABEL, -1)

    def picture_rows(self, index: Tensor) -> Tensor:
        """The pictures `index` at the store's size, uint8 (B, 3, H, W)."""
        return torch.from_numpy(self.pictures[index.numpy()])


def open_store(
    dataset: SegmentationDataset,
    backbone: Backbone,
    size: Size,
    root: str | Path,
    *,
    mirror: bool = False,
    published: bool = False,
    batch: int = 16,
) -> FeatureStore:
    """The store of `dataset` at `size` below `root`; computed now if it is not there yet.

    `mirror` gives the features of the mirrored pictures (labels and pictures are stored as they are). `published` brings
    pictures to their size as the published code does, see `resize_picture`. The folder's name is a fingerprint of files,
    size, resampling, backbone weights and precision, so a stale store is never taken for a fresh one.
    Raises StegoError when the disk is too small, before computing.
    """
    key = fingerprint(VERSION, dataset.identity(), size, mirror, published, backbone.fingerprint())
    folder = Path(root) / f"{dataset.name}-{dataset.split}-{key}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".features.") as temporary:
            unfinished = Path(temporary) / "store"
            unfinished.mkdir()
            _fill(unfinished, dataset, backbone, size, mirror, published, batch)
            try:
                unfinished.rename(folder)
            except OSError:
                if not folder.exists():  # else: another run stored the same features meanwhile
                    raise
    return FeatureStore(folder)


def _fill(
    folder: Path,
    dataset: SegmentationDataset,
    backbone: Backbone,
    size: Size,
    mirror: bool,
    published: bool,
    batch: int,
) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    count, shape = len(dataset), (backbone.dim, *backbone.grid(height, width))
    with_labels = dataset.has_labels
    if with_labels and len(dataset.classes) > NO_LABEL:
        raise StegoError(f"{dataset.name} has {len(dataset.classes)} classes; {NO_LABEL} at most can be stored")
    needed = count * (2 * int(np.prod(shape)) + (3 + with_labels) * height * width)
    free = shutil.disk_usage(folder).free
    if needed > 0.95 * free:
        raise StegoError(
            f"the features of {dataset.name} {dataset.split} take {needed / 1e9:.1f} GB, {folder.parent.parent} has {free / 1e9:.1f} GB free; name a larger disk with runs_dir"
        )
    features = open_memmap(folder / "features.npy", "w+", np.float16, (count, *shape))
    pictures = open_memmap(folder / "pictures.npy", "w+", np.uint8, (count, 3, height, width))
    labels = open_memmap(folder / "labels.npy", "w+", np.uint8, (count, height, width)) if with_labels else None
    pooled = np.zeros((count, backbone.dim), np.float32)
    what = f"features of {dataset.name} {dataset.split}{' (mirrored)' if mirror else ''}"
    for rows in progress(torch.arange(count).split(batch), what):
        for row in rows.tolist():
            picture, label = dataset[row]
            if label is not None and label.shape != picture.shape[1:]:
                raise StegoError(
                    f"{dataset.pictures[row]} is {tuple(picture.shape[1:])}, its label map {dataset.labels[row]} is {tuple(label.shape)} (height, width); they must agree"
                )
            pictures[row] = resize_picture(picture, size, published).numpy()
            if labels is not None:
                resized = resize_label(label, size)
                labels[row] = resized.masked_fill(resized < 0, NO_LABEL).numpy()
        images = torch.from_numpy(pictures[rows.numpy()])
        found = backbone(images.flip(-1) if mirror else images).cpu()
        features[rows.numpy()] = found.numpy()
        pooled[rows.numpy()] = found.mean((2, 3)).numpy()
    for array in filter(lambda a: a is not None, (features, pictures, labels)):
        array.flush()
    np.save(folder / "pooled.npy", pooled)
    write_json(
        folder / "about.json",
        {
            "dataset": dataset.name,
            "split": dataset.split,
            "backbone": backbone.name,
            "precision": str(backbone.precision),
            "mirror": mirror,
            "labels": with_labels,
            "n_classes": len(dataset.classes),
        },
    )
