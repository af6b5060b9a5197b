"""Rows of arrays in .npy files."""

import os
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from ..utils.errors import StegoError, brief


def create(path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    """A new file, whose room on the disk is taken at once: a disk that is too small says so before the work begins."""
    open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def read_rows(path: Path, rows: Sequence[int] | slice) -> np.ndarray:
    """A copy of these rows. They are read, not mapped: the system maps pages around those that are touched, and they count as memory."""
    try:
        array = np.load(path, mmap_mode="r")  # of which the shape alone is used
        numbers = range(len(array))[rows] if isinstance(rows, slice) else [range(len(array))[row] for row in rows]
        found = np.empty((len(numbers), *array.shape[1:]), array.dtype)
        with open(path, "rb", buffering=0) as file:
            whole = isinstance(numbers, range) and numbers.step == 1  # one piece of the file
            parts = (
                [(numbers[0], found)]
                if whole and numbers
                else [(row, found[i : i + 1]) for i, row in enumerate(numbers)]
            )
            for row, part in parts:
                file.seek(array.offset + row * array[:1].nbytes)
                _fill(file, part)
        return found
    except (OSError, ValueError, EOFError) as error:
        raise StegoError(f"{path} was changed while it was in use ({brief(error)}); start again") from error


def _fill(file: FileIO, part: np.ndarray) -> None:
    left = part.reshape(-1).view(np.uint8).data
    while left:
        if not (read := file.readinto(left)):
            raise EOFError("it ends too early")
        left = left[read:]


def write_rows(path: Path, start: int, values: np.ndarray) -> None:
    """Overwrites the rows from `start` on. Not through a map, which would end the process where the disk is full."""
    with open(path, "r+b") as file:
        file.seek(np.load(path, mmap_mode="r").offset + start * values[:1].nbytes)
        file.write(values.data)


def sync(path: Path) -> None:
    """Returns when what was written is on the disk."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
