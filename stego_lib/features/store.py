"""Frozen features of a dataset: the interface, and the store on disk."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..utils.files import read_json
from .arrays import read_rows
from .pooled import PART, read_pooled
from .source import NO_LABEL

GPU_SHARE = 0.6
"""Part of a GPU's free memory that features may take; the rest is for training."""


class Features(ABC):
    """Features, label maps and images of one dataset at one size, read by row; a row is an image.

    Kept on disk (`FeatureStore`) or computed on demand (`online.OnlineFeatures`), with the same numbers.
    """

    name: str
    """How messages call them."""
    shape: tuple[int, int, int, int]
    """(N, C, h, w) of the features."""
    image_size: tuple[int, int]
    """(H, W) of images and label maps."""
    has_labels: bool
    n_classes: int
    fingerprints: dict[str, str | None]
    """Of the content of the split's images ("images") and label maps ("labels", None without), wherever the files lie."""
    class_pixels: list[int] | None
    """Pixels of each class in the label maps at this size; None without labels."""
    pooled_folder: Path
    """Where the file of pooled features lies."""
    kind: Literal["full", "compact", "online"] = "online"
    """Whether they are kept on disk, as they are or on fewer components, or computed on demand."""

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def pooled(self) -> Tensor:
        """Features averaged over positions, float32 (N, C): all of them in memory."""
        return self.pooled_rows(slice(None))

    def pooled_rows(self, rows: slice | Tensor) -> Tensor:
        """The same of some images, float32 (n, C); these alone are read."""
        return read_pooled(self.pooled_folder, rows)

    def pooled_parts(self) -> Iterator[Tensor]:
        """The same of all images, a part at a time."""
        return (self.pooled_rows(slice(first, first + PART)) for first in range(0, len(self), PART))

    @property
    def mean(self) -> Tensor:
        """Mean feature of the dataset, float32 (C,)."""
        return (sum(part.sum(0, dtype=torch.float64) for part in self.pooled_parts()) / len(self)).float()

    @abstractmethod
    def rows(self, index: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Features of the images `index`, float32 (B, C, h, w), on `device`. They have been rounded to float16."""

    @abstractmethod
    def stored_labels(self, index: Tensor) -> Tensor:
        """Label maps of the images `index`, uint8 (B, H, W), NO_LABEL where ignored."""

    @abstractmethod
    def image_rows(self, index: Tensor) -> Tensor:
        """The images `index` at this size, uint8 (B, 3, H, W)."""

    def label_rows(self, index: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Label maps of the images `index`, int64 (B, H, W), -1 = ignored, on `device`."""
        stored = self.stored_labels(index).to(device)
        return stored.long().masked_fill(stored == NO_LABEL, -1)

    def labels_there(self) -> list[int]:
        """The classes that occur in the labels, in rising order."""
        seen = torch.zeros(256, dtype=torch.bool)
        for rows in torch.arange(len(self)).split(16) if self.has_labels else ():
            seen |= torch.bincount(self.stored_labels(rows).flatten(), minlength=256) > 0
        seen[NO_LABEL] = False
        return seen.nonzero().flatten().tolist()

    def prefetch(self, index: Tensor) -> None:  # noqa: B027 (a store has nothing to prepare)
        """Announces the rows that will be asked for next."""

    def keep_on(self, device: torch.device) -> bool:
        """Copies stored features to a GPU with room for them; says whether it did."""
        return False


def _as_head_reads(stored: Tensor) -> Tensor:
    # Channels last, by one copy: the head's 1 x 1 convolutions are then plain matrix products.
    return stored.to(torch.float32, memory_format=torch.channels_last)


class FeatureStore(Features):
    """Features, label maps and images on disk; rows are read without loading the rest. Made by `opening.open_store`.

    features: float16 (N, C, h, w); labels: uint8 (N, H, W), 255 = ignored, or None; images: uint8 (N, 3, H, W). These three
    are memory-mapped; `rows`, `label_rows` and `image_rows` read the files.
    """

    def __init__(self, folder: Path):
        self.folder, self.pooled_folder, self.name, self.kind = folder, folder, folder.name, "full"
        self.about = read_json(folder / "about.json")
        self.has_labels, self.n_classes = self.about["labels"], self.about["n_classes"]
        self.shape, self.image_size = self.features.shape, self.images.shape[2:]
        self._resident: Tensor | None = None

    @cached_property
    def features(self) -> np.ndarray:
        return np.load(self.folder / "features.npy", mmap_mode="r")

    @cached_property
    def images(self) -> np.ndarray:
        return np.load(self.folder / "images.npy", mmap_mode="r")

    @cached_property
    def labels(self) -> Any:
        return np.load(self.folder / "labels.npy", mmap_mode="r") if self.has_labels else None

    def rows(self, index: Tensor, device: torch.device | str = "cpu") -> Tensor:
        if self._resident is not None and self._resident.device == torch.device(device):
            return _as_head_reads(self._resident[index.to(device)])
        return _as_head_reads(self._read("features", index).to(device))

    def stored_labels(self, index: Tensor) -> Tensor:
        return self._read("labels", index)

    def image_rows(self, index: Tensor) -> Tensor:
        return self._read("images", index)

    def keep_on(self, device: torch.device, free: int | None = None) -> bool:
        """Copies the features to a GPU with room for them; says whether it did.

        free: free bytes of the device; None asks the GPU, and is 0 for a CPU.
        """
        if free is None:
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        if self.features.nbytes > GPU_SHARE * free:
            return False
        try:
            resident = torch.empty(self.shape, dtype=torch.float16, device=device)
            for rows in torch.arange(len(self)).split(64):
                resident[rows[0] : rows[-1] + 1] = self._read("features", rows).to(device)
        except torch.OutOfMemoryError:  # others use the GPU too
            return False
        self._resident = resident
        return True

    def _read(self, name: str, index: Tensor) -> Tensor:
        return torch.from_numpy(read_rows(self.folder / f"{name}.npy", index.tolist()))
