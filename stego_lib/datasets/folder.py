"""Your own images: a folder with imgs/{train,val} and, if you have them, labels/{train,val} and classes.json."""

import colorsys
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..utils.errors import DataNotFound, StegoError, did_you_mean
from ..utils.files import read_json, write_json
from ..utils.notices import notice
from ..utils.paths import user_path
from .base import SegmentationDataset
from .classes import Classes
from .findings import skipped_files
from .formats import Rules
from .layout import check_split, find_folder, list_images, pair_by_stem

LAYOUT = (
    "imgs/train/*.jpg and imgs/val/*.jpg (or .png, ...), or just the images, if you have no labels; for scores also "
    "labels/train/*.png and labels/val/*.png (8-bit class ids, 255 = ignore) and classes.json (names of the classes)"
)
N_CLASSES = 27
"""Default number of clusters, without labels, classes.json or `n_classes`."""


def open_folder(
    root: str | Path, split: str, name: str = "folder", n_classes: int | None = None
) -> SegmentationDataset:
    """Opens root/NAME, or root itself, in the layout above.

    classes.json: {"names": [...], "colors": [[r, g, b], ...]}, see `read_classes`; colors are optional. It is needed where
    there are labels; without either, the classes are `n_classes` (None: `N_CLASSES`) without_names ones, "cluster 0" and so on. A folder that holds
    images and no imgs/train serves unlabeled: both splits are all of its images, and opening "val" says so. Raises
    DataNotFound, or StegoError where files contradict each other: an image without its label map among labeled ones, two
    images of one name.
    """
    check_split(name, split)
    plain = _plain_folder(user_path(root), name)
    try:
        folder = plain or find_folder(root, (name,), f"imgs/{split}", LAYOUT, "your own images, in that layout")
    except DataNotFound as error:
        there = [folder for folder in (user_path(root) / name, user_path(root)) if folder.is_dir()]
        beside = [f"  but: {finding.text}" for folder in there for finding in skipped_files(folder)]
        raise DataNotFound("\n".join([str(error), *beside])) from None
    source = plain or folder / "imgs" / split
    images = list_images(source)
    if not images:
        also = "".join(f". {finding.text}" for finding in skipped_files(source))
        raise StegoError(f"{source} holds no image; put .jpg or .png files there{also}")
    twins = [path.name for path, next_ in pairwise(sorted(images, key=lambda p: p.stem)) if path.stem == next_.stem]
    if twins:
        raise StegoError(
            f"{source}: {twins[0]} and another image differ in their ending only; rename one, or if one of them is a label "
            f"map, move it to {folder / 'labels' / split}"
        )
    label_folder = folder / "labels" / split
    labels: list[Path | None] = pair_by_stem(images, label_folder) if label_folder.is_dir() else [None] * len(images)
    unnamed = None if (folder / "labels").exists() else cluster_classes(n_classes or N_CLASSES)
    classes = read_classes(folder / "classes.json", unnamed)
    if plain and split == "val":
        notice(f"{plain} has no imgs/train and imgs/val: its {len(images)} images serve as both, none is held out")
    return SegmentationDataset(name, split, classes, images, labels)


def _plain_folder(root: Path, name: str) -> Path | None:
    """The first of root/NAME and root that holds images itself, if neither has the splits."""
    candidates = (root / name, root)
    if any((folder / "imgs" / split).exists() for folder in candidates for split in ("train", "val")):
        return None
    found = next((folder for folder in candidates if folder.is_dir() and list_images(folder)), None)
    if found and (found / "labels").exists():
        raise StegoError(f"{found} has labels, but no imgs/train and imgs/val; the layout: {LAYOUT}")
    return found


def cluster_classes(count: int) -> Classes:
    """`count` classes without names, for images without labels."""
    return Classes(tuple(f"cluster {i}" for i in range(count)), tuple(distinct_colors(count)))


def without_names(classes: Classes) -> bool:
    """Whether the classes are numbers without names."""
    return all(re.fullmatch(r"(cluster|class) \d+", name) for name in classes.names)


KEYS = frozenset({"names", "colors", "range", "exif"})
"""Keys of classes.json; other keys count as remarks, unless they resemble one of these."""


