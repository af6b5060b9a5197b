"""Bars where somebody looks; few updates where a notebook runs unattended; nothing without an error stream."""

import sys
from types import SimpleNamespace

import pytest

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
