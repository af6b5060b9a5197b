"""Bars where somebody looks, few updates where a notebook runs unattended; notices in one line."""

import subprocess
import sys
from types import SimpleNamespace

import nbclient
import nbformat
import pytest
from common import ROOT

from stego_lib.utils import progress as module
from stego_lib.utils.progress import progress, say, stage


def kernel(monkeypatch, attended: bool) -> None:
    """As if this were the kernel of a notebook whose front end somebody watches, or not."""
    shell = SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=attended))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.delenv(module.BARS, raising=False)


@pytest.mark.parametrize("seconds, updates", [(20, 0), (100, 3)])
def test_an_unattended_notebook_gets_few_updates_and_none_for_short_work(monkeypatch, capsys, seconds, updates):
    kernel(monkeypatch, attended=False)
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    for _ in progress(range(1000), "training"):
        now[0] += seconds / 1000
    assert capsys.readouterr().err.count("training: ") == updates


@pytest.mark.parametrize("requested", [True, False])
def test_people_get_bars(monkeypatch, capsys, requested):
    kernel(monkeypatch, attended=not requested)
    if requested:  # the project's runner, at a terminal
        monkeypatch.setenv(module.BARS, "1")
    list(progress(range(3), "training"))
    with stage("fitting probes"):
        pass
    said = capsys.readouterr().err
    assert "\rtraining: " in said and "fitting probes ..." in said


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_only_the_first_of_several_processes_shows_bars(monkeypatch, capsys, variable):
    for rank in ("1", "0"):
        monkeypatch.setenv(variable, rank)
        assert list(progress(range(3), "training")) == [0, 1, 2]
        assert bool(capsys.readouterr().err) == (rank == "0")


def test_nothing_is_shown_without_an_error_stream(monkeypatch):
    """As in QGIS and under pythonw."""
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress(range(3), "training")) == [0, 1, 2]
    with stage("fitting probes"):
        say("a line")


SOURCE = """import warnings
from stego_lib.utils.notices import Notice, notice

def train():
    notice("batch_size is 12, not 16")  # a line of ours

train()
"""
FILTERED = f"{SOURCE}warnings.simplefilter('ignore', Notice)\ntrain()\nwarnings.warn('elsewhere')\n"


def test_in_a_script(tmp_path):
    (tmp_path / "script.py").write_text(FILTERED)
    command = [sys.executable, tmp_path / "script.py"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stderr
    line, other = shown.split("\n", 1)
    assert line == "Notice: batch_size is 12, not 16" and "script.py:10: UserWarning: elsewhere" in other


def test_in_a_notebook_and_the_page_made_of_it():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SOURCE)])
    nbclient.NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    (output,) = notebook.cells[0].outputs
    assert (output.name, output.text) == ("stderr", "Notice: batch_size is 12, not 16\n")
