"""Base class of the features of a split."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .store import Source, Store

# Label of ignored pixels in stored label maps.
NO_LABEL = 255


class Features(ABC):
    """Features, label maps and images of one split at one size, indexed by image."""

    kind: str
    """"full", "compact" or "online"."""
    store: "Store"
    # Stored arrays that `keep_on` copies.
    resident: tuple[str, ...] = ()

    def __init__(self, source: "Source", root: Path):
        self.source, self.root = source, root
        self.name, self.shape, self.image_size = str(source), source.shape, source.image_size
        self.n_classes = len(source.dataset.classes)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def folder(self) -> Path:
        """Folder of the store."""
        return self.store.folder

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """Fingerprints of the content of the images ("images") and label maps ("labels", or None)."""
        return self.store.about["fingerprints"]

    @property
    def class_pixels(self) -> list[int] | None:
        """Number of pixels of each class at this size; None without labels."""
        return self.store.about["class_pixels"]

    @property
    def has_labels(self) -> bool:
        """Whether label maps hold at least two classes, which a linear probe needs."""
        return sum(count > 0 for count in self.class_pixels or ()) > 1

    @property
    def pooled(self) -> Tensor:
        """Features averaged over positions, float32 (N, C)."""
        return self.store.read("pooled", torch.arange(len(self)))

    @property
    def mean(self) -> Tensor:
        """Mean feature of the dataset, float32 (C,)."""
        return self.pooled.mean(0, dtype=torch.float64).float()

    @abstractmethod
    def rows(self, index: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Features of the images `index`, float32 (B, C, h, w), rounded to float16, on `device`."""

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

    def prefetch(self, index: Tensor) -> None:  # noqa: B027 (stored features need no preparation)
        """Starts reading images that are needed next."""

    def keep_on(self, device: torch.device, free: int | None = None) -> bool:
        """Copies stored features to a GPU if they fit; returns whether they do. free: bytes, of the GPU by default."""
        return bool(self.resident) and self.store.keep_on(device, self.resident, free)

    def share(self) -> None:  # noqa: B027
        """Divides the computation of rows between the processes, which must then read the same rows together."""
