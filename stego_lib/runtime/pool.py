"""Work on many images in several processes. Without torch, as the processes import it."""

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from itertools import islice
from queue import SimpleQueue
from threading import Thread
from typing import Any

from joblib import cpu_count
from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.process_executor import BrokenProcessPool

from .errors import StegoError, brief

WORTH = 5.0
"""Seconds of work for one process below which no others are started."""
FLYING = 2
"""Jobs handed out at a time for each process: one in work, one waiting."""
BEAT = 0.5
"""Seconds between two looks of a process at whether the one that started it is still there."""

Job = tuple[str, tuple[Any, ...]]


def end_with(parent: int) -> None:
    """Ends this process soon after process `parent`, which started it, has gone, whatever ended that one.

    A thread looks at the number of the parent, which changes then; nothing else tells of a parent that was killed.
    """

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(BEAT)
        os._exit(1)

    Thread(target=look, daemon=True).start()


def _begin(parent: int) -> None:
    """What a process of the pool does first."""
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts the workers too, but their parent decides


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
    """The pool is driven by a thread of its own. An interrupt comes to the main thread, between any two steps; in the pool's
    code that could be where a lock is held and not yet known to be, and everything would wait for it for ever."""
    todo: SimpleQueue[tuple[tuple[Any, ...], SimpleQueue[Future]] | None] = SimpleQueue()
    ended: SimpleQueue[None] = SimpleQueue()
    flying: deque[tuple[str, SimpleQueue[Future]]] = deque()

    def landed() -> Any:
        name, answer = flying.popleft()
        try:
            return _explained(what, name, answer.get().result)
        except BrokenProcessPool as error:
            names = ", ".join([name, *(other for other, answer in flying if answer.get().exception() is not None)])
            raise StegoError(
                f"{what}: a process died (was it killed, or was memory short?) with one of these in work: {names}"
            ) from error

    one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    pool = ProcessPoolExecutor(processes, env=one_thread, timeout=60, initializer=_begin, initargs=(os.getpid(),))
    Thread(target=_drive, args=(pool, function, todo, ended), daemon=True).start()
    try:
        for name, arguments in jobs:
            flying.append((name, SimpleQueue()))
            todo.put((arguments, flying[-1][1]))
            if len(flying) >= FLYING * processes:
                yield landed()
        while flying:
            yield landed()
    finally:
        todo.put(None)
        ended.get()


def _drive(pool: ProcessPoolExecutor, function: Callable, todo: SimpleQueue, ended: SimpleQueue) -> None:
    """Hands each (arguments, answer) of `todo` to the pool, until None comes: then every process is killed, whatever it does."""
    submitted: deque[Future] = deque(maxlen=64)
    try:
        for arguments, answer in iter(todo.get, None):
            try:
                job = pool.submit(function, *arguments)
                submitted.append(job)
            except Exception as error:  # the pool is broken, or there is no room for another process
                job = Future()
                job.set_exception(error)
            job.add_done_callback(answer.put)
    finally:
        begun = time.monotonic()  # a job that is on its way to the workers when they are killed makes the pool's thread fail
        while any(not (job.running() or job.done()) for job in submitted) and time.monotonic() - begun < 1:
            time.sleep(0.001)
        pool.shutdown(wait=True, kill_workers=True)
        ended.put(None)


def _explained(what: str, name: str, compute: Callable[[], Any]) -> Any:
    try:
        return compute()
    except BrokenProcessPool:
        raise
    except Exception as error:
        raise StegoError(f"{what} failed on {name} ({brief(error)})") from error
