"""No process outlives the one that started it, whatever ends that one."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import nbformat
import psutil
import pytest
from common import ROOT
from killing import wait_for

pytestmark = pytest.mark.skipif(not hasattr(os, "getppid") or sys.platform == "win32", reason="needs POSIX")

PATIENCE = 20
"""Seconds for all to be gone; the jobs would go on for ten minutes."""
JOBS = """
import sys, time
from pathlib import Path
from stego_lib.utils import pool as parallel
parallel.WORTH, parallel.cpu_count = -1, lambda: 2
jobs = [(str(i), (0.01 if i < 2 else 600,)) for i in range(9)]
for done, _ in enumerate(parallel.in_processes(time.sleep, jobs, 9, "sleeping")):
    Path({told!r}).write_text(str(done))
"""
"""Writes the number of the last job that is done; after number 1 both workers sleep."""


def descendants(command: list[str], told: Path) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """Starts a command and waits until its jobs are in work: the process, and all that it started."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=told.parent, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(lambda: process.poll() is not None or (told.exists() and told.read_text() == "1"))
    found = psutil.Process(process.pid).children(recursive=True)
    assert len(found) >= 2
    return process, found


def write_notebook(folder: Path) -> Path:
    """Writes jobs.ipynb, a notebook with jobs; the file that tells when they are in work."""
    told = folder / "told"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cell = nbformat.v4.new_code_cell(JOBS.format(told=str(told)))
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), folder / "jobs.ipynb")
    return told


def ended(process: subprocess.Popen, found: list[psutil.Process]) -> int:
    """Waits until all are gone; the exit status of the first."""
    try:
        assert not psutil.wait_procs(found, timeout=PATIENCE)[1], "processes are left"
        return process.wait(PATIENCE)
    finally:
        for one in [process, *found]:
            with suppress(psutil.NoSuchProcess):
                one.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_processes_of_a_script_end_with_it(tmp_path, number):
    told = tmp_path / "told"
    (tmp_path / "script.py").write_text(JOBS.format(told=str(told)))
    process, found = descendants([sys.executable, str(tmp_path / "script.py")], told)
    process.send_signal(number)
    assert ended(process, found) == -number


@pytest.mark.parametrize(
    "module, number, status",
    [
        ("papermill", signal.SIGTERM, -signal.SIGTERM),
        ("stego_book.notebooks", signal.SIGTERM, 128 + signal.SIGTERM),
        ("stego_book.notebooks", signal.SIGINT, 130),
        ("stego_book.notebooks", signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_the_kernel_of_a_notebook_and_its_processes_end_with_whoever_runs_it(tmp_path, module, number, status):
    told = write_notebook(tmp_path)
    process, found = descendants([sys.executable, "-m", module, "jobs.ipynb", "out.ipynb"], told)
    process.send_signal(number)
    assert ended(process, found) == status


def test_processes_end_with_a_kernel_that_is_ended(tmp_path):
    told = write_notebook(tmp_path)
    process, found = descendants([sys.executable, "-m", "stego_book.notebooks", "jobs.ipynb", "out.ipynb"], told)
    psutil.Process(process.pid).children()[0].terminate()
    assert ended(process, found) == 1
