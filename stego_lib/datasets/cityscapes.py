"""Cityscapes with the paper's 27 classes (the usual benchmark has 19 of them)."""

from pathlib import Path

import numpy as np

from ..utils.errors import StegoError, check_choice
from .base import IGNORED, UNKNOWN, SegmentationDataset
from .classes import Classes, Rules
from .layout import check_files, find_folder, visible

# Cityscapes id of class 0; lower ids and -1 (license plate) are ignored.
FIRST_ID = 7
CLASSES = Classes(
    (
        "road", "sidewalk", "parking", "rail track", "building", "wall", "fence", "guard rail", "bridge", "tunnel",
        "pole", "polegroup", "traffic light", "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car",
        "truck", "bus", "caravan", "trailer", "train", "motorcycle", "bicycle",
    ),
    (
        (128, 64, 128), (244, 35, 232), (250, 170, 160), (230, 150, 140), (70, 70, 70), (102, 102, 156),
        (190, 153, 153), (180, 165, 180), (150, 100, 100), (150, 120, 90), (153, 153, 153), (110, 110, 110),
        (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0),
        (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 0, 90), (0, 0, 110), (0, 80, 100), (0, 0, 230), (119, 11, 32),
    ),
)  # fmt: skip
# The largest trainId of the benchmark; *_labelTrainIds.png hold 0 to 18 and 255.
LAST_TRAIN_ID = 18
LAYOUT = "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_labelIds.png"
SOURCE = (
    "www.cityscapes-dataset.com, after registration: leftImg8bit_trainvaltest.zip (11 GB) and gtFine_trainvaltest.zip "
    "(241 MB)"
)


class Cityscapes(SegmentationDataset):
    """Label maps hold Cityscapes ids; class = id - 7."""

    rules = Rules(exif="ignore")
    expected_ids = "Cityscapes labelIds are 0 to 33. Use *_gtFine_labelIds.png as published"

    def label_table(self) -> np.ndarray:
        """Ignores ids 0 to 6 and -1 (stored as 255), with `published` also unknown ids."""
        last = FIRST_ID + len(CLASSES)
        table = np.full(257, IGNORED)
        table[FIRST_ID:last] = range(len(CLASSES))
        if not self.published:
            table[last:255] = table[256] = UNKNOWN
        return table

    def decode(self, stored: np.ndarray) -> np.ndarray:
        label = super().decode(stored)
        label_ids = (stored > LAST_TRAIN_ID) & (stored < 255)
        if not self.published and (stored == 255).any() and not label_ids.any():
            raise StegoError("contains trainIds (0 to 18 and 255). Use *_gtFine_labelIds.png as published.")
        return label


def load(name: str, root: str | Path, split: str) -> Cityscapes:
    """Opens root/cityscapes or root itself; splits train (2,975 images of 2048 x 1024) and val (500)."""
    check_choice("split", split, ("train", "val"))
    folder = find_folder(root, ("cityscapes",), (f"leftImg8bit/{split}",), LAYOUT, SOURCE)
    paths = (folder / "leftImg8bit" / split).glob("*/*_leftImg8bit.png")
    images = sorted(path for path in paths if visible(path) and visible(path.parent))
    labels: list[Path | None] = [
        folder / "gtFine" / split / path.parent.name / path.name.replace("_leftImg8bit", "_gtFine_labelIds")
        for path in images
    ]
    check_files(labels, "label maps")
    return Cityscapes(name, split, CLASSES, images, labels)
