"""A folder of results that protects files of the user, and the base class of its writers."""

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
    """Writes files, and logs SHA-256, source and name of each file in origin.jsonl, or origin-RANK.jsonl.

    The source is a fingerprint of the inputs. A file that is not in the log was written or changed by the user, and is
    only replaced with `overwrite`.
    """

    def __init__(self, path: Path, overwrite: bool = False):
        self.path, self.overwrite = path, overwrite
        self._log = path / (f"origin-{devices.rank()}.jsonl" if devices.rank() else "origin.jsonl")
        self._sources: dict[tuple[str, str], str] = {}
        self._current: dict[str, str | None] = {}
        for log in (*path.glob("origin.jsonl"), *path.glob("origin-[0-9]*.jsonl")):
            for line in log.read_text(encoding="utf-8").split("\n"):
                with suppress(ValueError):  # a killed process may leave a partial line
                    digest, source, name = json.loads(line)
                    self._sources[name, digest] = source

    def source(self, name: str) -> str | None:
        """The source of a file; None if it does not exist or is not in the log."""
        if name not in self._current:
            path = self.path / name
            self._current[name] = self._sources.get((name, checksum(path))) if path.is_file() else None
        return self._current[name]

    def foreign(self, names: Iterable[str], inputs: Iterable[Path]) -> list[str]:
        """Files that exist and are not in the log, or are inputs. Raises StegoError for invalid names."""
        read = {(status.st_dev, status.st_ino) for status in map(Path.stat, inputs)}
        return [name for name in names if self._is_foreign(name, read)]

    def _is_foreign(self, name: str, inputs: set[tuple[int, int]]) -> bool:
        path = self.path / name
        with disk_errors(path):
            existing = next(folder for folder in path.parents if folder.exists())
            with suppress(FileNotFoundError):
                (existing / path.name).lstat()  # raises an error for an invalid name
        if not os.path.lexists(path):
            return False
        if path.exists() and (path.stat().st_dev, path.stat().st_ino) in inputs:
            return True
        return not self.overwrite and self.source(name) is None

    @contextmanager
    def write(self, name: str, source: str) -> Iterator[Path]:
        """Yields a temporary path that becomes the file `name` when the block succeeds."""
        with atomic(self.path / name) as temporary:
            yield temporary
            digest = checksum(temporary)
            with open(self._log, "a", encoding="utf-8") as log:
                log.write(f"\n{json.dumps([digest, source, name])}")  # first, and ends a partial line
        self._sources[name, digest] = self._current[name] = source

    def outdated(self, sources: set[str]) -> list[str]:
        """Files in the log with other sources."""
        names = {name for name, _ in self._sources}
        return sorted(name for name in names if self.source(name) not in {None, *sources})


class Writer:
    """Writes label maps in an annotation format: `add` for each image, then `finish` in rank 0.

    masks: "rle" or "polygons".
    """

    # Name of the file for all images.
    summary: str | None = None

    def __init__(self, output: OutputFolder, segments: Classes, masks: str = "rle"):
        self.output, self.segments, self.masks = output, segments, masks

    def file(self, image: Path) -> str | None:
        """Name of the file of one image."""
        return None

    def add(self, image: Path, label: np.ndarray, source: str) -> Any:
        """Adds a label map, uint8 (H, W). Returns a record of the image for `finish`."""
        raise NotImplementedError

    def finish(self, records: list[Any], source: str) -> None:
        """Writes the file for all images. records: results of `add`."""
