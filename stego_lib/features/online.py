"""Frozen features computed at the moment they are asked for, and the choice between that and a store."""

import shutil
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..backbone import Backbone
from ..datasets import SegmentationDataset
from ..datasets.transforms import Size
from ..runtime.files import explained
from ..runtime.notices import notice
from ..runtime.paths import user_path
from .extraction import missing_bytes, usual_batch
from .prefetch import ReadAhead
from .source import Source
from .store import Features, ensure, open_store, store_folder

DISK_SHARE = 0.8
"""Part of a disk's free room up to which a store is made where nobody says whether to make one."""


class OnlineFeatures(Features):
    """Features that are computed when they are asked for, from images read in threads. Nothing is kept on disk but `pooled`.

    The numbers are those of the store, rounded to float16 as there; as a batch may be composed otherwise, the last bit may
    differ. An image asked for twice in one call goes through the backbone once.
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
    def pooled(self) -> Tensor:
        """float32 (N, C), features averaged over positions: computed once, kept in a small folder like a store's."""
        source = self._source
        name = f"{source.dataset.name}-{source.dataset.split}-mean-{source.fingerprint(self._root, 'pooled')}"
        shapes = {"pooled": source.shapes["pooled"]}
        return torch.from_numpy(np.load(ensure(source, self._root / name, shapes) / "pooled.npy"))

    def rows(self, index: Tensor, device: torch.device | str = "cpu") -> Tensor:
        wanted, place = index.unique(return_inverse=True)
        found = []
        for rows in wanted.split(self._batch):
            images = torch.stack(self._images.take(rows.tolist()))
            found.append(self._source.features(images, rows.tolist()).half().to(device))
        return torch.cat(found)[place.to(device)].float()

    def stored_labels(self, index: Tensor) -> Tensor:
        return torch.stack(self._labels.take(index.tolist()))

    def image_rows(self, index: Tensor) -> Tensor:
        return torch.stack(self._images.take(index.tolist()))

    def prefetch(self, index: Tensor) -> None:
        self._images.prefetch(index.unique().tolist())


def open_features(
    dataset: SegmentationDataset,
    backbone: Backbone,
    size: Size,
    root: str | Path,
    feature_store: str = "auto",
    *,
    mirror: bool = False,
    published: bool = False,
) -> Features:
    """Features of `dataset` at `size`: from a store below `root`, or computed when asked for.

    feature_store: 'store' (see `open_store`), 'online', or 'auto': the store that is there, a new one if it takes at most `DISK_SHARE`
    of the free disk, else online, and a notice says so. Raises StegoError as `open_store` does.
    """
    source = Source(dataset, backbone, size, mirror, published)
    if feature_store == "auto":
        feature_store = choose_store(source, root)
    if feature_store == "online":
        return OnlineFeatures(source, root)
    return open_store(dataset, backbone, size, root, mirror=mirror, published=published)


def choose_store(source: Source, root: str | Path) -> Literal["store", "online"]:
    """'store' if there is one or room for one, else 'online', with a notice."""
    root, folder = user_path(root), store_folder(source, root)
    needed = missing_bytes(folder, source.shapes)
    with explained(root):
        root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if folder.exists() or needed <= DISK_SHARE * free:
        return "store"
    notice(
        f"the features of {source} are computed anew whenever they are needed (feature_store='online'), which is slow: a store "
        f"takes {needed / 1e9:.1f} GB, {root} has {free / 1e9:.1f} GB free; name a larger disk with runs_dir to have one"
    )
    return "online"
