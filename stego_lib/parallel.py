"""Work on many pictures in several processes. Without torch, as the processes import it."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from joblib import cpu_count
from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.process_executor import BrokenProcessPool

from .errors import StegoError, brief

WORTH = 5.0
"""Seconds of work for one process below which no others are started."""
FLYING = 2
"""Jobs handed out at a time for each process: one in work, one waiting."""

Job = tuple[str, tuple[Any, ...]]


def in_processes(function: Callable, jobs: Iterable[Job], total: int, what: str) -> Iterator[Any]:
    """Yields `function(*arguments)` for each (name, arguments) of `jobs`, in their order, computed in fresh processes.

    The first job is done here and timed; only if the other `total` - 1 promise work for more than `WORTH` seconds, and
    this process may use several cores, are there processes: one a core, each with one thread. No more than `FLYING` jobs
    for each of them are in memory at a time. The processes end with this generator, also when it is interrupted or thrown
    away. They need no guarded main module: they import `function`, by its module, and nothing of the caller's.
    Raises StegoError that names the job when `function` raises, and the jobs in question when a process dies. `what`, such
    as "the dense CRF", says in the message what was being done.
    """
    jobs = iter(jobs)
    for name, arguments in islice(jobs, 1):
        started = time.perf_counter()
        done = _explained(what, name, partial(function, *arguments))
        expected = (time.perf_counter() - started) * (total - 1)
        yield done
        processes = min(cpu_count(), total - 1)
        if expected > WORTH and processes > 1:
            yield from _spread(function, jobs, processes, what)
    for name, arguments in jobs:
        yield _explained(what, name, partial(function, *arguments))


def _spread(function: Callable, jobs: Iterator[Job], processes: int, what: str) -> Iterator[Any]:
    one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    pool = ProcessPoolExecutor(processes, env=one_thread, timeout=60)
    flying: deque[tuple[str, Any]] = deque()

    def landed() -> Any:
        name, future = flying.popleft()
        try:
            return _explained(what, name, future.result)
        except BrokenProcessPool as error:
            names = ", ".join([name, *(other for other, future in flying if not _finished(future))])
            raise StegoError(
                f"{what}: a process died (was it killed, or was memory short?) with one of these in work: {names}"
            ) from error

    try:
        for name, arguments in jobs:
            flying.append((name, pool.submit(function, *arguments)))
            if len(flying) >= FLYING * processes:
                yield landed()
        while flying:
            yield landed()
    finally:
        pool.shutdown(wait=True, kill_workers=True)


def _finished(future: Any) -> bool:
    return future.done() and future.exception() is None


def _explained(what: str, name: str, compute: Callable[[], Any]) -> Any:
    try:
        return compute()
    except BrokenProcessPool:
        raise
    except Exception as error:
        raise StegoError(f"{what} failed on {name} ({brief(error)})") from error
