"""Work in several processes: the same results in the same order, faults named, nothing left behind."""

import operator
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from killing import wait_for

from stego_lib import StegoError
from stego_lib.crf import refine, refined_labels
from stego_lib.utils import pool as parallel
from stego_lib.utils.pool import in_processes


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, however little there is to do and however many cores there are."""
    monkeypatch.setattr(parallel, "WORTH", -1)
    monkeypatch.setattr(parallel, "cpu_count", lambda: 2)


def in_one(function, jobs: list) -> list:
    return [function(*arguments) for _, arguments in jobs]


def test_the_crf_in_processes_is_the_crf_here_bit_for_bit(spread):
    rng = np.random.default_rng(0)
    jobs = []
    for i in range(5):
        image = rng.integers(0, 256, (24, 32, 3), np.uint8)
        maps = [rng.dirichlet(np.ones(n), (24, 32)).transpose(2, 0, 1).astype(np.float32) for n in (4, 4, 6)]
        jobs.append((str(i), (image, maps)))
    found = list(in_processes(refined_labels, jobs, len(jobs), "the dense CRF"))
    for labels, (_, (image, maps)) in zip(found, jobs, strict=True):
        for one, probabilities in zip(labels, maps, strict=True):
            alone = refine(image, [probabilities])[0]  # a lattice of its own for each map
            np.testing.assert_array_equal(one, alone.argmax(0))
            assert (one != probabilities.argmax(0)).any(), "the CRF is meant to change something here"


def test_results_come_in_order_whoever_is_first(spread):
    jobs = [(str(i), (f"(__import__('time').sleep({0.2 if i == 1 else 0}), {i})[1]",)) for i in range(7)]
    assert list(in_processes(eval, jobs, len(jobs), "counting")) == list(range(7))


def test_the_processes_import_no_torch_and_have_one_thread(spread):
    asked = (
        "('torch' in __import__('sys').modules, __import__('os').environ['OMP_NUM_THREADS'], __import__('os').getpid())"
    )
    here, *there = in_processes(eval, [("", (asked,))] * 3, 3, "asking")
    assert [answer[:2] for answer in there] == [(False, "1")] * 2
    assert here[2] == os.getpid() and os.getpid() not in [answer[2] for answer in there]


def test_little_work_is_done_here(monkeypatch):
    monkeypatch.setattr(parallel, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("not worth a process"))
    jobs = [(str(i), (i, 2)) for i in range(5)]
    assert list(in_processes(operator.floordiv, jobs, 5, "dividing")) == [0, 0, 1, 1, 2]
    assert list(in_processes(operator.floordiv, [], 0, "dividing")) == []


def test_there_are_no_more_processes_than_jobs(spread, monkeypatch):
    monkeypatch.setattr(parallel, "cpu_count", lambda: 5)
    results = in_processes(time.sleep, [(str(i), (0.01,)) for i in range(3)], 3, "sleeping")
    next(results), next(results)
    assert len(workers(psutil.Process())) == 2
    results.close()


def test_no_more_jobs_are_drawn_than_can_be_in_memory(spread):
    drawn = 0

    def jobs() -> Iterator:
        nonlocal drawn
        for i in range(40):
            drawn += 1
            yield str(i), (i, 1)

    for done, _ in enumerate(in_processes(operator.add, jobs(), 40, "adding"), 1):
        assert drawn <= done + 2 * parallel.FLYING


@pytest.mark.parametrize("wrong", [0, 3])
def test_an_error_names_the_image(spread, wrong):
    jobs = [(f"{i}.jpg", (1, 0 if i == wrong else 1)) for i in range(6)]
    with pytest.raises(StegoError, match=rf"the dense CRF failed on {wrong}\.jpg \(ZeroDivisionError"):
        list(in_processes(operator.truediv, jobs, 6, "the dense CRF"))
    assert not workers(psutil.Process())


def test_a_process_that_dies_is_an_error_with_the_images_in_question(spread):
    jobs = [(f"{i}.jpg", (signal.SIGKILL if i == 2 else signal.SIGCONT,)) for i in range(40)]
    with pytest.raises(StegoError, match=r"the dense CRF: a process died .*2\.jpg"):
        list(in_processes(signal.raise_signal, jobs, 40, "the dense CRF"))
    assert not workers(psutil.Process())


def test_a_process_that_cannot_be_started_is_an_error_with_the_image(spread, monkeypatch):
    def no_room(*_):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(parallel.ProcessPoolExecutor, "submit", no_room)
    with pytest.raises(StegoError, match=r"the dense CRF failed on 1\.jpg \(BlockingIOError: .*temporarily"):
        list(in_processes(operator.add, [(f"{i}.jpg", (i, 1)) for i in range(9)], 9, "the dense CRF"))


def test_thrown_away_halfway_it_leaves_no_process(spread):
    jobs = [(str(i), (0.01,)) for i in range(30)]
    results = in_processes(time.sleep, jobs, 30, "sleeping")
    next(results), next(results)
    assert workers(psutil.Process())
    results.close()
    assert not workers(psutil.Process())


SCRIPT = """
import time
from stego_lib.utils import pool as parallel
parallel.WORTH, parallel.cpu_count = -1, lambda: 2
jobs = [(str(i), (0.01 if i < 2 else 600,)) for i in range(9)]
for _ in parallel.in_processes(time.sleep, jobs, 9, "sleeping"):
    print("one is done", flush=True)
