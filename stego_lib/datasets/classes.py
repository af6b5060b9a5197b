"""The classes of a dataset, and classes.json: names, colors, and rules for reading the images of a folder."""

import colorsys
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, Field, FiniteFloat, ValidationError, model_validator

from ..utils.errors import StegoError
from ..utils.files import read_json, write_json

Range: TypeAlias = tuple[float, float]
"""Stored values of black and white."""


@dataclass(frozen=True)
class Rules:
    """Rules for reading the images of a folder."""

    range: Range | None = None
    """Stored values of black and white, for images of more than 8 bits per channel."""
    exif: Literal["apply", "ignore"] | None = None
    """Whether to rotate images by their EXIF orientation. None: rotate, with a notice if there are labels."""


DEFAULT = Rules()
# Maximum number of classes: ids of label maps have 8 bits, and 255 marks pixels without a class.
MAX_CLASSES = 255


@dataclass(frozen=True)
class Classes:
    """Names of the classes, in the order of their ids, and their colors in figures."""

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    """(R, G, B) of each class, 0 to 255."""
    rules: Rules = DEFAULT
    """Rules for reading the images."""

    def __post_init__(self) -> None:
        count = len(self.names)
        problem = f"{count} names do not fit into an 8-bit label map" if count > MAX_CLASSES else ""
        seen = {"", "no class"}  # figures use the second for pixels without a class
        for name in self.names:
            plain = str(name).strip().casefold()
            if not isinstance(name, str) or plain in seen or not name.isprintable():
                problem = f"Class name {name!r} is empty, reserved or a duplicate"
            seen.add(plain)
        if problem:
            raise StegoError(f"{problem}. Choose at most {MAX_CLASSES} different names.")

    def __len__(self) -> int:
        return len(self.names)


Byte = Annotated[int, Field(ge=0, le=255)]


class _ClassesFile(BaseModel, extra="forbid"):
    """The content of classes.json."""

    names: list[str] | None = None
    colors: list[tuple[Byte, Byte, Byte]] | None = None
    range: tuple[FiniteFloat, FiniteFloat] | None = None
    exif: Literal["apply", "ignore"] | None = None

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.range and self.range[0] >= self.range[1]:
            raise ValueError(f"the range is {self.range}; write the value of black first")
        if self.colors is not None and len(self.colors) != len(self.names or ()):
            raise ValueError(f"there are {len(self.names or ())} names and {len(self.colors)} colors")
        Classes(tuple(self.names or ()), ())  # validates the names
        return self


def read_classes(path: Path, unnamed: Classes | None = None) -> Classes:
    """Reads {"names": [...], "colors": [[r, g, b], ...], "range": [low, high], "exif": "apply" or "ignore"}.

    All keys except the names are optional; for range and exif see `Rules`. unnamed: classes to use if the file or its
    names are missing; None if they are required. Raises StegoError for missing names and invalid content.
    """
    try:
        content = _ClassesFile.model_validate(read_json(path) if path.exists() else {})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "content"
        raise StegoError(f"{path}: {place}: {first['msg']}. The keys are names, colors, range and exif.") from None
    rules = Rules(content.range, content.exif)
    if content.names:
        colors = content.colors or distinct_colors(len(content.names))
        return Classes(tuple(content.names), tuple(colors), rules)
    if unnamed is None:
        raise StegoError(f'{path} with the class names is missing. Write {{"names": ["road", "tree"]}}.')
    return replace(unnamed, rules=rules)


def write_classes(path: Path, classes: Classes) -> None:
    """Writes classes.json, see `read_classes`."""
    rules = {key: value for key, value in asdict(classes.rules).items() if value is not None}
    write_json(path, {"names": classes.names, "colors": classes.colors, **rules})


def cluster_classes(count: int) -> Classes:
    """`count` classes without names, for images without labels: "cluster 0" and so on."""
    return Classes(tuple(f"cluster {i}" for i in range(count)), tuple(distinct_colors(count)))


def without_names(classes: Classes) -> bool:
    """Whether the classes have generated names."""
    return all(re.fullmatch(r"(cluster|class) \d+", name) for name in classes.names)


def distinct_colors(count: int) -> list[tuple[int, int, int]]:
    """`count` colors, (R, G, B): hues in steps of the golden ratio, alternating in saturation and brightness."""
    strong = [colorsys.hsv_to_rgb(i * 0.618034 % 1, (0.9, 0.5)[i % 2], (1.0, 0.75, 0.5)[i % 3]) for i in range(count)]
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in strong]


def distinct_names(names: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """Makes names unique: appends the id to one that repeats or is in `taken`, as in "food (id 11)"."""
    counts = Counter(name.casefold() for name in (*taken, *names))
    unique = [name if counts[name.casefold()] == 1 else f"{name} (id {i})" for i, name in enumerate(names)]
    return unique if unique == list(names) else distinct_names(unique, taken)
