"""Frozen features of a data set, computed once and kept on disk."""

import math
import os
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from .backbone import Backbone
from .datasets import SegmentationDataset
from .datasets.intact import refuse_broken
from .datasets.transforms import Size, resize_label, resize_picture
from .errors import StegoError, brief
from .files import checksum, explained, fingerprint, locked, read_json, write_json
from .memory import enough_memory
from .notices import notice
from .progress import progress

Shapes = dict[str, tuple[type, tuple[int, ...]]]
"""Name -> type and shape of an array."""
VERSION = 3
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
        self.pooled = torch.from_numpy(np.array(np.load(folder / "pooled.npy", mmap_mode="r")))
        self.labels: Any = np.load(folder / "labels.npy", mmap_mode="r") if self.about["labels"] else None

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
    """The store of `dataset` at `size` below `root`; computed now if it is not there yet, or damaged.

    `mirror` gives the features of the mirrored pictures (labels and pictures are stored as they are). `published` brings
    pictures to their size as the published code does, see `resize_picture`. The folder's name is a fingerprint of files,
    size, resampling, backbone weights and precision, so a stale store is never taken for a fresh one; checksums tell a
    damaged one. Of two processes that ask for the same store, one computes and the other waits.
    Raises StegoError, before computing, when the disk is too small and for pictures and label maps that cannot be used.
    """
    shapes = _shapes(dataset, backbone, size)
    key = fingerprint(VERSION, dataset.identity(), size, mirror, published, backbone.fingerprint())
    folder = Path(root) / f"{dataset.name}-{dataset.split}-{key}"
    if damage(folder, shapes):
        with explained(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        busy = f"another process computes the features of {dataset.name} {dataset.split}; waiting for them"
        with locked(folder.with_name(f".{folder.name}.lock"), busy, wait=True):
            if reason := damage(folder, shapes):  # else: the other process has computed them
                if folder.exists():
                    notice(f"{folder} is damaged ({reason}); its features are computed anew")
                    shutil.rmtree(folder)
                fill = partial(_fill, dataset, backbone, size, shapes, mirror, published, batch)
                _build(folder, dataset, shapes, fill)
    return FeatureStore(folder)


def damage(folder: Path, shapes: Shapes) -> str | None:
    """What is wrong with the store in `folder`, None if nothing: files missing or of other shapes, other checksums."""
    try:
        sums = read_json(folder / "about.json")["sha256"]
        for name, (dtype, shape) in shapes.items():
            path = folder / f"{name}.npy"
            array = np.load(path, mmap_mode="r")
            if (array.dtype, array.shape) != (dtype, shape):
                return f"{path.name} holds {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}"
            state = path.stat()
            if _checksum(path, state.st_ino, state.st_size, state.st_mtime_ns) != sums[name]:
                return f"{path.name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except Exception as error:  # numpy's reader raises whatever it stumbles over
        return brief(error)
    return None


@cache
def _checksum(path: Path, *_state: int) -> str:
    """Computed once a process and state of the file: a store is read from end to end for it."""
    return checksum(path)


def _shapes(dataset: SegmentationDataset, backbone: Backbone, size: Size) -> Shapes:
    """Type and shape of each array of a store."""
    height, width = (size, size) if isinstance(size, int) else size
    count = len(dataset)
    shapes: Shapes = {
        "features": (np.float16, (count, backbone.dim, *backbone.grid(height, width))),
        "pictures": (np.uint8, (count, 3, height, width)),
        "pooled": (np.float32, (count, backbone.dim)),
    }
    return shapes | {"labels": (np.uint8, (count, height, width))} if dataset.has_labels else shapes


def _build(folder: Path, dataset: SegmentationDataset, shapes: Shapes, fill: Callable[[Path], None]) -> None:
    """Lets `fill` compute the store beside `folder`, which appears when all is written."""
    unfinished = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    try:
        with explained(folder):
            _check_space(folder.parent, dataset, shapes)
            refuse_broken(dataset)
            unfinished.mkdir()
            fill(unfinished)
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _check_space(root: Path, dataset: SegmentationDataset, shapes: Shapes) -> None:
    if dataset.has_labels and len(dataset.classes) > NO_LABEL:
        raise StegoError(f"{dataset.name} has {len(dataset.classes)} classes; {NO_LABEL} at most can be stored")
    needed = sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in shapes.values())
    free = shutil.disk_usage(root).free
    if needed > 0.95 * free:
        raise StegoError(
            f"the features of {dataset.name} {dataset.split} take {needed / 1e9:.1f} GB, {root.parent} has {free / 1e9:.1f} GB free; name a larger disk with runs_dir"
        )


def _fill(
    dataset: SegmentationDataset,
    backbone: Backbone,
    size: Size,
    shapes: Shapes,
    mirror: bool,
    published: bool,
    batch: int,
    folder: Path,
) -> None:
    """Computes the arrays of a store and writes them, and about.json last, into the empty `folder`."""
    arrays = {name: _reserve(folder / f"{name}.npy", *shape) for name, shape in shapes.items()}
    what = f"features of {dataset.name} {dataset.split}{' (mirrored)' if mirror else ''}"
    for rows in progress(torch.arange(len(dataset)).split(batch), what):
        for row in rows.tolist():
            picture, label = dataset[row]
            arrays["pictures"][row] = resize_picture(picture, size, published).numpy()
            if label is not None and "labels" in arrays:
                resized = resize_label(label, size)
                arrays["labels"][row] = resized.masked_fill(resized < 0, NO_LABEL).numpy()
        images = torch.from_numpy(arrays["pictures"][rows.numpy()])
        with enough_memory(what, "choose a smaller train_size or eval_size, precision='bfloat16' or device='cpu'"):
            found = backbone(images.flip(-1) if mirror else images).cpu()
        _refuse_infinite(found.half(), [dataset.pictures[row] for row in rows.tolist()], backbone)
        arrays["features"][rows.numpy()] = found.numpy()
        arrays["pooled"][rows.numpy()] = found.mean((2, 3)).numpy()
    for array in arrays.values():
        array.flush()
    about = {
        "dataset": dataset.name,
        "split": dataset.split,
        "backbone": backbone.name,
        "precision": str(backbone.precision),
        "mirror": mirror,
        "labels": dataset.has_labels,
        "n_classes": len(dataset.classes),
        "sha256": {name: checksum(folder / f"{name}.npy") for name in arrays},
    }
    write_json(folder / "about.json", about)


def _reserve(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    """An array in a new file whose room on the disk is taken at once: a mapped file that finds none later kills the process."""
    array = open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _refuse_infinite(features: Tensor, pictures: list[Path], backbone: Backbone) -> None:
    bad = ~features.isfinite().flatten(1).all(1)
    if bad.any():
        first = pictures[int(bad.nonzero()[0])]
        raise StegoError(
            f"backbone {backbone.name!r} gives {first} features that are not finite numbers, or too large to be stored; "
            "are its weights damaged? try precision='float32' or another backbone"
        )
