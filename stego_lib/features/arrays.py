"""Rows of arrays in .npy files."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from ..runtime.errors import StegoError, brief


def create(path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    """A new file, whose room on the disk is taken at once: a disk that is too small says so before the work begins."""
    open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def read_rows(path: Path, rows: Sequence[int] | slice) -> np.ndarray:
    """A copy of these rows. The map ends with the call: its pages count as memory of the process."""
    try:
        found = np.load(path, mmap_mode="r")
        return found[rows].copy() if isinstance(rows, slice) else found[list(rows)]
    except (OSError, ValueError, EOFError) as error:
        raise StegoError(f"{path} was changed while it was in use ({brief(error)}); start again") from error


def write_rows(path: Path, start: int, values: np.ndarray) -> None:
    """Overwrites the rows from `start` on. Not through a map, which would end the process where the disk is full."""
    with open(path, "r+b") as file:
        file.seek(np.load(path, mmap_mode="r").offset + start * values[:1].nbytes)
        file.write(values.data)


def sync(path: Path) -> None:
    """Returns when what was written is on the disk."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
