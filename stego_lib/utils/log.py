"""log.csv: exactly one line per step, also after a run was killed."""

import csv
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from .errors import StegoError, brief
from .files import atomic


class TrainingLog:
    """Opens log.csv at step `first`: keeps the lines of the steps before it, drops later ones.

    columns: those beyond "step". Raises StegoError if a line before `first` is missing.
    """

    def __init__(self, path: Path, first: int, columns: Iterable[str]):
        names = ["step", *columns]
        kept = _rows(path, first)
        with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as new:
            writer = csv.DictWriter(new, names)
            writer.writeheader()
            writer.writerows(kept)
        self.file = open(path, "a", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, names)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Adds the line of a step."""
        self.writer.writerow({"step": step} | values)

    def sync(self) -> None:
        """Returns when all lines are on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def _rows(path: Path, count: int) -> list[dict[str, str]]:
    """The lines of the first `count` steps. A process that was killed may have left more, the last of them cut short."""
    if not count:
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(islice(csv.DictReader(file), count))
        whole = [row["step"] for row in rows] == [str(step) for step in range(count)]
    except (OSError, ValueError, KeyError) as error:
        raise StegoError(f"{path} cannot be read ({brief(error)}); train without resume") from error
    if not whole:
        raise StegoError(f"{path} lacks lines of the {count} steps that the checkpoint counts; train without resume")
    return rows
