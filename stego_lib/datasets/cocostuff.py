"""COCO-Stuff with the paper's 27 coarse classes, and its smaller versions with 15 and 3 classes."""

from pathlib import Path

import numpy as np

from ..utils.errors import check_choice
from ..utils.files import read_json, read_text
from .base import IGNORED, UNKNOWN, SegmentationDataset
from .classes import Classes, Rules, distinct_colors
from .layout import check_files, find_folder, pair_by_stem

# Names of the 27 coarse classes, and the coarse class of each stored id.
TABLE = read_json(Path(__file__).with_name("cocostuff27.json"))
COLORS = distinct_colors(len(TABLE["names"]))
FINE, FEW = "Coco164kFull_Stuff_Coarse_7.txt", "Coco164kFew_Stuff_6.txt"
LAYOUT = (
    "images/{train2017,val2017}/ID.jpg, annotations/{train2017,val2017}/ID.png (stuffthingmaps) and "
    "curated/{train2017,val2017}/LIST.txt"
)
SOURCE = "public: python -m stego_lib.datasets prepare NAME --root FOLDER (20 GB)"
# Dataset -> coarse class of each of its classes.
COARSE = {"cocostuff27": tuple(range(27)), "cocostuff15": tuple(range(12, 27)), "cocostuff3": (23, 22, 21)}
# A class has the same color in all three datasets.
CLASSES = {
    name: Classes(tuple(TABLE["names"][c] for c in coarse), tuple(COLORS[c] for c in coarse))
    for name, coarse in COARSE.items()
}
# Dataset -> lists of image ids for training, of which the first existing one is used; the last is for validation too.
LISTS = {"cocostuff27": ("Coco164kFull_Stuff_Coarse.txt", FINE), "cocostuff15": (FINE,), "cocostuff3": (FEW,)}


class CocoStuff(SegmentationDataset):
    """Label maps hold COCO-Stuff ids, which start at 0."""

    rules = Rules(exif="ignore")
    expected_ids = (
        "stuffthingmaps have ids 0 to 181, and 255 where unlabeled. Use stuffthingmaps_trainval2017.zip, not the "
        "stuff-only pixelmaps"
    )

    def label_table(self) -> np.ndarray:
        """`published` maps unknown ids below 255 to coarse class 0 and ignores ids beyond a byte."""
        coarse = COARSE[self.name]
        table = np.full(257, UNKNOWN)
        if self.published:
            table[:] = coarse.index(0) if 0 in coarse else IGNORED
            table[256] = IGNORED
        for stored, class_ in enumerate(TABLE["fine_to_coarse"]):
            table[stored] = coarse.index(class_) if class_ in coarse else IGNORED
        table[255] = IGNORED
        return table


def load(name: str, root: str | Path, split: str) -> CocoStuff:
    """Opens root/cocostuff or root itself as "cocostuff27", "cocostuff15" or "cocostuff3".

    A list of ids defines the images of a split. cocostuff27 trains on `Coco164kFull_Stuff_Coarse.txt` (97,702 images)
    if it exists, as the authors' code does, otherwise on `..._Coarse_7.txt` (49,629); validation is `..._Coarse_7.txt`
    (2,175). cocostuff15 uses the `_7` lists and the 15 stuff classes (coarse 12 to 26); cocostuff3 uses
    `Coco164kFew_Stuff_6.txt` and sky, plant, ground. Pixels of other classes are ignored.
    """
    check_choice("split", split, ("train", "val"))
    year, names = f"{split}2017", LISTS[name] if split == "train" else LISTS[name][-1:]
    source = SOURCE.replace("NAME", name)
    folder = find_folder(root, ("cocostuff", name), (f"curated/{year}",), LAYOUT, source)
    lists = [folder / "curated" / year / list_ for list_ in names]
    path = next((path for path in lists if path.exists()), lists[0])
    check_files([path], "lists of images")
    images = [folder / "images" / year / f"{id_}.jpg" for id_ in read_text(path).split()]
    check_files([*images], "images")
    return CocoStuff(name, split, CLASSES[name], images, pair_by_stem(images, folder / "annotations" / year))