"""
"""Without a guard around its main part, as people write scripts."""


def deaf(process: psutil.Process) -> bool:
    """Whether it ignores Ctrl-C, as Linux knows; one that is only starting does not yet."""
    status = dict(line.split(":\t") for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return bool(int(status["SigIgn"], 16) >> (signal.SIGINT - 1) & 1)


ALL = pytest.param(
    "all of them", marks=pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
)


@pytest.mark.parametrize("interrupted", ["the script", ALL])
def test_ctrl_c_ends_a_script_and_its_processes_at_once(tmp_path, interrupted):
    """A terminal interrupts all processes, `kill` only one; either is answered by one traceback."""
    (tmp_path / "script.py").write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as script:  # fmt: skip
        try:
            assert [script.stdout.readline() for _ in range(2)] == ["one is done\n"] * 2
            children = psutil.Process(script.pid).children(recursive=True)
            started = workers(psutil.Process(script.pid))
            assert len(started) == 2
            if interrupted == "all of them":
                wait_for(lambda: all(map(deaf, started)))
            (os.kill if interrupted == "the script" else os.killpg)(script.pid, signal.SIGINT)
            errors = script.communicate(timeout=60)[1]  # they would sleep on for ten minutes
        finally:
            script.kill()
    assert script.returncode != 0 and errors.count("Traceback") == 1 and "KeyboardInterrupt" in errors, errors
    assert not psutil.wait_procs(children, timeout=10)[1], "processes are left"


def test_the_pool_is_driven_outside_the_main_thread(spread, monkeypatch):
    """Where an interrupt cannot come in between: one that did, with a lock held, made a script wait for ever."""
    used = []
    for name in ("submit", "shutdown"):
        method = getattr(parallel.ProcessPoolExecutor, name)
        monkeypatch.setattr(
            parallel.ProcessPoolExecutor, name,
            lambda *arguments, method=method, **options: (used.append(threading.current_thread()), method(*arguments, **options))[1],
        )  # fmt: skip
    assert list(in_processes(operator.add, [("", (i, 1)) for i in range(4)], 4, "adding")) == [1, 2, 3, 4]
    assert len(used) == 3 + 1 and threading.main_thread() not in used


def workers(process: psutil.Process) -> list[psutil.Process]:
    """Its processes, without the one that watches over semaphores until it ends."""
    return [child for child in process.children() if "resource_tracker" not in " ".join(child.cmdline())]
