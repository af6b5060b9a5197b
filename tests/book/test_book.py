"""The book's pages and its build, as far as they can be checked without building it; `make book` checks the rest."""

import ast
import inspect
import pydoc
import re
import textwrap
from functools import cache
from pathlib import Path

import nbformat
import numpy as np
import pytest
from common import ROOT, tiny_experiment
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

import stego_lib
from stego_book import build, check
from stego_book.listing import source_without_sections
from stego_book.studies.results import fill_tables
from stego_book.studies.speed import Costs
from stego_lib import Experiment, Run
from stego_lib.metrics import match, scores
from stego_lib.utils import paths

pytestmark = pytest.mark.usefixtures("few_samples")

PAGES = build.pages(ROOT / "book" / "_toc.yml")
CHAPTERS = [ROOT / f"{name}.ipynb" for name in PAGES if name.startswith("notebooks/")]
TEXTS = [ROOT / f"{name}.md" for name in PAGES if not name.startswith("notebooks/")]
# Notebooks that are no chapters: they train for long, and the book has tables made from their records.
OUTSIDE = {"seeds", "reproduce"}
DRAWS = re.compile(
    r"\b(plots(_\w+)?\.(?!use_style|save|KINDS|paint)\w+|plt\.subplots|sns\.(rel|cat|dis)plot)\(|^figure;$",
    re.MULTILINE,
)
RESULT = re.compile(
    r"\d(\s*%|\s*percent|\s*mIoU|\s*percentage points)|\b(mIoU|accuracy|AP)\b( of| is|:)? \d", re.IGNORECASE
)
# Numbers that look like results and that a named test asserts.
ASSERTED = {"fidelity": ["99.9 % of the pixels", "99.5 % after the CRF"]}


@cache
def prose(path: Path) -> str:
    """The text of a page or chapter, without tables made from records."""
    if path.suffix == ".md":
        text = path.read_text()
    else:
        text = "\n\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
    return re.sub(r"<!-- table: .*?<!-- end -->", "", text, flags=re.DOTALL)


@cache
def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code" and cell.id != "colab"]


def figure_of(cell) -> dict:
    return cell.metadata.get("mystnb", {}).get("figure", {})


