"""The door to features: `open_features`, from a store on disk or computed on demand."""

import shutil
from pathlib import Path
from typing import Literal

from ..backbone import Backbone
from ..datasets import SegmentationDataset
from ..datasets.transforms import Size
from ..runtime.files import disk_errors
from ..runtime.notices import notice
from ..runtime.paths import user_path
from .extraction import ensure, missing_bytes
from .online import OnlineFeatures
from .source import Source
from .store import Features, FeatureStore

DISK_SHARE = 0.8
"""Part of the free disk up to which feature_store="auto" makes a store."""


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
    """Features of `dataset` at `size`: from a store below `root`, or computed on demand.

    feature_store: 'store' (see `open_store`), 'online', or 'auto': a store that exists or fits into `DISK_SHARE` of the free
    disk, else online with a notice. Other parameters and errors: as in `open_store`.
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
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if folder.exists() or needed <= DISK_SHARE * free:
        return "store"
    notice(
        f"the features of {source} are computed anew whenever they are needed (feature_store='online'), which is slow: a store "
        f"takes {needed / 1e9:.1f} GB, {root} has {free / 1e9:.1f} GB free; name a larger disk with runs_dir to have one"
    )
    return "online"


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
    """The store of `dataset` at `size` below `root`; computed now if it is missing or damaged, see `extraction.build`.

    Parameters
    ----------
    dataset, backbone, size
        Images, network, and size in pixels.
    root
        Folder of stores. A store's name is a fingerprint of files, size, resampling, weights and precision, so a stale store
        is never used; checksums reveal a damaged one.
    mirror
        Features of the horizontally flipped images; labels and images are stored as they are.
    published
        Resize images as the published code does, see `resize_image`.
    batch
        Images that go through the backbone at once.

    Raises
    ------
    StegoError
        Before computing, if the disk is too small, and for images and label maps that cannot be used.
    """
    source = Source(dataset, backbone, size, mirror, published)
    return FeatureStore(ensure(source, store_folder(source, root), source.shapes, batch))


def store_folder(source: Source, root: str | Path) -> Path:
    """Where the store of `source` lies below `root`, whether it exists or not."""
    return user_path(root) / f"{source.dataset.name}-{source.dataset.split}-{source.fingerprint(root)}"
