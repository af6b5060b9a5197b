"""The door to features: `open_features`, from a store on disk, full or compact, or computed on demand."""

from pathlib import Path

import torch

from ..backbone import Backbone
from ..datasets import SegmentationDataset
from ..datasets.transforms import Size
from ..utils.errors import StegoError
from ..utils.paths import user_path
from .compact import CompactFeatures
from .extraction import ensure
from .online import OnlineFeatures
from .source import Source, content_id
from .store import Features, FeatureStore


def open_features(
    dataset: SegmentationDataset,
    backbone: Backbone,
    size: Size,
    root: str | Path,
    store: str = "full",
    *,
    mirror: bool = False,
    published: bool = False,
) -> Features:
    """Features of `dataset` at `size`: from a store below `root`, or computed on demand.

    Parameters
    ----------
    dataset, backbone, size
        Images, network, and size in pixels.
    root
        Folder of stores. A store's name is a fingerprint of files, size, resampling, weights and precision, so a stale
        store is never used; checksums reveal a damaged one, which is computed again.
    store
        'full'; 'compact', on the principal components of a `compact.CompactFeatures`; or 'online'.
    mirror
        Features of the horizontally flipped images; labels and images stay as they are.
    published
        Resize images as the published code does, see `resize_image`.

    Raises
    ------
    StegoError
        For a compact store with `published`. Before computing, if the disk is too small for a store, and for images and label
        maps that cannot be used.

    Examples
    --------
    >>> scenes, backbone = open_dataset("scenes", "data", "val"), Backbone("scenes_vit_tiny8")
    >>> open_features(scenes, backbone, 128, "runs/features").rows(torch.tensor([0, 5])).shape
    torch.Size([2, 192, 16, 16])
    """
    source = Source(dataset, backbone, size, mirror, published)
    features = _open(source, root, store)
    features.fingerprints = {"images": content_id(dataset, root, labels=False), "labels": None}
    features.class_pixels = None
    if features.has_labels:
        features.fingerprints["labels"] = content_id(dataset, root)
        counts = torch.zeros(features.n_classes, dtype=torch.int64)
        for rows in torch.arange(len(features)).split(16):
            labels = features.label_rows(rows)
            counts += torch.bincount(labels[labels >= 0], minlength=features.n_classes)
        features.class_pixels = counts.tolist()
    return features


def _open(source: Source, root: str | Path, store: str) -> Features:
    published = source.published
    if store == "compact":
        if published:
            raise StegoError(
                "published=True stands for published numbers, which a compact store changes: feature_store='full' or 'online'"
            )
        return CompactFeatures(source, user_path(root))
    if store == "online":
        return OnlineFeatures(source, root)
    return _open_store(source, root)


def open_store(
    dataset: SegmentationDataset,
    backbone: Backbone,
    size: Size,
    root: str | Path,
    *,
    mirror: bool = False,
    published: bool = False,
    batch: int | None = None,
) -> FeatureStore:
    """`open_features(..., feature_store="full")`; `batch` images go through the backbone at once."""
    return _open_store(Source(dataset, backbone, size, mirror, published), root, batch)


def _open_store(source: Source, root: str | Path, batch: int | None = None) -> FeatureStore:
    return FeatureStore(ensure(source, store_folder(source, root), source.shapes, batch))


def store_folder(source: Source, root: str | Path) -> Path:
    """Where the store of `source` lies below `root`, whether it exists or not."""
    return user_path(root) / f"{source.dataset.name}-{source.dataset.split}-{source.fingerprint(root)}"
