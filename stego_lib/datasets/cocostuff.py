"""COCO-Stuff with the paper's 27 coarse classes, and its two smaller forms of 15 and 3 classes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..utils.errors import check_choice
from ..utils.files import read_json, read_text
from .base import IGNORED, UNKNOWN, SegmentationDataset
from .classes import Classes, Rules, distinct_colors
from .layout import check_files, find_folder, pair_by_stem

# Names of the 27 coarse classes ("food" and "furniture" occur as things and as stuff), and the class of each stored id.
TABLE = read_json(Path(__file__).with_name("cocostuff27.json"))
COLORS = distinct_colors(len(TABLE["names"]))
# Ids that no file of the dataset holds: gaps in COCO's list of things.
UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
FINE = "Coco164kFull_Stuff_Coarse_7.txt"
LAYOUT = (
    "images/{train2017,val2017}/ID.jpg, annotations/{train2017,val2017}/ID.png (stuffthingmaps) and "
    "curated/{train2017,val2017}/LIST.txt"
)
SOURCE = "public: python -m stego_lib.datasets prepare NAME --root FOLDER (20 GB)"


@dataclass(frozen=True)
class Form:
    """How the three datasets differ."""

    coarse: tuple[int, ...]
    """The coarse class behind each class."""
    lists: dict[str, tuple[str, ...]]
    """Split -> names of its list of image ids; the first that exists counts."""

    @property
    def classes(self) -> Classes:
        """Names and colors; a class has the same color in every form."""
        return Classes(tuple(TABLE["names"][c] for c in self.coarse), tuple(COLORS[c] for c in self.coarse))


FORMS = {
    "cocostuff27": Form(tuple(range(27)), {"train": ("Coco164kFull_Stuff_Coarse.txt", FINE), "val": (FINE,)}),
    "cocostuff15": Form(tuple(range(12, 27)), {"train": (FINE,), "val": (FINE,)}),
    "cocostuff3": Form((23, 22, 21), dict.fromkeys(("train", "val"), ("Coco164kFew_Stuff_6.txt",))),
}


class CocoStuff(SegmentationDataset):
    """Label maps hold COCO-Stuff ids from 0; a table gives their coarse class."""

    rules = Rules(exif="ignore")
    release = (
        "stuffthingmaps have ids 0 to 181, and 255 where unlabeled. Take stuffthingmaps_trainval2017.zip (the "
        "stuff-only pixelmaps have ids up to 183), or subtract 1 if ids start at 1"
    )

    def label_table(self) -> np.ndarray:
        """`published` makes unknown ids below 255 coarse class 0, and ignores all that no byte holds."""
        coarse = FORMS[self.name].coarse
        table = np.full(257, UNKNOWN)
        if self.published:
            table[:] = coarse.index(0) if 0 in coarse else IGNORED
            table[256] = IGNORED
        for stored, class_ in enumerate(TABLE["fine_to_coarse"]):
            table[stored] = coarse.index(class_) if class_ in coarse else IGNORED
        table[255] = IGNORED
        return table

    def doubt(self, ids: np.ndarray) -> str:
        wrong = [id_ for id_ in UNUSED if ids[id_]]
        return f"id {wrong[0]} occurs, which stuffthingmaps do not use: do ids start at 1?" if wrong else ""


def load(name: str, root: str | Path, split: str) -> CocoStuff:
    """Opens root/cocostuff or root itself as "cocostuff27", "cocostuff15" or "cocostuff3".

    The images of a split are those of a list of ids. cocostuff27 trains on `Coco164kFull_Stuff_Coarse.txt` (97,702 ids)
    if it exists, as the authors' code does, else on `..._Coarse_7.txt` (49,629), and is scored on the 2,175 of
    `..._Coarse_7.txt`. cocostuff15 uses the `_7` lists and the 15 stuff classes (coarse 12 to 26); cocostuff3 uses
    `Coco164kFew_Stuff_6.txt` and sky, plant, ground. Pixels of all other classes are ignored.
    """
    check_choice("split", split, ("train", "val"))
    form, year = FORMS[name], f"{split}2017"
    source = SOURCE.replace("NAME", name)
    folder = find_folder(root, ("cocostuff", name), (f"curated/{year}",), LAYOUT, source)
    lists = [folder / "curated" / year / list_ for list_ in form.lists[split]]
    path = next((path for path in lists if path.exists()), lists[0])
    check_files([path], "lists of images")
    images = [folder / "images" / year / f"{id_}.jpg" for id_ in read_text(path).split()]
    check_files([*images], "images")
    return CocoStuff(name, split, form.classes, images, pair_by_stem(images, folder / "annotations" / year))
