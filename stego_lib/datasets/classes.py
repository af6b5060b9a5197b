"""The classes of a dataset, and the reader of a folder's classes.json: names, colors, and how its images are read."""

import colorsys
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..utils.errors import StegoError, did_you_mean
from ..utils.files import read_json, write_json

# Keys of classes.json; others are ignored, unless they look like a misspelled one.
KEYS = ("names", "colors", "range", "exif")


@dataclass(frozen=True)
class Rules:
    """How the images of a folder are read."""

    range: tuple[float, float] | None = None
    """Stored values of black and white, for images of more than 8 bits per channel."""
    exif: Literal["apply", "ignore"] | None = None
    """Rotate images by their EXIF orientation, or leave the pixels as stored. None: rotate, with a notice if there are labels."""


DEFAULT = Rules()


@dataclass(frozen=True)
class Classes:
    """Names of the classes and their colors in figures; position = label id."""

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    """(R, G, B) of each class, 0 to 255."""
    rules: Rules = DEFAULT
    """How the images of the folder are read that the names come from."""

    def __post_init__(self) -> None:
        if len(self.names) != len(self.colors) or not self.names:
            raise StegoError(
                f"There are {len(self.names)} class names and {len(self.colors)} colors. Give one color per class."
            )
        seen = {"no class"}  # figures use this name for pixels without a class
        for name in self.names:
            plain = " ".join(unicodedata.normalize("NFKC", name).split()).casefold()
            control = any(unicodedata.category(character) == "Cc" for character in name)
            if control or not plain or plain in seen:
                raise StegoError(
                    f"Class name {name!r} is empty, reserved or a duplicate. Give each class its own name."
                )
            seen.add(plain)

    def __len__(self) -> int:
        return len(self.names)


def read_classes(path: Path, unnamed: Classes | None = None) -> Classes:
    """Reads classes.json.

    Parameters
    ----------
    path
        A JSON file: {"names": [...], "colors": [[r, g, b], ...], "range": [low, high], "exif": "apply" or "ignore"}.
        Everything but the names is optional. range: stored values of black and white, for images of more than 8 bits
        per channel. exif: rotate images by their EXIF orientation (the default), or leave them as stored.
    unnamed
        The classes to use where the file, or its names, are missing; None if names are required.

    Raises
    ------
    StegoError
        If the file is missing or invalid.
    """
    content = read_json(path) if path.exists() else {}
    names = content.get("names", unnamed and list(unnamed.names)) if isinstance(content, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise StegoError(f'{path} does not name the classes. Write {{"names": ["road", "tree"]}} into it.')
    for key in content.keys() - set(KEYS):
        if guess := did_you_mean(str(key).casefold(), list(KEYS)):
            raise StegoError(f"{path} has an unknown key {key!r}{guess}. Rename or remove it.")
    rules = _read_rules(path, content)
    if unnamed is not None and "names" not in content:
        return replace(unnamed, rules=rules)
    colors = content.get("colors") or distinct_colors(len(names))
    if not isinstance(colors, list) or not all(map(_is_color, colors)):
        raise StegoError(f"{path}: a color is not [red, green, blue], each 0 to 255. Correct or remove the colors.")
    try:
        return Classes(tuple(names), tuple((red, green, blue) for red, green, blue in colors), rules)
    except StegoError as error:
        raise StegoError(f"{path}: {error}") from None


def _is_color(color: Any) -> bool:
    return isinstance(color, list | tuple) and len(color) == 3 and all(c in range(256) for c in color)


def _read_rules(path: Path, content: dict[str, Any]) -> Rules:
    limits, exif = content.get("range"), content.get("exif")
    if exif not in (None, "apply", "ignore"):
        raise StegoError(f'{path}: "exif" is {exif!r}. Write "apply" or "ignore".')
    if limits is None:
        return Rules(exif=exif)
    numbers = isinstance(limits, list) and len(limits) == 2 and all(type(end) in (int, float) for end in limits)
    if not numbers or not -math.inf < limits[0] < limits[1] < math.inf:
        raise StegoError(f'{path}: "range" is {limits!r}. Write [LOW, HIGH], the stored values of black and white.')
    return Rules((limits[0], limits[1]), exif)


def write_classes(path: Path, classes: Classes) -> None:
    """Writes what `read_classes` reads."""
    rules = {key: value for key, value in asdict(classes.rules).items() if value is not None}
    write_json(path, {"names": classes.names, "colors": classes.colors, **rules})


def cluster_classes(count: int) -> Classes:
    """`count` classes without names, for images without labels: "cluster 0" and so on."""
    return Classes(tuple(f"cluster {i}" for i in range(count)), tuple(distinct_colors(count)))


def without_names(classes: Classes) -> bool:
    """Whether the classes are numbered rather than named."""
    return all(re.fullmatch(r"(cluster|class) \d+", name) for name in classes.names)


def distinct_colors(count: int) -> list[tuple[int, int, int]]:
    """`count` colors, (R, G, B): hues in steps of the golden ratio, alternating in saturation and brightness."""
    strong = [colorsys.hsv_to_rgb(i * 0.618034 % 1, (0.9, 0.5)[i % 2], (1.0, 0.75, 0.5)[i % 3]) for i in range(count)]
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in strong]


def muted_colors(count: int) -> list[tuple[int, int, int]]:
    """`count` colors, (R, G, B), for clusters without a class: `distinct_colors` mixed with gray."""
    return [(80 + 3 * red // 8, 80 + 3 * green // 8, 80 + 3 * blue // 8) for red, green, blue in distinct_colors(count)]


def distinct_names(names: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """Unique names: a name that repeats, or is in `taken`, gets its id appended, as in "food (id 11)"."""
    counts = Counter(name.casefold() for name in (*taken, *names))
    unique = [name if counts[name.casefold()] == 1 else f"{name} (id {i})" for i, name in enumerate(names)]
    return unique if unique == list(names) else distinct_names(unique, taken)
