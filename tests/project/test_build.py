"""The book's builder: which notebooks it runs, and what it makes of the renderer's warnings. Neither is run here."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from common import ROOT
from nbformat.v4 import new_code_cell, new_notebook

sys.path.insert(0, str(ROOT / "book"))
import build

NAME = "notebooks/a"


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project of one notebook with the parameter `steps`."""
    for file in ("stego_lib/a.py", "book/records/a.json"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("")
    cell = new_code_cell("steps: int = 5  # training steps", metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (tmp_path / "notebooks").mkdir()
    nbformat.write(new_notebook(cells=[cell], metadata={"kernelspec": kernel}), tmp_path / f"{NAME}.ipynb")
    for name, path in {"ROOT": "", "BUILD": "_build", "SOURCE": "_build/source"}.items():
        monkeypatch.setattr(build, name, tmp_path / path)
    return tmp_path


@pytest.fixture
def ran(monkeypatch) -> list[list[str]]:
    """The arguments of each call of the runner. The stand-in writes the executed copy as the runner does."""
    commands = []

    def run(command: list[str]) -> int:
        commands.append(command)
        executed = nbformat.read(command[0], 4)
        given = dict(zip(command[3::3], map(int, command[4::3]), strict=True))
        executed.metadata["papermill"] = {"parameters": given}
        Path(command[1]).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(executed, command[1])
        return 0

    monkeypatch.setattr(build, "run_notebook", run)
    return commands


def test_a_notebook_runs_when_it_or_what_it_uses_or_a_parameter_has_changed(project, ran):
    executed = project / "_build" / "source" / f"{NAME}.ipynb"
    build.run_all([NAME], {"steps": "3", "unknown": "1"})
    assert executed.exists() and ran[0][2:] == ["-p", "steps", "3"], "a parameter goes to the notebooks that have it"
    build.run_all([NAME], {"steps": "3"})
    assert len(ran) == 1, "nothing has changed"
    for number, file in enumerate(("stego_lib/a.py", "book/records/a.json", f"{NAME}.ipynb"), start=2):
        later = executed.stat().st_mtime + 1
        os.utime(project / file, (later, later))
        build.run_all([NAME], {"steps": "3"})
        assert len(ran) == number, file
        os.utime(executed, (later + 1, later + 1))
    build.run_all([NAME], {})
    assert ran[-1][2:] == [] and len(ran) == 5


def test_a_notebook_that_fails_ends_the_build_and_is_no_chapter(project, monkeypatch):
    monkeypatch.setattr(build, "run_notebook", lambda _: 1)
    with pytest.raises(SystemExit, match=r"notebooks/a failed; the notebook up to the error: .*running/a\.ipynb"):
        build.run_all([NAME], {})
    assert not list((project / "_build").rglob("a.ipynb"))


@pytest.mark.parametrize("status", [0, 1])
def test_a_warning_of_the_renderer_ends_the_build(project, monkeypatch, status):
    commands = []
    monkeypatch.setattr(build, "HTML", project / "html")
    monkeypatch.setattr(
        subprocess, "run", lambda command: commands.append(command) or SimpleNamespace(returncode=status)
    )
    if status:
        with pytest.raises(SystemExit, match="does not build without warnings"):
            build.render()
    else:
        build.render()
    assert {"-W", "--all"} <= set(commands[0]), "warnings are errors, and no page is passed over"


def test_faults_of_what_was_rendered_end_the_build(monkeypatch, capsys):
    done = []
    for step in ("run_all", "put_together", "render"):
        monkeypatch.setattr(build, step, lambda *_, step=step: done.append(step))
    monkeypatch.setattr(build, "browser_files", lambda: True)
    monkeypatch.setattr(build, "problems", lambda *_: [])
    build.main(["--no-run"])
    assert done == ["put_together", "render"] and "index.html" in capsys.readouterr().out
    monkeypatch.setattr(build, "problems", lambda *_: ["a.html: leads nowhere: b.html"])
    with pytest.raises(SystemExit, match=r"the book has faults:\na\.html: leads nowhere: b\.html"):
        build.main([])
    assert done[2:] == ["run_all", "put_together", "render"]


@pytest.mark.parametrize(
    "address, found",
    [
        ("https://github.com/someone/project.git", "https://github.com/someone/project"),
        ("git@github.com:someone/project.git", "https://github.com/someone/project"),
        ("https://github.com/someone/project/", "https://github.com/someone/project"),
        ("https://example.org/someone/project.git", None),
        (None, None),
    ],
)
def test_the_address_of_the_repository_is_that_of_the_checkout(project, address, found):
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    if address:
        subprocess.run(["git", "remote", "add", "origin", address], cwd=project, check=True)
    assert build.remote() == found
