"""The notebook runner: names and types of parameters, text that stays text, what it prints."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import psutil
import pytest
from common import ROOT
from killing import wait_for
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from stego_book.notebooks import CHOICES, main, parameters_of, run_notebook
from stego_lib import StegoError
from stego_lib.predict import REFINEMENTS

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CELL = """
folder: str = None  # optional text
place: str = "here"  # text
count: int = 3  # a whole number
most: int = None  # an optional one
share: float = 0.5  # a number
switch: bool = True  # on or off
refine: str = None  # one of two
"""
CHECK = "from stego_book.notebooks import check_parameters\n\ncheck_parameters()"
# YAML or papermill turns each of these into something else.
TEXTS = [
    "2024_01", "0007", "1e5", "0x10", "true", "null", "~", "2024-01-01", "a: b", "[a, b]", "it's", " a ", "写真", "",
]  # fmt: skip


def write_notebook(path: Path, last: str) -> Path:
    cells = [
        nbformat.v4.new_code_cell(CELL, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(CHECK),
        nbformat.v4.new_code_cell(last, metadata={"tags": ["summary"]}),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    return write_notebook(tmp_path / "a.ipynb", "print(repr(folder), count, share, switch)")


def test_choices_are_checked_before_work(notebook):
    assert CHOICES["refine"] == REFINEMENTS
    known = parameters_of(notebook)
    assert [known["refine"].parse(text) for text in ("None", *REFINEMENTS)] == [None, *REFINEMENTS]
    with pytest.raises(StegoError, match="refine"):
        known["refine"].check("CRF")


def test_values_are_read_by_their_declared_type(notebook):
    known = parameters_of(notebook)
    assert [known["folder"].parse(text) for text in TEXTS] == TEXTS
    assert known["folder"].parse("None") is None and known["place"].parse("None") == "None"
    assert known["count"].parse("0012") == 12 and known["share"].parse("1e-3") == 0.001
    assert [known["switch"].parse(text) for text in ("yes", "False", "on", "0")] == [True, False, True, False]


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("count", "2.5", "count="), ("count", "None", "count="), ("count", "0", "count="), ("most", "", "most="),
        ("share", "half", "share="), ("share", "nan", "share="), ("switch", "maybe", "switch="),
        ("fodler", "x", "'folder'"),
    ],
)  # fmt: skip
def test_a_wrong_parameter_stops_before_anything_runs(notebook, tmp_path, capsys, name, value, said):
    assert main([str(notebook), str(tmp_path / "out.ipynb"), "-p", name, value]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out.ipynb").exists()


def test_values_from_python_are_checked_and_paths_are_text(notebook, tmp_path):
    for wrong in ({"folder": 2025}, {"switch": 1}, {"count": True}, {"count": 1.0}, {"place": None}, {"other": 1}):
        with pytest.raises(StegoError, match=next(iter(wrong))):
            run_notebook(notebook, tmp_path / "out.ipynb", wrong)
    text = run_notebook(notebook, tmp_path / "new" / "out.ipynb", {"folder": tmp_path / "0007", "share": 1})
    assert text == f"{str(tmp_path / '0007')!r} 3 1 True\n"


def test_the_check_inside_a_notebook(notebook, tmp_path, monkeypatch):
    """As seen by people who call papermill directly: one run, and what papermill would run with other parameters."""
    with pytest.raises(papermill.PapermillExecutionError, match="folder"):
        papermill.execute_notebook(str(notebook), str(tmp_path / "out.ipynb"), {"folder": 202401}, progress_bar=False)

    def check(parameters):
        cells = parameterize_notebook(load_notebook_node(str(notebook)), parameters).cells
        shell = SimpleNamespace(user_ns={"In": [cell.source for cell in cells]})
        monkeypatch.setattr("IPython.get_ipython", lambda: shell)
        for cell in cells[:-1]:  # the last but one checks
            exec(cell.source, shell.user_ns)

    for wrong in ({"folder": 202401}, {"share": float("nan")}, {"switch": "false"}, {"fodler": "x"}):
        with pytest.raises(StegoError, match=next(iter(wrong))):
            check(wrong)
    check({"folder": "2024_01", "most": None, "share": 1, "count": 1})


def test_what_is_not_a_notebook_is_one_line(notebook, tmp_path, capsys):
    (tmp_path / "text.ipynb").write_text("no JSON")
    (tmp_path / "other.ipynb").write_text('{"a": 1}')
    for name in ("b", "text", "other", "a"):  # the last is its own output
        output = "a.ipynb" if name == "a" else "out.ipynb"
        assert main([str(tmp_path / f"{name}.ipynb"), str(tmp_path / output)]) == 2, name
        assert capsys.readouterr().err.count("\n") == 1


def test_a_dead_kernel_is_reported(tmp_path, capsys):
    notebook = write_notebook(tmp_path / "a.ipynb", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert main([str(notebook), str(tmp_path / "out.ipynb")]) == 1
    assert "died" in capsys.readouterr().err


def test_only_an_error_that_a_user_can_fix_comes_without_traceback(tmp_path, capsys):
    """In the notebook and on the command line: a bug of ours keeps the lines that led to it."""
    fault = "import stego_lib\n\nstego_lib.Experiment(steps=-1)"
    bug = "from stego_lib.metrics import match\n\nmatch(None)"
    for number, (source, traceback) in enumerate(((fault, False), (bug, True))):
        notebook, output = write_notebook(tmp_path / f"{number}.ipynb", source), tmp_path / f"out{number}.ipynb"
        assert main([str(notebook), str(output)]) == 1
        shown = capsys.readouterr().err
        (error,) = [out for cell in nbformat.read(output, 4).cells for out in cell.get("outputs", []) if "ename" in out]
        assert ("metrics.py" in shown) == ("metrics.py" in "".join(error.traceback)) == traceback
        assert traceback or (len(error.traceback) == 1 and shown.count("\n") == 2 and "steps=-1" in shown)
        assert "\x1b" not in shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_kernel(tmp_path, number):
    notebook = write_notebook(tmp_path / "a.ipynb", "open('started', 'w').close()\nimport time\ntime.sleep(600)")
    command = [sys.executable, "-m", "stego_book.notebooks", str(notebook), str(tmp_path / "out.ipynb")]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    wait_for((tmp_path / "started").exists)
    kernels = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, number)
    assert process.wait(60) == 128 + number
    assert kernels and not psutil.wait_procs(kernels, timeout=10)[1]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_check_their_parameters_and_explain_them(notebook):
    parameters = papermill.inspect_notebook(str(notebook))
    for name, about in parameters.items():
        assert about["inferred_type_name"] in ("str", "int", "bool", "float", "list[int]"), name
        assert about["default"] != "" and len(about["help"]) > 10, name
    content = nbformat.read(notebook, 4)
    code = [cell for cell in content.cells if cell.cell_type == "code"]
    at = next(number for number, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", []))
    assert at == 1 and "check_parameters()" in code[2].source
    assert not any(cell.outputs or cell.execution_count for cell in code), "stored without outputs"
