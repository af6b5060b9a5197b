"""Ordered work in threads. NumPy, SciPy and Pillow release the interpreter lock, so threads use several cores."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None
) -> Iterator[Result]:
    """Yields `function(item)` for each item, in their order.

    workers: threads, `cores()` by default. At most two items per thread are taken ahead. An exception of `function` is
    raised when its result is due.
    """
    workers, items = workers or cores(), iter(items)
    coming: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            coming.extend(pool.submit(function, item) for item in islice(items, 2 * workers))
            while coming:
                yield coming.popleft().result()
                coming.extend(pool.submit(function, item) for item in islice(items, 1))
        finally:
            for future in coming:
                future.cancel()
