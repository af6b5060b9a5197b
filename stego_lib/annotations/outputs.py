"""A folder of results that protects files of the user, and the base class of its writers."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.classes import Classes
from ..utils import devices
from ..utils.files import atomic, checksum

# Formats of masks in instances.json.
MASKS = ("rle", "polygons")


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
        """Files that exist and are not in the log, or are inputs."""
        kept = {path.resolve() for path in inputs}
        existing = [name for name in names if os.path.lexists(self.path / name)]  # also broken links
        ours = [name for name in existing if self.overwrite or self.source(name) is not None]
        return [name for name in existing if name not in ours or (self.path / name).resolve() in kept]

    @contextmanager
    def write(self, name: str, source: str) -> Iterator[Path]:
        """Yields a temporary path that becomes the file `name` when the block succeeds."""
        with atomic(self.path / name) as temporary:
            yield temporary
            digest = checksum(temporary)
            with open(self._log, "a", encoding="utf-8") as log:
                log.write(f"\n{json.dumps([digest, source, name])}")  # first, and ends a partial line
        self._sources[name, digest] = self._current[name] = source


class Writer(ABC):
    """Writes label maps in an annotation format: `add` for each image, then `finish` in rank 0.

    masks: one of `MASKS`.
    """

    # Names of the file of one image, with {} for its stem, and of the file for all images.
    file, summary = "", ""
    # Required packages, and the extra that installs them.
    packages: tuple[str, ...] = ()
    extra = "annotations"

    def __init__(self, output: OutputFolder, segments: Classes, masks: str = "rle"):
        self.output, self.segments, self.masks = output, segments, masks

    @abstractmethod
    def add(self, image: Path, label: np.ndarray, source: str) -> Any:
        """Adds a label map, uint8 (H, W). Returns a record of the image for `finish`."""

    def finish(self, records: list[Any], source: str) -> None:  # noqa: B027
        """Writes the file for all images. records: results of `add`."""
