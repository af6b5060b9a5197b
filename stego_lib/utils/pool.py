"""Worker processes for work on many images. Without torch, because the workers import this module."""

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
"""Seconds of work below which no workers are started."""
FLYING = 2
"""Jobs in flight for each worker: one running, one waiting."""
BEAT = 0.5
"""Seconds between two checks of a worker that its parent is alive."""

Job = tuple[str, tuple[Any, ...]]


def end_with(parent: int) -> None:
    """Ends this process soon after its parent process has ended, also by SIGKILL.

    A thread watches the parent's process id, which changes then.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(BEAT)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _begin(parent: int) -> None:
    """Initializes a worker."""
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the workers too, but the parent decides


def in_processes(function: Callable, jobs: Iterable[Job], total: int, what: str) -> Iterator[Any]:
    """Yields `function(*arguments)` for each (name, arguments) of `jobs`, in their order, computed by workers.

    The first job runs here and is timed; workers start only if the others promise more than `WORTH` seconds of work and there
    are several cores: one worker per core, with one thread each. At most `FLYING` jobs per worker are in memory. Workers end
    with this generator, also when it is interrupted or dropped; they import the module of `function` alone, so scripts
    need no main guard.

    Parameters
    ----------
    function
        A function of a module.
    jobs
        Name, for messages, and arguments of each call.
    total
        Number of jobs.
    what
        Names the work in messages, such as "the dense CRF".

    Raises
    ------
    StegoError
        Names the job in which `function` raised, or the jobs that were running when a worker died.
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
    """Spreads jobs over workers.

    A thread drives the pool, because an interrupt hits the main thread anywhere: inside the pool's code it could leave a lock
    held for ever.
    """
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
    """Submits each (arguments, answer) of `todo` to the pool; at None, kills all workers."""
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
        begun = time.monotonic()  # killing workers while a job is on its way to them would break the pool's thread
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
