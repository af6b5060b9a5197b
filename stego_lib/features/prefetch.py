"""Prefetching of images in threads."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Generic, TypeVar

Item = TypeVar("Item")


class ReadAhead(Generic[Item]):
    """Reads items by number in threads: Pillow decodes outside Python's lock, and no process is started for each dataset.

    read: number -> item. sources: the file of each number; consecutive numbers of one file (its crops) are read by one
    thread, so that the file is decoded once.
    """

    def __init__(self, read: Callable[[int], Item], sources: Sequence[Path], threads: int | None = None):
        self._read, self._sources = read, sources
        self._pool = ThreadPoolExecutor(threads or os.cpu_count() or 1, "reading")
        self._coming: dict[int, tuple[Future[list[Item]], int]] = {}

    def prefetch(self, rows: Sequence[int]) -> None:
        """Begins to read the items that are not being read already."""
        fresh = [row for row in dict.fromkeys(rows) if row not in self._coming]
        for _, group in groupby(fresh, key=lambda row: self._sources[row]):
            numbers = list(group)
            task = self._pool.submit(self._read_all, numbers)
            self._coming |= {row: (task, i) for i, row in enumerate(numbers)}

    def take(self, rows: Sequence[int]) -> list[Item]:
        """Waits for the items of these numbers. An error from reading one of them is raised here."""
        self.prefetch(rows)
        try:
            return [(found := self._coming[row])[0].result()[found[1]] for row in rows]
        finally:
            for row in rows:
                self._coming.pop(row, None)

    def _read_all(self, rows: list[int]) -> list[Item]:
        return [self._read(row) for row in rows]

    def close(self) -> None:
        """Drops items that were not taken, and ends the threads."""
        self._coming.clear()
        self._pool.shutdown(cancel_futures=True)
