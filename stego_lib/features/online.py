"""Features computed on the fly, by one process or several."""

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..utils import devices
from .base import Features
from .store import Reader, Source, Store


class OnlineFeatures(Features):
    """Features computed on the fly, from images read in threads; only `pooled` is stored.

    They are rounded to float16 like stored features, and equal them up to rounding.
    """

    kind = "online"
    # Whether each process computes a part of the rows.
    shared = False

    def __init__(self, source: Source, root: Path):
        super().__init__(source, root)
        self._images, self._labels = (Reader(read, source.dataset.pieces) for read in (source.image, source.label))
        if not source.mirror:  # the pooled features of mirrored images are not used
            self.store  # noqa: B018

    @cached_property
    def store(self) -> Store:  # type: ignore[override]
        """Mean features, fingerprints and class pixels, computed in one pass over the images."""
        store = Store(self.source, self.root, "pooled")
        store.complete({}, lambda features, samples: {})
        return store

    def rows(self, index: Tensor, device: torch.device | str = "cpu") -> Tensor:
        unique, position = index.unique(return_inverse=True)
        own = devices.share(unique) if self.shared else unique
        batches = own.split(self.source.batch) if len(own) else ()
        parts = [self.source.features(self.image_rows(rows)) for rows in batches]
        if self.shared:  # NCCL only exchanges GPU tensors
            none = torch.empty(0, *self.shape[1:], device=self.source.backbone.device)
            parts = [devices.gather(torch.cat([none, *parts]))]
        return torch.cat([features.half().to(device) for features in parts])[position.to(device)].float()

    def stored_labels(self, index: Tensor) -> Tensor:
        return torch.stack(self._labels.take(index.tolist()))

    def image_rows(self, index: Tensor) -> Tensor:
        return torch.stack(self._images.take(index.tolist()))

    def prefetch(self, index: Tensor) -> None:
        unique = index.unique()
        self._images.prefetch((devices.share(unique) if self.shared else unique).tolist())

    def share(self) -> None:
        self.shared = devices.count() > 1
