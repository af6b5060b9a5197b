"""Your own pictures: a folder with imgs/{train,val} and, if you have them, labels/{train,val} and classes.json."""

import colorsys
from pathlib import Path

import numpy as np

from ..errors import StegoError
from ..files import read_json
from .base import Classes, SegmentationDataset, check_split, find_folder, list_pictures, pair_by_stem

LAYOUT = (
    "imgs/train/*.jpg and imgs/val/*.jpg (or .png, ...); for scores also labels/train/*.png and labels/val/*.png "
    "(8-bit class ids, 255 = ignore) and classes.json"
)


def open_folder(root: str | Path, split: str, name: str = "folder") -> SegmentationDataset:
    """Opens root/NAME, or root itself, in the layout above.

    classes.json: {"names": [...], "colors": [[r, g, b], ...]}; colours are optional. Raises DataNotFound, or StegoError
    where files contradict each other.
    """
    check_split(name, split)
    folder = find_folder(root, (name,), f"imgs/{split}", LAYOUT, "your own pictures, in that layout")
    pictures = list_pictures(folder / "imgs" / split)
    if not pictures:
        raise StegoError(f"{folder / 'imgs' / split} holds no picture; put .jpg or .png files there")
    label_folder = folder / "labels" / split
    labels = pair_by_stem(pictures, label_folder) if label_folder.is_dir() else [None] * len(pictures)
    return SegmentationDataset(name, split, read_classes(folder / "classes.json"), pictures, labels)


def read_classes(path: Path) -> Classes:
    """Reads class names and colours; StegoError says what is missing."""
    if not path.exists():
        raise StegoError(
            f'{path} is missing; it names the classes: {{"names": ["road", "tree"], "colors": [[90, 90, 90], [30, 140, 40]]}} (colours optional)'
        )
    content = read_json(path)
    if not isinstance(content, dict) or not content.get("names"):
        raise StegoError(f'{path} must hold {{"names": [...]}} with one name at least')
    names = tuple(str(name) for name in content["names"])
    return Classes(names, tuple(tuple(color) for color in content.get("colors") or distinct_colors(len(names))))


def distinct_colors(count: int) -> list[tuple[int, int, int]]:
    """`count` colours that differ in hue and brightness, (R, G, B)."""
    hues = (np.arange(count) * 0.618034) % 1
    values = 0.55 + 0.45 * ((np.arange(count) * 0.381966 + 0.3) % 1)
    return [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(h, 0.65, v)) for h, v in zip(hues, values, strict=True)]
