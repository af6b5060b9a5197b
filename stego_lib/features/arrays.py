"""Arrays in NumPy files, whose rows are read and written by their numbers."""

import os
import weakref
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from ..runtime.errors import StegoError


class ArrayFile:
    """An array in a .npy file; a row is whatever its first axis counts.

    The file is not mapped into memory: pages of a mapped file count as memory of the process that has touched them. One
    process may read rows while another writes others. `write` opens it for writing.
    """

    def __init__(self, path: Path, *, write: bool = False):
        mapped = np.load(path, mmap_mode="r")
        self.path, self.shape, self.dtype, self._start = path, mapped.shape, mapped.dtype, mapped.offset
        self._bytes = mapped[:1].nbytes
        self._file = open(path, "r+b" if write else "rb", buffering=0)
        weakref.finalize(self, self._file.close)

    def read(self, rows: Iterable[int]) -> np.ndarray:
        """A copy of the rows of these numbers, in their order. StegoError if the file has become shorter."""
        numbers = list(rows)
        found = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        for place, row in zip(found, numbers, strict=True):
            if not 0 <= row < self.shape[0]:
                raise IndexError(f"{self.path} has {self.shape[0]} rows, no row {row}")
            self._file.seek(self._start + row * self._bytes)
            if self._file.readinto(_bytes(place)) != self._bytes:
                raise StegoError(f"{self.path} was cut short while it was in use; start again")
        return found

    def write(self, rows: Iterable[int], values: np.ndarray) -> None:
        """Writes `values` (one per row number) in the array's type."""
        for row, value in zip(rows, np.ascontiguousarray(values, self.dtype), strict=True):
            self._file.seek(self._start + row * self._bytes)
            self._file.write(_bytes(value))

    def sync(self) -> None:
        """Returns when what was written is on the disk."""
        os.fsync(self._file.fileno())


def create(path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    """A new file of an array, whose room on the disk is taken at once."""
    open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def crc(values: np.ndarray, before: int = 0) -> int:
    """A 32-bit checksum of an array's content that goes on from that of what stands `before` it: quick, against accidents alone."""
    return zlib.crc32(_bytes(np.ascontiguousarray(values)), before)


def _bytes(values: np.ndarray) -> memoryview:
    return values.reshape(-1).view(np.uint8).data
