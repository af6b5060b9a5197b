"""An ordered parallel map. NumPy, SciPy, Pillow and hashlib release the GIL, so threads use several cores."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

# Threads that read files: also on few cores several, because network disks have a latency.
READERS = 8
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None
) -> Iterator[Result]:
    """Yields `function(item)` for each item, in order.

    workers: number of threads, by default that of CPU cores that this process may use. Reads at most two items per
    thread ahead. Exceptions are raised in the same order.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers, items = workers or cores, iter(items)
    futures: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            futures.extend(pool.submit(function, item) for item in islice(items, 2 * workers))
            while futures:
                yield futures.popleft().result()
                futures.extend(pool.submit(function, item) for item in islice(items, 1))
        finally:
            for future in futures:
                future.cancel()
