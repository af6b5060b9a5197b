"""Frozen features computed on demand."""

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .extraction import ensure, usual_batch
from .prefetch import ReadAhead
from .source import Source
from .store import Features


class OnlineFeatures(Features):
    """Features computed on demand, from images read in threads; only `pooled` is kept on disk.

    They are rounded to float16 like stored ones, and differ from these by rounding at most, as batches have other rows. An
    image that occurs twice in one call goes through the backbone once.
    """

    def __init__(self, source: Source, root: str | Path):
        shapes = source.shapes
        _, self.shape = shapes["features"]  # type: ignore[assignment]  # of four
        self.image_size = shapes["images"][1][2:]  # type: ignore[assignment]  # of two
        self.name, self.has_labels = str(source), "labels" in shapes
        self.n_classes = len(source.dataset.classes)
        self._source, self._root = source, Path(root)
        self._images = ReadAhead(source.image, source.dataset.images)
        self._labels = ReadAhead(source.label, source.dataset.images)
        self._batch = usual_batch(source.backbone)

    @cached_property
    def pooled_folder(self) -> Path:  # type: ignore[override]  # computed when it is asked for
        """Where pooled features lie: they are computed once, and kept in a small store."""
        source = self._source
        name = f"{source.dataset.name}-{source.dataset.split}-mean-{source.fingerprint(self._root, 'pooled')}"
        shapes = {"pooled": source.shapes["pooled"]}
        return ensure(source, self._root / name, shapes)

    def rows(self, index: Tensor, device: torch.device | str = "cpu") -> Tensor:
        wanted, position = index.unique(return_inverse=True)
        found = []
        for rows in wanted.split(self._batch):
            images = torch.stack(self._images.take(rows.tolist()))
            found.append(self._source.features(images, rows.tolist()).half().to(device))
        return torch.cat(found)[position.to(device)].float()

    def stored_labels(self, index: Tensor) -> Tensor:
        return torch.stack(self._labels.take(index.tolist()))

    def image_rows(self, index: Tensor) -> Tensor:
        return torch.stack(self._images.take(index.tolist()))

    def prefetch(self, index: Tensor) -> None:
        self._images.prefetch(index.unique().tolist())
