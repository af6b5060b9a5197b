"""Frozen features: extracted once and kept on disk, or computed on demand."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.errors import StegoError
from ..utils.fields import Size
from ..utils.paths import user_path
from .base import Features

if TYPE_CHECKING:
    from ..backbone import Backbone
    from ..datasets.base import SegmentationDataset

__all__ = ["Features", "open_features"]


def open_features(
    dataset: "SegmentationDataset",
    backbone: "Backbone",
    size: Size,
    root: str | Path,
    store: str = "full",
    *,
    mirror: bool = False,
    published: bool = False,
    verify: bool = False,
) -> Features:
    """Opens stored features of a split, or computes them on the fly. Missing features are extracted now.

    Processes that torchrun or srun has started together share the extraction; all of them must call this.

    Parameters
    ----------
    dataset, backbone, size
        Images, network, and size in pixels.
    root
        Folder of stores.
    store
        "full": features, images and label maps, 2 C h w + 4 H W bytes an image. "compact": principal components of the
        features in 8 bits. "online": nothing but the mean feature of each image.
    mirror
        Features of the horizontally flipped images; labels and images stay as they are.
    published
        Resize images as the published code does, see `resize_image`.
    verify
        Compare all stored arrays with their checksums; damaged ones are computed again.

    Raises
    ------
    StegoError
        If the disk is too small, or for an image or label map that cannot be used. Finished parts are kept.

    Examples
    --------
    >>> scenes, backbone = open_dataset("scenes", "data", "val"), Backbone("scenes_vit_tiny8")
    >>> open_features(scenes, backbone, 128, "runs/features").rows(torch.tensor([0, 5])).shape
    torch.Size([2, 192, 16, 16])
    """
    from .compact import CompactFeatures
    from .online import OnlineFeatures
    from .store import FullFeatures, Source

    kinds: dict[str, Callable[..., Features]]
    kinds = {"full": FullFeatures, "compact": CompactFeatures, "online": OnlineFeatures}
    if store not in kinds:
        raise StegoError(f"store is {store!r}. Choose {', '.join(kinds)}.")
    source = Source(dataset, backbone, size, mirror, published)
    return kinds[store](source, user_path(root), verify)
