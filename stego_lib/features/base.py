"""Features of a split: the interface of all kinds."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

# Value of ignored pixels in stored label maps.
NO_LABEL = 255


class Features(ABC):
    """Features, label maps and images of one split at one size, read by row; a row is an image."""

    kind: str
    """"full", "compact" or "online"."""
    name: str
    """Dataset and split, for messages."""
    shape: tuple[int, int, int, int]
    """(N, C, h, w) of the features."""
    image_size: tuple[int, int]
    """(H, W) of images and label maps."""
    has_labels: bool
    """Whether the label maps hold two classes or more, as a linear probe needs."""
    n_classes: int
    fingerprints: dict[str, str | None]
    """Of the content of the split's images ("images") and label maps ("labels", or None), wherever they lie."""
    class_pixels: list[int] | None
    """Pixels of each class in the label maps at this size; None without labels."""
    pooled: Tensor
    """Features averaged over positions, float32 (N, C)."""

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def mean(self) -> Tensor:
        """Mean feature of the dataset, float32 (C,)."""
        return self.pooled.mean(0, dtype=torch.float64).float()

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

    def prefetch(self, index: Tensor) -> None:  # noqa: B027 (stored features need no preparation)
        """Announces the rows that are needed next."""

    def keep_on(self, device: torch.device, free: int | None = None) -> bool:
        """Copies stored features to a GPU if they fit; returns whether it did. free: bytes, None asks the GPU."""
        return False

    def shared(self) -> "Features":
        """Features whose rows all processes ask for together: of online features each process computes a part."""
        return self
