"""Parameters of notebooks: text stays text, and a value of another type is refused before anything runs."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import pytest
from common import ROOT

from stego_book.notebooks import check_parameters, declared, main, run_notebook
from stego_lib import StegoError
from stego_lib.utils.progress import BARS

CELL = """
folder: str = None  # a path
place: str = "here"  # text that cannot be None
count: int = 3  # a whole number
most: int = None  # one that is open
share: float = 0.5  # a number
switch: bool = True  # on or off
"""
TEXTS = [
    "2024_01", "0007", "20240101", "2025", "1e5", "0x10", "0o17", "1_000", "-3", "3.10", "no", "on", "off", "yes", "true", "True", "null", "~",
    "2024-01-01", "12:30:00", "photos #2", "a: b", "@home", "*all", "&x", "!x", "%x", "`x`", "[a, b]", "{a: b}", "- a", "a\\b", "it's", '"q"', " a ",
    "Ärzte", "写真", "nan", ".inf", "=", "",
]  # fmt: skip
"""What YAML, or papermill's own reading, makes something else of."""


@pytest.fixture
def notebook(tmp_path) -> Path:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [
        nbformat.v4.new_code_cell(CELL, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("from stego_book.notebooks import check_parameters\ncheck_parameters()"),
        nbformat.v4.new_code_cell("print(repr(folder), count, share, switch)", metadata={"tags": ["summary"]}),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "a.ipynb")
    return tmp_path / "a.ipynb"


@pytest.fixture
def handed(monkeypatch, notebook):
    """What the command line hands to papermill, which does not run."""
    found = []

    def execute(notebook, output, parameters, **options):
        found.append(parameters)
        return nbformat.v4.new_notebook()

    monkeypatch.setattr(papermill, "execute_notebook", execute)

    def run(*words: str) -> dict:
        assert main([str(notebook), str(notebook.with_name("out.ipynb")), *words]) == 0
        return found[-1]

    return run


@pytest.mark.parametrize("text", TEXTS)
def test_text_stays_text_where_text_is_declared(handed, text):
    assert handed("-p", "folder", text) == {"folder": text}


@pytest.mark.parametrize("terminal", [True, False])
def test_the_kernel_draws_bars_where_the_runner_is_at_a_terminal(handed, monkeypatch, terminal):
    told = []
    execute = papermill.execute_notebook
    monkeypatch.setattr(
        papermill,
        "execute_notebook",
        lambda *given, **options: (told.append(BARS in os.environ), execute(*given, **options))[1],
    )
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.delenv(BARS, raising=False)
    handed()
    assert told == [terminal] and BARS not in os.environ


def test_none_leaves_an_optional_parameter_open(handed):
    assert handed("-p", "folder", "None", "-p", "most", "None") == {"folder": None, "most": None}
    assert handed("-p", "place", "None") == {"place": "None"}


def test_numbers_and_switches_are_read_by_their_type(handed):
    given = handed("-p", "count", "0012", "-p", "share", "1e-3", "-p", "most", "1_000")
    assert given == {"count": 12, "share": 0.001, "most": 1000}
    for texts, value in ((("True", "true", "yes", "on", "1"), True), (("False", "false", "no", "off", "0"), False)):
        assert all(handed("-p", "switch", text) == {"switch": value} for text in texts)


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("count", "many", "count = 'many': a whole number is expected"),
        ("count", "1e3", "count = '1e3': a whole number is expected"),
        ("count", "2.5", "count = '2.5': a whole number is expected"),
        ("count", "None", "count = 'None': a whole number is expected"),
        ("most", "", "most = '': a whole number is expected"),
        ("share", "half", "share = 'half': a number is expected"),
        ("share", "nan", "share = nan: a number is expected"),
        ("switch", "maybe", "switch = 'maybe': True or False is expected"),
    ],
)
def test_what_is_of_another_type_is_named_before_anything_runs(notebook, capsys, name, value, expected):
    assert main([str(notebook), str(notebook.with_name("out.ipynb")), "-p", name, value]) == 2
    assert expected in capsys.readouterr().err and not notebook.with_name("out.ipynb").exists()


def test_values_from_python_are_checked_too_and_paths_are_text(notebook, tmp_path):
    for wrong in ({"folder": 2025}, {"switch": 1}, {"count": True}, {"count": 1.0}, {"place": None}):
        with pytest.raises(StegoError, match="is expected"):
            run_notebook(notebook, tmp_path / "out.ipynb", wrong)
    text = run_notebook(notebook, tmp_path / "{out}" / "o {1}.ipynb", {"folder": tmp_path / "0007", "share": 1})
    assert text == f"{str(tmp_path / '0007')!r} 3 1 True\n"
    assert (tmp_path / "{out}" / "o {1}.ipynb").exists(), "papermill would fill in what stands in braces"


def test_declarations_are_read_as_python_reads_them():
    found = declared(
        'a: str | None = "x"\nb: "int" = 3\nc = 2.5\nd = None\ne: list[int] = [1]\nf: float\ng: bool = False'
    )
    kinds = {name: (one.kind, one.optional) for name, one in found.items()}
    assert kinds == {
        "a": ("str", True), "b": ("int", False), "c": ("float", False), "d": (None, True), "e": (None, False),
        "f": ("float", False), "g": ("bool", False),
    }  # fmt: skip


