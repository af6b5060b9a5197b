"""log.csv, with exactly one line per step even after a run was killed."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path

from .errors import StegoError
from .files import atomic


class TrainingLog:
    """Opens log.csv to continue at step `first`: keeps the lines of earlier steps and drops later ones.

    columns: all except "step". Raises StegoError if the line of an earlier step is missing.
    """

    def __init__(self, path: Path, first: int, columns: Iterable[str]):
        names = ["step", *columns]
        lines = [",".join(names)]
        if first:  # a killed process may have written later lines, and a part of one
            lines = path.read_text(encoding="utf-8").splitlines()[: first + 1] if path.exists() else []
            if [line.split(",")[0] for line in lines] != ["step", *map(str, range(first))]:
                raise StegoError(
                    f"{path} does not contain the {first} steps of the checkpoint. Train with resume=False."
                )
        with atomic(path) as temporary:
            temporary.write_text("\n".join([*lines, ""]), encoding="utf-8", newline="\n")
        self.file = open(path, "a", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, names, lineterminator="\n")

    def add(self, step: int, values: dict[str, float]) -> None:
        """Writes the line of a step."""
        self.writer.writerow({"step": step} | values)

    def sync(self) -> None:
        """Flushes all lines to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()