def test_the_table_of_contents_names_every_page_once():
    present = {f"book/{path.stem}" for path in (ROOT / "book").glob("*.md")}
    present |= {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb") if path.stem not in OUTSIDE}
    assert sorted(PAGES) == sorted(present) and PAGES[0] == "book/index"
    assert build.notebooks(ROOT / "book" / "_toc.yml")[0] == "notebooks/train"


def test_every_figure_has_a_name_of_its_own_a_caption_and_an_alternative_text():
    names = []
    for cell in (cell for path in CHAPTERS for cell in code_cells(path)):
        if DRAWS.search(cell.source) and "explorer_html" not in cell.source:
            names.append(figure_of(cell).get("name", ""))
            assert names[-1].startswith("fig-"), cell.source
            assert len(figure_of(cell)["caption"]) > 15 and len(cell.metadata["mystnb"]["image"]["alt"]) > 25, names[-1]
    assert len(names) == len(set(names)) >= 10


@pytest.mark.parametrize("path", [*CHAPTERS, *TEXTS], ids=lambda path: path.stem)
def test_no_result_is_typed_by_hand(path):
    text = prose(path)
    for phrase in ASSERTED.get(path.stem, []):
        text = text.replace(phrase, "")
    assert not [text[max(0, match.start() - 30) : match.end() + 20] for match in RESULT.finditer(text)]


def test_the_reference_begins_with_what_users_call():
    names = re.findall(r"^   ~(stego_\w+\.\S+)$", (ROOT / "book" / "api.md").read_text(), re.MULTILINE)
    assert [name for name in names if not getattr(pydoc.locate(name), "__doc__", None)] == []
    assert set(stego_lib.__all__) - {"PRESETS", "DataNotFound", "StegoError"} <= {name.split(".")[-1] for name in names}


NAMING = [*TEXTS, *sorted((ROOT / "notebooks").glob("*.ipynb")), *sorted((ROOT / "stego_lib" / "weights").glob("*.md"))]
NAMING += [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md"]


@pytest.mark.parametrize("path", NAMING, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_module_that_a_page_names_exists(path):
    text = prose(path) + ("" if path.suffix == ".md" else "\n".join(cell.source for cell in code_cells(path)))
    names = set(re.findall(r"\bstego_(?:lib|book)(?:\.[A-Za-z_]\w*)+", text))
    assert {name for name in names if pydoc.locate(name) is None} == set()


def test_the_tables_of_the_welcome_page_are_those_of_the_records():
    """Update them with: python -m stego_book.studies.results book/index.md"""
    text = (ROOT / "book" / "index.md").read_text()
    assert text.count("<!-- table: ") >= 1 and fill_tables(text, ROOT / "book") == text


@pytest.mark.parametrize(
    "output, faults",
    [
        (new_output("display_data", {"image/png": "iVBORw=="}), []), (None, ["fig-x"]),
        (new_output("error", ename="ZeroDivisionError", evalue="", traceback=[]), ["ZeroDivisionError", "fig-x"]),
    ],
    ids=["none", "no figure", "error"],
)  # fmt: skip
def test_errors_and_missing_figures_of_a_notebook_are_reported(tmp_path, output, faults):
    cell = new_code_cell("figure;", outputs=[output] if output else [])
    cell.metadata["mystnb"] = {"figure": {"name": "fig-x"}}
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "a.ipynb")
    found = list(check.errors(tmp_path / "a.ipynb"))
    assert len(found) == len(faults) and all(word in line for word, line in zip(faults, found, strict=True))


def test_folds_are_labeled_and_deviations_stay_on_the_line_of_their_mean(tmp_path):
    cells = [
        new_code_cell("steps = 1", metadata={"tags": ["parameters", "hide-input"]}),
        new_markdown_cell("## Exercises"),
    ]
    table = new_output("execute_result", {"text/html": "<td>1.0 ± 0.2</td>"})
    cells.append(new_code_cell("scores", metadata={"tags": ["hide-cell"]}, outputs=[table]))
    nbformat.write(new_notebook(cells=cells), tmp_path / "a.ipynb")
    build.polish(tmp_path / "a.ipynb")
    first, _, last = nbformat.read(tmp_path / "a.ipynb", 4).cells
    assert first.metadata.mystnb.code_prompt_show == "Show parameters"
    assert last.metadata.mystnb.code_prompt_show == "Show solution"
    assert last.outputs[0].data["text/html"] == "<td>1.0\u00a0±\u00a00.2</td>"


GOOD = """<html><body><img src="other.html"><article><h1 id="top">x</h1><a href="other.html#there">o</a>
<a href="#top">t</a><a href="https://example.org/a">elsewhere</a>
<img src="p.png" alt="An image of something"></article></body></html>"""


@pytest.mark.parametrize(
    "good, bad, fault",
    [
        ("", "", None),
        ("other.html#there", "gone.html", "gone.html"),
        ("other.html#there", "other.html#nowhere", "other.html#nowhere"),
        ("#top", "#bottom", "#bottom"),
        ('src="p.png"', 'src="q.png"', "q.png"),
        ('src="p.png"', 'src="https://example.org/p.png"', "network"),
        ('alt="An image of something"', "", "alternative text"),
        (">t</a>", ">t</a><p>| a | b | |—|—| | 1 | 2 |</p><pre>|---|---|</pre>", "table"),
    ],
)
def test_faults_of_a_page_are_reported(tmp_path, good, bad, fault):
    (tmp_path / "page.html").write_text(GOOD.replace(good, bad) if good else GOOD)
    (tmp_path / "other.html").write_text('<html><body><p id="there">x</p></body></html>')
    (tmp_path / "p.png").write_bytes(b"x")
    faults = check.problems(tmp_path, [])
    assert faults == [] if fault is None else len(faults) == 1 and fault in faults[0]


BLOCKS = [
    pytest.param(block, id=f"{path.stem}-{number}")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md", *TEXTS]
    if path.stem != "ten_minutes"
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL))
]


