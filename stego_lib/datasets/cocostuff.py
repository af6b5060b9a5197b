"""COCO-Stuff with the paper's 27 coarse classes, and its two smaller forms of 15 and 3 classes."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from ..utils.errors import StegoError
from ..utils.files import read_json, read_text
from ..utils.notices import notice
from .base import IGNORED, SegmentationDataset
from .classes import Classes, Finding, listed, refuse_ids
from .folder import distinct_colors
from .formats import Rules
from .layout import check_split, find_folder, pair_by_stem

TABLE = read_json(Path(__file__).with_name("cocostuff27.json"))
"""Names of the 27 coarse classes ("food" and "furniture" occur as things and as stuff), and the class of each stored id."""
COLORS = distinct_colors(len(TABLE["names"]))
UNLABELED = 255
"""Stored id of pixels without a label."""
UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
"""Ids that no file of the dataset holds: COCO's list of things has these gaps."""
SISTERS = {
    183: "Id 183 (other) and 92 to 182 are those of the stuff-only pixelmaps; take stuffthingmaps_trainval2017.zip",
    182: "The ids seem to start at 1: subtract 1, with 255 where 0 stands for unlabeled; or take stuffthingmaps_trainval2017.zip",
    -1: "Take stuffthingmaps_trainval2017.zip",
}
"""Unknown id -> the release of the dataset that probably uses it."""
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
    """Split -> file names of its list of ids; the first that exists counts."""


FORMS = {
    "cocostuff27": Form(tuple(range(27)), {"train": ("Coco164kFull_Stuff_Coarse.txt", FINE), "val": (FINE,)}),
    "cocostuff15": Form(tuple(range(12, 27)), {"train": (FINE,), "val": (FINE,)}),
    "cocostuff3": Form((23, 22, 21), dict.fromkeys(("train", "val"), ("Coco164kFew_Stuff_6.txt",))),
}


class CocoStuff(SegmentationDataset):
    """Label maps hold COCO-Stuff ids, 0-based; `decode` looks their class up."""

    rules = Rules(exif="ignore")

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """StegoError for ids that the table does not know; `published` makes those below 255 coarse class 0, as published."""
        if not self.published:
            known = (stored >= 0) & (stored < len(TABLE["fine_to_coarse"])) | (stored == UNLABELED)
            refuse_ids(stored, known, "stuffthingmaps have ids 0 to 181, and 255 where unlabeled", SISTERS)
        form = FORMS[self.name]
        table = lookup_table(form.coarse, form.coarse.index(0) if self.published and 0 in form.coarse else IGNORED)
        return table[np.where((stored >= 0) & (stored < len(table)), stored, UNLABELED)]

    def doubts(self, ids: np.ndarray) -> list[Finding]:
        if found := [id_ for id_ in UNUSED if ids[id_]]:
            text = (
                f"id {listed(found)} occurs, which stuffthingmaps do not use: the ids may start at 1 (then subtract 1), "
                "or be those of another release (171 classes)"
            )
            return [Finding(text, True)]
        return []


def open_cocostuff(name: str, root: str | Path, split: str) -> CocoStuff:
    """Opens root/cocostuff or root itself as `name`: "cocostuff27", "cocostuff15" or "cocostuff3".

    The images of a split are those of a list of ids. cocostuff27 trains on `Coco164kFull_Stuff_Coarse.txt`
    (97,702 ids) if it is there, as the published code does, else on `..._Coarse_7.txt` (49,629), and is scored on the
    2,175 of `..._Coarse_7.txt`. cocostuff15 uses the `_7` lists and the 15 stuff classes (coarse 12 to 26); cocostuff3
    uses `Coco164kFew_Stuff_6.txt` and sky, plant, ground. Pixels of all other classes are ignored. Raises DataNotFound,
    or StegoError that names what is missing.
    """
    check_split(name, split)
    form, year = FORMS[name], f"{split}2017"
    folder = find_folder(root, ("cocostuff", name), f"curated/{year}", LAYOUT, SOURCE.replace("NAME", name))
    images = [folder / "images" / year / f"{id_}.jpg" for id_ in read_ids(folder / "curated" / year, form.lists[split])]
    missing = [path for path in images if not path.exists()]
    if missing:
        raise StegoError(f"{len(missing)} of {len(images)} images are missing, the first is {missing[0]}; {LAYOUT}")
    classes = Classes(tuple(TABLE["names"][c] for c in form.coarse), tuple(COLORS[c] for c in form.coarse))
    return CocoStuff(name, split, classes, images, pair_by_stem(images, folder / "annotations" / year))


def read_ids(folder: Path, names: tuple[str, ...]) -> list[str]:
    """The ids, one a line, of the first of the files `names` in `folder`; StegoError if there is none or it is empty."""
    for name in names:
        if (folder / name).exists():
            ids = read_text(folder / name).split()
            if not ids:
                raise StegoError(f"{folder / name} is empty; it lists one image id per line")
            if (twice := len(ids) - len(set(ids))) > 0:
                notice(f"{folder / name} lists {twice} ids again, so these images count more than once")
            return ids
    raise StegoError(f"{folder} holds none of {', '.join(names)}, which list the images; {SOURCE}")


@cache
def lookup_table(coarse: tuple[int, ...], unknown: int = IGNORED) -> np.ndarray:
    """Class of each stored id, int64 (256,): position of its coarse class in `coarse`, or `IGNORED`.

    unknown: the class of ids that have no coarse class at all (182 to 254, which no file of the dataset holds).
    """
    table = np.full(256, unknown)
    table[UNLABELED] = IGNORED
    for stored, class_ in enumerate(TABLE["fine_to_coarse"]):
        table[stored] = coarse.index(class_) if class_ in coarse else IGNORED
    return table
