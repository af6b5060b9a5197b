"""Frozen features, stored on disk or computed on the fly."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.errors import check_choice
from ..utils.fields import Size
from ..utils.paths import user_path
from .base import Features

if TYPE_CHECKING:
    from ..backbone import Backbone
    from ..datasets.base import SegmentationDataset

__all__ = ["Features", "open_features"]


def open_features(
    dataset: "SegmentationDataset", backbone: "Backbone", size: Size, root: str | Path, store: str = "full", *,
    mirror: bool = False, published: bool = False,
) -> Features:  # fmt: skip
    """Opens stored features of a split, or computes them on the fly. Extracts missing features.

    Processes started by torchrun or srun share the extraction; all of them must call this function.

    Parameters
    ----------
    dataset, backbone, size
        Images, network, and image size in pixels.
    root
        Parent folder of all stores.
    store
        What to store: "full", features, images and label maps, 2 C h w + 4 H W bytes per image; "compact", principal
        components of the features in 8 bits; "online", only the mean feature of each image.
    mirror
        Compute features of horizontally flipped images. Images and labels are not flipped.
    published
        Resize images as the published code does, see `resize_image`.

    Raises
    ------
    StegoError
        If the disk is too small, or an image or label map cannot be used. Finished shards are kept.

    Examples
    --------
    >>> scenes, backbone = open_dataset("scenes", "data", "val"), Backbone("scenes_vit_tiny8")
    >>> open_features(scenes, backbone, 128, "runs/features").rows(torch.tensor([0, 5])).shape
    torch.Size([2, 192, 16, 16])
    """
    from .compact import CompactFeatures
    from .online import OnlineFeatures
    from .store import FullFeatures, Source

    kinds: dict[str, Any] = {"full": FullFeatures, "compact": CompactFeatures, "online": OnlineFeatures}
    check_choice("store", store, kinds)
    return kinds[store](Source(dataset, backbone, size, mirror, published), user_path(root))
