"""A folder of results that knows which of its files it wrote, and the base class of writers into it."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.classes import Classes
from ..utils import devices
from ..utils.files import atomic, checksum, disk_errors


class OutputFolder:
    """Writes files, and a line for each of them into origin.jsonl: SHA-256, source and name.

    The source says what a file was made from. A file whose content is in no line is not ours: somebody else wrote or
    changed it. It is replaced only with `overwrite`. Of several processes, each has a log of its own.
    """

    def __init__(self, path: Path, overwrite: bool = False):
        self.path, self.overwrite = path, overwrite
        self._log = path / (f"origin-{devices.rank()}.jsonl" if devices.rank() else "origin.jsonl")
        self._sources: dict[tuple[str, str], str] = {}
        self._current: dict[str, str | None] = {}
        for log in (*path.glob("origin.jsonl"), *path.glob("origin-[0-9]*.jsonl")):
            for line in log.read_text(encoding="utf-8").split("\n"):
                with suppress(ValueError):  # a killed process may leave part of a line
                    digest, source, name = json.loads(line)
                    self._sources[name, digest] = source

    def source(self, name: str) -> str | None:
        """What a file was made from; None if it does not exist or is not ours."""
        if name not in self._current:
            path = self.path / name
            self._current[name] = self._sources.get((name, checksum(path))) if path.is_file() else None
        return self._current[name]

    def foreign(self, names: Iterable[str], inputs: Iterable[Path]) -> list[str]:
        """Those of the files to be written that exist and are not ours, or are an input.

        Raises StegoError for a name that is too long, or whose folder is a file.
        """
        read = {(status.st_dev, status.st_ino) for status in map(Path.stat, inputs)}
        return [name for name in names if self._is_foreign(name, read)]

    def _is_foreign(self, name: str, inputs: set[tuple[int, int]]) -> bool:
        path = self.path / name
        with disk_errors(path):
            existing = next(folder for folder in path.parents if folder.exists())
            with suppress(FileNotFoundError):
                (existing / path.name).lstat()  # an error for a name that the disk does not take
        if not os.path.lexists(path):
            return False
        if path.exists() and (path.stat().st_dev, path.stat().st_ino) in inputs:
            return True
        return not self.overwrite and self.source(name) is None

    @contextmanager
    def write(self, name: str, source: str) -> Iterator[Path]:
        """Gives a temporary path that becomes the file `name` when the block succeeds."""
        with atomic(self.path / name) as temporary:
            yield temporary
            digest = checksum(temporary)
            with open(self._log, "a", encoding="utf-8") as log:
                log.write(f"\n{json.dumps([digest, source, name])}")  # before the file appears; ends part of a line
        self._sources[name, digest] = self._current[name] = source

    def outdated(self, sources: set[str]) -> list[str]:
        """Files of ours that were made from something else than `sources`."""
        names = {name for name, _ in self._sources}
        return sorted(name for name in names if self.source(name) not in {None, *sources})


class Writer:
    """Writes label maps in one format of annotations: `add` for each image, then `finish`.

    Of several processes, each adds its own images, and the first finishes. masks: "rle" or "polygons".
    """

    # File for all images together.
    summary: str | None = None

    def __init__(self, output: OutputFolder, segments: Classes, masks: str = "rle"):
        self.output, self.segments, self.masks = output, segments, masks

    def file(self, image: Path) -> str | None:
        """File of one image, below the output folder."""
        return None

    def add(self, image: Path, label: np.ndarray, source: str) -> Any:
        """Adds a label map, uint8 (H, W). Returns what `finish` needs to know of the image."""
        raise NotImplementedError

    def finish(self, records: list[Any], source: str) -> None:
        """Writes what all images have in common. records: of all images, from `add`."""
