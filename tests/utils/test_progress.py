"""Bars where somebody looks; lines, few of them, where a notebook runs unattended; names for what has no steps."""

import sys
from types import SimpleNamespace

import pytest

from stego_lib.utils import progress as module
from stego_lib.utils.progress import progress, stage


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, in seconds, that lines are spaced by."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.Lines, "last", 1000.0)
    return now


def kernel(monkeypatch, asks: bool) -> None:
    """As if this were the kernel of a notebook whose front end can be asked something, or not."""
    found = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=asks)))
    monkeypatch.setitem(sys.modules, "IPython", found)
    monkeypatch.delenv(module.BARS, raising=False)


def work(clock: list[float], seconds: float) -> None:
    for _ in progress(range(1000), "training"):
        clock[0] += seconds / 1000
    with stage("fitting probes"):
        clock[0] += 1


@pytest.mark.parametrize("seconds, lines", [(20, 0), (100, 3), (36_000, 10)])
def test_an_unattended_notebook_gets_few_lines_and_none_for_short_work(monkeypatch, clock, capsys, seconds, lines):
    kernel(monkeypatch, asks=False)
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    work(clock, seconds)
    said = capsys.readouterr().err
    assert "\r" not in said
    told = [line for line in said.splitlines() if line.startswith("training: ") and line.endswith(" of 1,000")]
    assert abs(len(told) - lines) <= 1, told
    assert said.splitlines()[len(told) :] in ([], ["fitting probes"]), (
        "a part that has no steps is named when it begins"
    )


def test_a_part_without_steps_is_named_when_it_begins(monkeypatch, clock, capsys):
    kernel(monkeypatch, asks=False)
    clock[0] += module.LINE_EVERY
    with stage("fitting probes"):
        assert capsys.readouterr().err == "fitting probes\n"
    with stage("another at once"):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("asked", [True, False])
def test_people_in_jupyterlab_and_at_a_terminal_get_bars(monkeypatch, capsys, asked):
    kernel(monkeypatch, asks=not asked)
    if asked:  # the project's runner, at a terminal
        monkeypatch.setenv(module.BARS, "1")
    list(progress(range(3), "training"))
    with stage("fitting probes"):
        pass
    said = capsys.readouterr().err
    assert "\rtraining: " in said and "fitting probes ..." in said


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_of_several_processes_the_first_one_alone_shows_bars(monkeypatch, capsys, variable):
    for rank in ("1", "0"):
        monkeypatch.setenv(variable, rank)
        assert list(progress(range(3), "training")) == [0, 1, 2]
        with stage("fitting probes"):
            pass
        assert bool(capsys.readouterr().err) == (rank == "0")
