"""Features that several processes compute together."""

import torch
from torch import Tensor

from ..utils import devices
from .store import Features


def shared(features: Features) -> Features:
    """Online features that several processes compute together; stored features, and those of one process, unchanged."""
    return features if devices.count() == 1 or features.kind != "online" else SharedFeatures(features)


class SharedFeatures(Features):
    """Features of which each process computes a part of the rows that all ask for."""

    def __init__(self, features: Features):
        self._features, self.kind = features, features.kind
        self.name, self.shape, self.image_size = features.name, features.shape, features.image_size
        self.has_labels, self.n_classes = features.has_labels, features.n_classes
        self.fingerprints, self.class_pixels = features.fingerprints, features.class_pixels

    def pooled_rows(self, rows: slice | Tensor) -> Tensor:
        return self._features.pooled_rows(rows)

    def rows(self, index: Tensor, device: torch.device | str = "cpu") -> Tensor:
        wanted, position = index.unique(return_inverse=True)
        return devices.gather(self._features.rows(devices.share(wanted), device))[position.to(device)]

    def stored_labels(self, index: Tensor) -> Tensor:
        return self._features.stored_labels(index)

    def image_rows(self, index: Tensor) -> Tensor:
        return self._features.image_rows(index)

    def prefetch(self, index: Tensor) -> None:
        self._features.prefetch(devices.share(index.unique()))
