"""Features computed on the fly, by one process or several."""

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..utils import devices
from .base import Features
from .store import Reader, Source, Store, StoredFeatures


class OnlineFeatures(StoredFeatures):
    """Features computed on the fly, from images read in threads; only `pooled` is stored.

    They are rounded to float16 like stored features, and equal them up to rounding.
    """

    kind = "online"

    def __init__(self, source: Source, root: Path):
        super().__init__(source)
        self._root = root
        self._images, self._labels = (Reader(read, source.dataset.pieces) for read in (source.image, source.label))
        if not source.mirror:  # the pooled features of mirrored images are not used
            self.store  # noqa: B018

    @cached_property
    def store(self) -> Store:  # type: ignore[override]
        return self._open()

    def _open(self) -> Store:
        """Computes mean features, fingerprints and class pixels in one pass over the images."""
        store = Store(self.source, self._root, "pooled")
        store.complete({}, lambda features, samples: {})
        return store

    def rows(self, index: Tensor, device: torch.device | str = "cpu") -> Tensor:
        unique, position = index.unique(return_inverse=True)
        maps = [self.source.features(self.image_rows(rows), rows.tolist()) for rows in unique.split(self.source.batch)]
        return torch.cat([features.half().to(device) for features in maps])[position.to(device)].float()

    def stored_labels(self, index: Tensor) -> Tensor:
        return torch.stack(self._labels.take(index.tolist()))

    def image_rows(self, index: Tensor) -> Tensor:
        return torch.stack(self._images.take(index.tolist()))

    def prefetch(self, index: Tensor) -> None:
        self._images.prefetch(index.unique().tolist())

    def shared(self) -> Features:
        return self if devices.count() == 1 else SharedFeatures(self)


class SharedFeatures(Features):
    """Online features for several processes that read the same rows; each computes a part of them."""

    def __init__(self, features: OnlineFeatures):
        self._features, self.kind = features, features.kind
        self.name, self.shape, self.image_size = features.name, features.shape, features.image_size
        self.has_labels, self.n_classes = features.has_labels, features.n_classes
        self.fingerprints, self.class_pixels = features.fingerprints, features.class_pixels
        self.pooled = features.pooled

    def rows(self, index: Tensor, device: torch.device | str = "cpu") -> Tensor:
        unique, position = index.unique(return_inverse=True)
        own = devices.share(unique)
        at = self._features.source.backbone.device  # NCCL only exchanges GPU tensors
        rows = self._features.rows(own, at) if len(own) else torch.empty(0, *self.shape[1:], device=at)
        return devices.gather(rows).to(device)[position.to(device)]

    def stored_labels(self, index: Tensor) -> Tensor:
        return self._features.stored_labels(index)

    def image_rows(self, index: Tensor) -> Tensor:
        return self._features.image_rows(index)

    def prefetch(self, index: Tensor) -> None:
        self._features.prefetch(devices.share(index.unique()))