@pytest.fixture
def reader(scenes_root, tmp_path, monkeypatch) -> None:
    """A reader of the pages, in a folder with data/ and image.jpg; recipes are tiny, and runs lie in the folder."""
    recipe = Experiment.preset.__func__

    def tiny(cls, name, **changes):
        requested = recipe(cls, name, **changes)  # what the block names must exist
        return tiny_experiment(scenes_root, requested.backbone, steps=2, seed=requested.seed)

    monkeypatch.setattr(Experiment, "preset", classmethod(tiny))
    monkeypatch.setattr(paths, "project_root", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(scenes_root)
    Image.new("RGB", (50, 30), "green").save("image.jpg")


@pytest.mark.parametrize("block", BLOCKS)
def test_python_in_the_pages_runs(block, reader):
    names: dict = {}
    exec(compile(block, "block", "exec"), names)
    assert names["label_map"].shape == (30, 50) and names["label_map"].dtype == np.uint8
    assert {"accuracy", "miou", "iou"} <= set(names["record"]["scores"]["cluster"])


def test_the_library_in_ten_minutes_runs(reader):
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / "book" / "ten_minutes.md").read_text(), re.M | re.S):
        exec(compile(block.replace("range(200)", "range(3)"), "block", "exec"), names)
    assert names["label_map"].shape == (64, 64) and names["feats"].shape[2:] == (8, 8)
    assert 0 < names["on_features"] < 100 and 0 < names["on_codes"] < 100
    assert names["loss_fn"].parts.keys() >= {"loss_self", "loss_knn", "loss_rand"}
    assert Path("my-run", "README.md").is_file()


FIDELITY = (ROOT / "book" / "fidelity.md").read_text()
ROWS = {int(found[1]): found[0] for found in re.finditer(r"^\| (\d+) \|.*$", FIDELITY, re.MULTILINE)}
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", FIDELITY)))


def test_every_line_on_fidelity_is_there_and_names_a_test():
    assert list(ROWS) == list(range(1, 15))
    for number, row in ROWS.items():
        assert "`tests/" in row.rsplit("|", 2)[1], number
        assert row.count("|") == 7 and all(cell.strip() for cell in row.split("|")[1:-1]), number


@pytest.mark.parametrize("file, name", NAMED, ids=map("::".join, NAMED))
def test_a_named_test_exists(file, name):
    tree = ast.parse((ROOT / file).read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert name in functions if name else any(function.startswith("test_") for function in functions)


def test_the_parameters_named_there_exist():
    named = set(re.findall(r"`(\w+_weight|published|keys|mirror|start_from|keep_every)\b", FIDELITY))
    known = Experiment().to_dict()
    assert {"rec_weight", "crf_weight", "aug_alignment_weight", "keys"} <= named <= {*known, *known["official"]}


@pytest.mark.parametrize("part", [match, scores, Run.predict, Costs])
def test_a_listing_is_the_source_without_the_sections_of_its_docstring(part):
    text = source_without_sections(part)
    whole, shown = (ast.parse(source).body[0] for source in (textwrap.dedent(inspect.getsource(part)), text))
    assert "----" not in text
    assert ast.get_docstring(whole).startswith(ast.get_docstring(shown))
    assert [ast.unparse(node) for node in whole.body[1:]] == [ast.unparse(node) for node in shown.body[1:]]


def test_an_executed_notebook_is_kept_while_nothing_has_changed(tmp_path):
    path = tmp_path / "a.ipynb"
    nbformat.write(new_notebook(metadata={"papermill": {"parameters": {"steps": 3}}}), path)
    time = path.stat().st_mtime
    assert build.is_fresh(path, time - 1, {"steps": 3}) and not build.is_fresh(path, time + 1, {"steps": 3})
    assert not build.is_fresh(path, time - 1, {"steps": 4}) and not build.is_fresh(tmp_path / "none.ipynb", 0, {})


def test_the_build_gives_chapters_parameters_that_they_have(tmp_path):
    (tmp_path / "camvid" / "train").mkdir(parents=True)
    for name, parameters in (build.PARAMETERS | build.camvid_parameters(str(tmp_path))).items():
        assert name in PAGES and set(parameters) <= set(build.parameters_of(ROOT / f"{name}.ipynb")), name


def test_a_pdf_without_a_browser_is_refused_before_the_chapters_run(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(build, "run_all", lambda *_: pytest.fail("ran the chapters"))
    with pytest.raises(SystemExit, match="Chromium"):
        build.main(["--pdf"])
