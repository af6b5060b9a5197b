"""log.csv: exactly one line per step, also after a run was killed."""

import csv
from collections.abc import Iterable
from pathlib import Path

from .errors import StegoError
from .files import atomic, sync


class TrainingLog:
    """Opens log.csv at step `first`: keeps the lines of the steps before it, drops later ones.

    columns: those beyond "step". Raises StegoError if a line before `first` is missing.
    """

    def __init__(self, path: Path, first: int, columns: Iterable[str]):
        names = ["step", *columns]
        lines = [",".join(names)]
        if first:  # a process that was killed may have left more, the last of them cut short
            lines = path.read_text(encoding="utf-8").splitlines()[: first + 1] if path.exists() else []
            if [line.split(",")[0] for line in lines] != ["step", *map(str, range(first))]:
                raise StegoError(f"{path} lacks lines of the checkpoint's {first} steps. Train without resume.")
        with atomic(path) as temporary:
            temporary.write_text("\n".join([*lines, ""]), encoding="utf-8", newline="\n")
        self.file = open(path, "a", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, names, lineterminator="\n")

    def add(self, step: int, values: dict[str, float]) -> None:
        """Adds the line of a step."""
        self.writer.writerow({"step": step} | values)

    def sync(self) -> None:
        """Returns when all lines are on the disk."""
        sync(self.file)

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()
