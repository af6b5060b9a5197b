"""Cityscapes with the paper's 27 classes (the usual benchmark has 19 of them)."""

from pathlib import Path

import numpy as np

from ..utils.errors import StegoError
from .base import IGNORED, SegmentationDataset
from .classes import Classes, Finding, refuse_ids
from .formats import Rules
from .layout import check_split, find_folder, visible

FIRST_ID = 7
"""Cityscapes id of class 0; ids below it are ignored, and so is -1 (license plate)."""
CLASSES = Classes(
    (
        "road", "sidewalk", "parking", "rail track", "building", "wall", "fence", "guard rail", "bridge", "tunnel",
        "pole", "polegroup", "traffic light", "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car",
        "truck", "bus", "caravan", "trailer", "train", "motorcycle", "bicycle",
    ),
    (
        (128, 64, 128), (244, 35, 232), (250, 170, 160), (230, 150, 140), (70, 70, 70), (102, 102, 156), (190, 153, 153),
        (180, 165, 180), (150, 100, 100), (150, 120, 90), (153, 153, 153), (110, 110, 110), (250, 170, 30), (220, 220, 0),
        (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70),
        (0, 60, 100), (0, 0, 90), (0, 0, 110), (0, 80, 100), (0, 0, 230), (119, 11, 32),
    ),
)  # fmt: skip
TRAIN_IDS = 18
"""The largest id of the usual benchmark's label maps (trainIds), which have 255 where ignored."""
OF_TRAINING = "It is probably a map of trainIds (0 to 18 and 255); take *_gtFine_labelIds.png as published"
COLORED = "Ids above are no class: is it another kind of label map under this name?"
LAYOUT = "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_labelIds.png"
SOURCE = "www.cityscapes-dataset.com, after registration: leftImg8bit_trainvaltest.zip (11 GB) and gtFine_trainvaltest.zip (241 MB)"


class Cityscapes(SegmentationDataset):
    """Label ids are stored as Cityscapes ids; class = id - 7."""

    rules = Rules(exif="ignore")

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """Ids 0 to 6 and -1 (license plate, also stored as 255) are ignored; `published` ignores unknown ids too."""
        last = FIRST_ID + len(CLASSES) - 1
        if not self.published:
            known = (stored >= -1) & (stored <= last) | (stored == 255)
            refuse_ids(stored, known, f"Cityscapes labelIds are 0 to {last}", {-1: COLORED})
            if (stored == 255).any() and not ((stored > TRAIN_IDS) & (stored <= last)).any():
                raise StegoError(f"holds id 255 and none from {TRAIN_IDS + 1} to {last}. {OF_TRAINING}")
        return np.where((stored >= FIRST_ID) & (stored < FIRST_ID + len(CLASSES)), stored - FIRST_ID, IGNORED)

    def doubts(self, ids: np.ndarray) -> list[Finding]:
        if ids[:FIRST_ID].any() and not ids[TRAIN_IDS + 1 : 34].any():
            text = f"no id from {TRAIN_IDS + 1} to 33 (such as 21 vegetation, 23 sky, 26 car) occurs. {OF_TRAINING}"
            return [Finding(text, True)]
        return []


def open_cityscapes(root: str | Path, split: str) -> Cityscapes:
    """Opens root/cityscapes or root itself; splits train (2,975 images of 2048 x 1024) and val (500)."""
    check_split("cityscapes", split)
    folder = find_folder(root, ("cityscapes",), f"leftImg8bit/{split}", LAYOUT, SOURCE)
    found = (folder / "leftImg8bit" / split).glob("*/*_leftImg8bit.png")
    images = sorted(path for path in found if visible(path) and visible(path.parent))
    labels = [
        folder / "gtFine" / split / path.parent.name / path.name.replace("_leftImg8bit", "_gtFine_labelIds")
        for path in images
    ]
    missing = [path for path in labels if not path.exists()]
    if missing or not images:
        other = sorted(missing[0].parent.glob(missing[0].name.replace("_labelIds", "_*"))) if missing else []
        beside = f", beside {', '.join(path.name for path in other)}" if other else ""
        raise StegoError(
            f"{folder}: {len(images)} images, {len(missing)} label maps missing{f', the first is {missing[0]}' if missing else ''}{beside}; {LAYOUT}"
        )
    return Cityscapes("cityscapes", split, CLASSES, images, [*labels])