def read_classes(path: Path, unnamed: Classes | None = None) -> Classes:
    """Reads classes.json: what the classes are called and how the images of a folder are read.

    Parameters
    ----------
    path
        A JSON file: {"names": [...], "colors": [[r, g, b], ...], "range": [low, high], "exif": "apply" or "ignore"}; all but
        the names are optional. range: stored values of black and white, for grayscale of more than 8 bits. exif: whether
        images are turned as their EXIF orientation says (the default), or taken as stored.
    unnamed
        The classes where the file, or names in it, are missing; None if names are needed.

    Raises
    ------
    StegoError
        Says what is missing or wrong.
    """
    if not path.exists():
        if unnamed is not None:
            return unnamed
        raise StegoError(
            f'{path} is missing; it names the classes: {{"names": ["road", "tree"], "colors": [[90, 90, 90], [30, 140, 40]]}} (colors optional)'
        )
    content = read_json(path)
    if not isinstance(content, dict):
        raise StegoError(f'{path} must hold {{"names": [...]}} with one name at least')
    for key in content.keys() - KEYS:
        if guess := did_you_mean(str(key).casefold(), list(KEYS)):
            raise StegoError(f"{path}: unknown key {key!r}{guess}; it may hold {', '.join(sorted(KEYS))}")
    rules = _read_rules(path, content)
    if "names" not in content and unnamed is not None:
        return replace(unnamed, rules=rules)
    names = content.get("names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise StegoError(f'{path} must hold {{"names": [...]}} with one name at least')
    colors = content.get("colors") or distinct_colors(len(names))
    if not isinstance(colors, list):
        raise StegoError(f"{path}: 'colors' must be a list with a color for each name")
    for color in colors:
        whole = isinstance(color, list | tuple) and len(color) == 3 and all(isinstance(c, int) for c in color)
        if not whole or not all(0 <= c <= 255 for c in color):
            raise StegoError(f"{path}: {color!r} is no color; a color is [red, green, blue], each 0 to 255")
    try:
        return Classes(tuple(names), tuple((r, g, b) for r, g, b in colors), rules)
    except StegoError as error:
        raise StegoError(f"{path}: {error}") from None


def _read_rules(path: Path, content: dict[str, Any]) -> Rules:
    limits, exif = content.get("range"), content.get("exif")
    if exif not in (None, "apply", "ignore"):
        raise StegoError(f'{path}: "exif" is "apply" (turn images as their EXIF data say) or "ignore", not {exif!r}')
    if limits is None:
        return Rules(exif=exif)
    numbers = isinstance(limits, list) and len(limits) == 2 and all(type(end) in (int, float) for end in limits)
    if not numbers or not -math.inf < limits[0] < limits[1] < math.inf:
        raise StegoError(
            f'{path}: "range" is [LOW, HIGH], the stored values that become black and white, not {limits!r}'
        )
    return Rules((limits[0], limits[1]), exif)


def write_classes(path: Path, classes: Classes) -> None:
    """Writes what `read_classes` reads."""
    rules = {key: value for key, value in asdict(classes.rules).items() if value is not None}
    write_json(path, {"names": classes.names, "colors": classes.colors, **rules})


def distinct_colors(count: int) -> list[tuple[int, int, int]]:
    """`count` colors, (R, G, B): hues in steps of the golden ratio, in turn strong or pale, and bright, medium or dark."""
    strong = [colorsys.hsv_to_rgb(i * 0.618034 % 1, (0.9, 0.5)[i % 2], (1.0, 0.75, 0.5)[i % 3]) for i in range(count)]
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in strong]


def distinct_names(names: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """Unique names: a name that repeats, or is in `taken`, is followed by its id, as in "food (id 11)"."""
    counts = Counter(name.casefold() for name in (*taken, *names))
    found = [name if counts[name.casefold()] == 1 else f"{name} (id {i})" for i, name in enumerate(names)]
    return found if found == list(names) else distinct_names(found, taken)


def muted_colors(count: int) -> list[tuple[int, int, int]]:
    """`count` colors, (R, G, B), for clusters that stand for no class: `distinct_colors` mixed with gray."""
    return [(80 + 3 * red // 8, 80 + 3 * green // 8, 80 + 3 * blue // 8) for red, green, blue in distinct_colors(count)]