@pytest.mark.parametrize(
    "injected, expected",
    [
        ("folder = 202401", r"folder = 202401: text is expected\. .* write -r folder TEXT instead, or put quotes"),
        ("folder = True", r"folder = True: text is expected\. .* -r folder TEXT"),
        ("folder = float('nan')", r"folder = nan: text is expected"),
        ("folder = 1000.0", r"folder = 1000\.0: text is expected"),
        ('folder = ["a"]', r"folder = \['a'\]: text is expected"),
        ("place = None", r"place = None: text is expected"),
        ('switch = "false"', r"switch = 'false': True or False is expected\. .*-p switch True or -p switch False"),
        ("switch = 0", r"switch = 0: True or False is expected"),
        ('count = "many"', r"count = 'many': a whole number is expected"),
        ("count = 2.0", r"count = 2\.0: a whole number is expected"),
        ("share = float('inf')", r"share = inf: a number is expected"),
    ],
)
def test_under_plain_papermill_a_value_of_another_type_is_an_error_that_says_how_to_write_it(
    monkeypatch, injected, expected
):
    shell = SimpleNamespace(user_ns={"In": [CELL, f"# Parameters\n{injected}\n"]})
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    with pytest.raises(StegoError, match=expected):
        check_parameters()


def test_what_papermill_and_people_write_rightly_passes(monkeypatch):
    good = '# Parameters\nfolder = "2024_01"\nmost = None\nshare = 1\nswitch = False\ncount = -1\n'
    cells = [CELL, good, "folder = 5  # of the notebook itself, later"]
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(user_ns={"In": cells}))
    check_parameters()
    cells[:] = [CELL.replace('"here"', "2024"), CELL]  # mended, and run again
    check_parameters()
    cells[:] = [CELL, CELL.replace("None  # a path", "2024_01")]
    with pytest.raises(StegoError, match=r"folder = 202401: text is expected$"):
        check_parameters()


def test_papermill_itself_stops_before_anything_runs(notebook, tmp_path):
    command = [sys.executable, "-m", "papermill", "a.ipynb", "out.ipynb", "-p", "folder", "2024_01"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "StegoError: folder = 202401: text is expected" in done.stderr
    done = subprocess.run(
        [*command[:-3], "-r", "folder", "2024_01"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_the_runner_says_in_one_line_what_is_no_notebook_or_no_place_for_the_copy(notebook, tmp_path, capsys):
    (tmp_path / "text.ipynb").write_text("no JSON")
    (tmp_path / "list.ipynb").write_text("[1]")
    (tmp_path / "other.ipynb").write_text('{"a": 1}')
    (tmp_path / "bytes.ipynb").write_bytes(b"\xff\xfe\x00")
    os.symlink(notebook, tmp_path / "link.ipynb")
    kernel = {"name": "klingon", "display_name": "?", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(metadata={"kernelspec": kernel}), tmp_path / "kernel.ipynb")
    out, before = str(tmp_path / "out.ipynb"), notebook.read_bytes()
    for given, output, expected in (
        ("b.ipynb", out, "there is no notebook"),
        ("aa.ipynb", out, "did you mean 'a.ipynb'?"),
        (".", out, "is a folder; name a notebook in it"),
        ("text.ipynb", out, "is not a notebook, or a damaged one"),
        ("list.ipynb", out, "is not a notebook, or a damaged one"),
        ("other.ipynb", out, "is not a notebook, or a damaged one"),
        ("bytes.ipynb", out, "is not a notebook, or a damaged one"),
        ("a.ipynb", str(tmp_path), "is a folder; name the file that the executed copy goes to"),
        ("a.ipynb", str(notebook), "would replace the notebook"),
        ("a.ipynb", str(tmp_path / "link.ipynb"), "would replace the notebook"),
        ("a.ipynb", str(notebook / "out.ipynb"), "cannot be written"),
        ("a.ipynb", "/proc/out.ipynb", "cannot be written"),
        ("a.ipynb", "", "an empty path names nothing"),
        ("kernel.ipynb", out, "asks for the kernel 'klingon', which is not installed"),
    ):
        assert main([str(tmp_path / given), output]) == 2, (given, output)
        said = capsys.readouterr().err
        assert expected in said and said.count("\n") == 1 and "Traceback" not in said, said
    assert notebook.read_bytes() == before


def test_a_kernel_that_dies_is_told_in_one_line(notebook, tmp_path, capsys):
    content = nbformat.read(notebook, 4)
    content.cells.append(nbformat.v4.new_code_cell("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"))
    nbformat.write(content, notebook)
    assert main([str(notebook), str(tmp_path / "out.ipynb")]) == 1
    assert "the kernel of" in (said := capsys.readouterr().err) and "died" in said and "Traceback" not in said


def test_a_former_name_of_a_parameter_names_the_present_one(tmp_path):
    notebook = ROOT / "notebooks" / "segment_your_images.ipynb"
    with pytest.raises(
        StegoError, match=r"no parameter 'pictures' \(it is called 'images' now\)"
    ):  # codespell:ignore pictures
        run_notebook(notebook, tmp_path / "out.ipynb", {"pictures": "x"})  # codespell:ignore pictures
    with pytest.raises(
        StegoError, match=r"no parameter 'devices' \(use `torchrun --nproc-per-node N train\.py` for several devices\)"
    ):
        run_notebook(ROOT / "notebooks" / "train.ipynb", tmp_path / "out.ipynb", {"devices": 2})
    with pytest.raises(StegoError, match=r"no parameter 'pictures'(?! \(it is called)"):  # codespell:ignore pictures
        run_notebook(
            ROOT / "notebooks" / "train.ipynb", tmp_path / "out.ipynb", {"pictures": "x"}
        )  # codespell:ignore pictures
