"""A folder of results that knows which of its files it wrote, and the base class of writers into it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..datasets.classes import Classes
from ..utils.errors import StegoError
from ..utils.files import atomic, checksum


class OutputFolder:
    """Writes files, and a line for each of them into origin.txt: SHA-256, source and name.

    The source says what a file was made from. A file whose content is in no line is not ours: somebody else wrote or
    changed it. It is replaced only with `overwrite`.
    """

    def __init__(self, path: Path, overwrite: bool = False):
        self.path, self.overwrite, self._log = path, overwrite, path / "origin.txt"
        self._sources: dict[tuple[str, str], str] = {}
        text = self._log.read_text(encoding="utf-8", errors="surrogateescape") if self._log.exists() else ""
        for line in text.splitlines():
            if line.count(" ") >= 2:  # a killed process may leave part of a line
                digest, source, name = line.split(" ", 2)
                self._sources[name, digest] = source

    def source(self, name: str) -> str | None:
        """What a file was made from; None if it does not exist or is not ours."""
        path = self.path / name
        return self._sources.get((name, checksum(path))) if path.is_file() else None

    def check(self, names: Iterable[str], inputs: Iterable[Path]) -> None:
        """Raises StegoError if one of the files to be written is not ours, or is an input."""
        read = {path.resolve() for path in inputs}
        for name in names:
            path = self.path / name
            foreign = path.exists() and not self.overwrite and self.source(name) is None
            if foreign or path.resolve() in read:
                raise StegoError(
                    f"{path} was not written by segment_folder, or was changed since. Move it, choose another output "
                    "folder, or pass overwrite=True (which never replaces an input)."
                )

    @contextmanager
    def write(self, name: str, source: str) -> Iterator[Path]:
        """Gives a temporary path that becomes the file `name` when the block succeeds."""
        with atomic(self.path / name) as temporary:
            yield temporary
            digest = checksum(temporary)
            with open(self._log, "a", encoding="utf-8", errors="surrogateescape") as log:
                log.write(f"\n{digest} {source} {name}")  # before the file appears; a part of a line ends here
        self._sources[name, digest] = source

    def outdated(self, sources: set[str]) -> list[str]:
        """Files of ours that were made from something else than `sources`."""
        names = {name for name, _ in self._sources}
        return sorted(name for name in names if self.source(name) not in {None, *sources})


class Writer:
    """Writes label maps in one format of annotations: `add` for each image, then `finish`."""

    # File for all images together.
    summary: str | None = None

    def __init__(self, output: OutputFolder, segments: Classes):
        self.output, self.segments = output, segments

    def file(self, image: Path) -> str | None:
        """File of one image, below the output folder."""
        return None

    def add(self, image: Path, label: np.ndarray, source: str) -> None:
        """Adds a label map, uint8 (H, W)."""
        raise NotImplementedError

    def finish(self, source: str) -> None:
        """Writes what all images have in common."""
