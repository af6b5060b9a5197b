"""The classes of a dataset: names, colors, ids that are none, and what is doubtful about them."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..utils.errors import StegoError
from .formats import DEFAULT, Rules

RESERVED = ("no class",)
"""Names that tables and figures use themselves."""


@dataclass(frozen=True)
class Finding:
    """Something about a dataset that a person should know before training on it."""

    text: str
    misleads: bool = False
    """Whether training or scores would mean something else than they seem to."""


@dataclass(frozen=True)
class Classes:
    """Names of the classes and their colors in figures; position = label id."""

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    """(R, G, B) of each class, 0 to 255."""
    rules: Rules = DEFAULT
    """How images of the folder that the names come from are read."""

    def __post_init__(self) -> None:
        if len(self.names) != len(self.colors) or not self.names:
            raise StegoError(
                f"{len(self.names)} class names and {len(self.colors)} colors: there must be as many, and one at least"
            )
        seen: set[str] = set()
        for name in self.names:
            visible = "".join(c for c in unicodedata.normalize("NFC", name) if unicodedata.category(c) != "Cf")
            plain = " ".join(visible.split()).casefold()
            broken = any(unicodedata.category(c) == "Cc" for c in name)
            if broken or not plain or plain in seen or plain in RESERVED:
                fault = "empty" if not plain else "twice" if plain in seen else "the name of what belongs to no class"
                fault = "broken by a control character, such as the end of a line" if broken else fault
                raise StegoError(f"class name {name!r} is {fault}; every class needs a name of its own")
            seen.add(plain)

    def __len__(self) -> int:
        return len(self.names)


def listed(ids: Iterable[int]) -> str:
    """Ids in a message: "3, 4, 5", at most the first ten."""
    ids = list(ids)
    return ", ".join(map(str, ids[:10])) + (", ..." if len(ids) > 10 else "")


def refuse_ids(stored: np.ndarray, known: np.ndarray, release: str, others: dict[int, str]) -> None:
    """StegoError if any of the `stored` ids is not `known` (bool of the same shape).

    release: what the ids should be. others: id -> what a label map with it probably is instead; -1 stands for any id.
    """
    if wrong := np.unique(stored[~known]).tolist():
        likely = next((text for id_, text in others.items() if id_ in wrong), others.get(-1, ""))
        raise StegoError(f"holds id {listed(wrong)}; {release}{'. ' if likely else ''}{likely}")
