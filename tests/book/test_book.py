"""What the book can be held to without building it; `make book` holds it to the rest."""

import ast
import pydoc
import re
from functools import cache
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml
from common import ROOT, few_samples, tiny_experiment
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

import stego_lib
from stego_book import build, check
from stego_book.studies.results import fill_tables
from stego_lib import Experiment
from stego_lib.utils import paths

TOC = ROOT / "book" / "_toc.yml"
PAGES = build.pages(TOC)
CHAPTERS = [ROOT / f"{name}.ipynb" for name in PAGES if name.startswith("notebooks/")]
TEXTS = [ROOT / f"{name}.md" for name in PAGES if not name.startswith("notebooks/")]
OUTSIDE = {"seeds", "reproduce"}
"""Notebooks that are no chapter: they train for long, and their tables stand in the book, made from the records."""
DRAWS = re.compile(r"\b(plots(_\w+)?\.(?!use_style|save|KINDS|paint)\w+|plt\.subplots)\(|^figure;$", re.MULTILINE)
RESULT = re.compile(
    r"\d(\s*%|\s*percent|\s*mIoU|\s*percentage points)|\b(mIoU|accuracy|AP)\b( of| is|:)? \d", re.IGNORECASE
)
NO_RESULTS = {
    "fidelity": ["99.9 % of the pixels", "99.5 % after the CRF"],  # what a named test asserts
}
"""Numbers that look like results and are none of ours, or are asserted by a test."""


def prose(path: Path) -> str:
    """The text of a page or chapter, without tables made from records."""
    if path.suffix == ".md":
        text = path.read_text()
    else:
        text = "\n\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
    return re.sub(r"<!-- table: .*?<!-- end -->", "", text, flags=re.DOTALL)


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


@cache
def lines_of_the_library() -> set[tuple[str, ...]]:
    """Every three lines in a row of the library, layout aside."""
    library = "\n".join(ast.unparse(ast.parse(file.read_text())) for file in (ROOT / "stego_lib").rglob("*.py"))
    lines = [line.strip() for line in library.splitlines()]
    return {tuple(lines[i : i + 3]) for i in range(len(lines)) if not lines[i].startswith(("import", "from"))}


def figure_of(cell) -> dict:
    return cell.metadata.get("mystnb", {}).get("figure", {})


def test_the_table_of_contents_names_every_page_once_and_only_what_is_there():
    assert len(set(PAGES)) == len(PAGES) and PAGES[0] == "book/index"
    there = {f"book/{path.stem}" for path in (ROOT / "book").glob("*.md")}
    there |= {f"book/api/{path.stem}" for path in (ROOT / "book" / "api").glob("*.md")}
    there |= {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb") if path.stem not in OUTSIDE}
    assert set(PAGES) == there


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_figure_of_a_chapter_has_a_name_a_caption_and_an_alternative_text(path):
    for cell in code_cells(path):
        about = cell.metadata.get("mystnb", {})
        if DRAWS.search(cell.source) and "explorer_html" not in cell.source:
            assert figure_of(cell).get("name", "").startswith("fig-"), cell.source
            assert len(figure_of(cell)["caption"]) > 15 and len(about["image"]["alt"]) > 25, cell.source


def test_names_of_figures_are_unique():
    names = [figure_of(cell)["name"] for path in CHAPTERS for cell in code_cells(path) if figure_of(cell)]
    assert len(names) == len(set(names)) >= 10


@pytest.mark.parametrize("path", [*CHAPTERS, *TEXTS], ids=lambda path: path.stem)
def test_no_result_is_typed_by_hand(path):
    text = prose(path)
    for phrase in NO_RESULTS.get(path.stem, []):
        assert phrase in text
        text = text.replace(phrase, "")
    assert not [text[max(0, found.start() - 30) : found.end() + 20] for found in RESULT.finditer(text)]


@pytest.mark.parametrize("text", ["it has 24.5 mIoU", "a gain of 3 %", "mIoU of 21", "accuracy 73.2", "AP is 0.5"])
def test_typed_results_are_found(text):
    assert RESULT.search(text)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_no_code_of_the_library_is_repeated(path):
    """No three lines in a row of a chapter stand in the library too."""
    known = lines_of_the_library()
    for cell in code_cells(path):
        own = [line.strip() for line in ast.unparse(ast.parse(cell.source)).splitlines()]
        assert not [own[i : i + 3] for i in range(len(own) - 2) if tuple(own[i : i + 3]) in known]


def labels() -> set[str]:
    """What `#name` can lead to: labeled equations, figures and headings."""
    found = {figure_of(cell)["name"] for path in CHAPTERS for cell in code_cells(path) if figure_of(cell)}
    for path in [*CHAPTERS, *TEXTS]:
        text = prose(path)
        found |= set(re.findall(r"^\$\$ \(([\w-]+)\)$", text, re.MULTILINE))
        found |= set(re.findall(r"^:name: ([\w-]+)$", text, re.MULTILINE))
        found |= set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))
    return found


@pytest.mark.parametrize("path", [*CHAPTERS, *TEXTS], ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    text, known = prose(path), labels()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            file, _, anchor = target.partition("#")
            assert not file or (path.parent / file).exists(), target
            assert not file or str((path.parent / file).resolve().relative_to(ROOT).with_suffix("")) in PAGES, target
            assert file or anchor in known, target
    for name in re.findall(r"\{(?:eq|numref)\}`([\w-]+)`", text):
        assert name in known
    keys = set(re.findall(r"^@\w+\{([^,]+),", (ROOT / "book" / "references.bib").read_text(), re.MULTILINE))
    for names in re.findall(r"\{cite:\w+\}`([^`]+)`", text):
        assert set(names.split(",")) <= keys
    for figure in re.findall(r"\{figure\} (\S+)", text):
        drawn = Path(figure).parent.name == "figures" and Path(figure).stem in known  # put there by the build
        assert drawn or (path.parent / figure).exists()


def test_equation_labels_are_unique():
    found = [
        name
        for path in [*CHAPTERS, *TEXTS]
        for name in re.findall(r"^\$\$ \((eq-[\w-]+)\)$", prose(path), re.MULTILINE)
    ]
    assert len(found) == len(set(found)) >= 8


def test_the_reference_has_every_module_once():
    text = "".join(path.read_text() for path in sorted((ROOT / "book" / "api").glob("*.md")))
    listed = re.findall(r"^\.\. automodule:: (\S+)$", text, re.MULTILINE)
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "stego_lib").rglob("*.py")]
    modules = {".".join(path.parts).removesuffix(".__init__") for path in files if path.stem != "__main__"}
    assert set(listed) == modules - {"stego_lib"} and len(listed) == len(set(listed))


def test_the_reference_begins_with_what_users_call():
    """Every name is there, and has a docstring; what users call has an example."""
    names = re.findall(r"^   ~(stego_lib\.\S+)$", (ROOT / "book" / "api.md").read_text(), re.MULTILINE)
    assert len(names) >= 25
    for name in names:
        found = pydoc.locate(name)
        assert found is not None and found.__doc__, name
    public = {name for name in stego_lib.__all__ if name not in ("PRESETS", "DataNotFound", "StegoError")}
    assert public <= {name.rpartition(".")[2] for name in names}


NAMING = [*TEXTS, *sorted((ROOT / "notebooks").glob("*.ipynb")), *sorted((ROOT / "stego_lib" / "weights").glob("*.md"))]
NAMING += [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md"]
"""Pages that name modules and files."""
TYPED = {"out.ipynb", "train.py"}
"""Files that a reader names."""
ROOMS = "|".join(sorted({path.stem for path in (ROOT / "stego_lib").iterdir()} - {"__init__", "__pycache__", "run"}))


def unresolved(text: str) -> set[str]:
    """Names of the library, and files, that are neither in the project nor written by the library."""
    names = set(re.findall(r"\bstego_lib(?:\.[A-Za-z_]\w*)+", text))
    names |= {
        f"stego_lib.{name}"
        for name in re.findall(rf"`((?:{ROOMS})(?:\.[A-Za-z_]\w*)+)", text)
        if not FILE.fullmatch(name)
    }
    missing = {name for name in names if pydoc.locate(name) is None}
    for file in set(FILE.findall(text)) - TYPED:
        end = f"/{re.sub(r'^(../)+', '', file)}"
        written = Path(file).name in strings_of_the_library()
        missing |= set() if written or any(path.endswith(end) for path in project_files()) else {file}
    return missing


FILE = re.compile(r"[\w./-]*\w\.(?:py|ipynb|csv|json|md|toml|yml|bib|svg|html)\b")


@cache
def project_files() -> tuple[str, ...]:
    folders = ("stego_lib", "tests", "benchmarks", "book", "notebooks", "data")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if "_build" not in path.parts]
    return tuple(f"/{path.relative_to(ROOT).as_posix()}" for path in (*found, *ROOT.iterdir()) if path.is_file())


@cache
def strings_of_the_library() -> set[str]:
    trees = [ast.parse(path.read_text()) for path in (ROOT / "stego_lib").rglob("*.py")]
    return {
        node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


@pytest.mark.parametrize("path", NAMING, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_module_and_file_that_a_page_names_is_there(path):
    code = "" if path.suffix == ".md" else "\n".join(cell.source for cell in code_cells(path))
    written = set(re.findall(r'write_\w+\([^"\n]*"([^"/]+)"', code))
    assert unresolved(f"{prose(path)}\n{code}") <= written


def test_names_that_lead_nowhere_are_found():
    text = "`stego_lib.probe_maps`, `loss.nothing`, `loss.center`, stego_lib/run_folders.py, `run.py`, metrics.json, none.json"
    assert unresolved(text) == {
        "stego_lib.probe_maps",
        "stego_lib.loss.nothing",
        "stego_lib/run_folders.py",
        "none.json",
    }


def test_the_tables_of_the_welcome_page_are_those_of_the_records():
    """Mended by: python -m stego_book.studies.results book/index.md"""
    text = (ROOT / "book" / "index.md").read_text()
    assert text.count("<!-- table: ") >= 1
    assert fill_tables(text, ROOT / "book") == text


def test_the_welcome_page_has_a_line_for_each_way_of_use():
    text = (ROOT / "book" / "index.md").read_text()
    for line in (
        "make lab",
        "papermill notebooks/train.ipynb out.ipynb",
        "from stego_lib import",
        "correspondence.ipynb",
    ):
        assert line in text


def test_the_book_takes_camvid_where_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    assert build.images(None) == {} and "synthetic scenes" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds no camvid/train"):
        build.images(str(tmp_path))
    for given, folder in ((str(tmp_path / "elsewhere"), tmp_path / "elsewhere"), (None, tmp_path / "data")):
        (folder / "camvid" / "train").mkdir(parents=True)
        found = build.images(given)
        assert found["notebooks/train"] == {
            "dataset": "camvid",
            "data_root": str(folder),
            "backbone": "photos_vit_tiny8_d6",
        }
        assert found["notebooks/stego_from_scratch"] == {"dataset": "camvid", "data_root": str(folder)}
        for name, parameters in found.items():
            assert set(parameters) <= set(build.parameters_of(ROOT / f"{name}.ipynb")), name


def test_the_readme_is_short_and_its_figures_are_small():
    text = (ROOT / "README.md").read_text()
    figures = [ROOT / name for name in re.findall(r"!\[[^\]]{30,}\]\((\S+)\)", text)]
    assert text.count("\n") < 120 and len(figures) == 3
    assert sum(figure.stat().st_size for figure in figures) < 1_000_000 and {figure.suffix for figure in figures} <= {
        ".webp",
        ".png",
    }


def test_the_training_chapter_runs_first_and_the_others_in_order(tmp_path):
    toc = {
        "root": "book/index",
        "parts": [{"chapters": [{"file": "notebooks/b", "sections": [{"file": "notebooks/c"}]}]}],
    }
    toc["parts"].append({"chapters": [{"file": "book/a"}, {"file": "notebooks/train"}]})
    (tmp_path / "_toc.yml").write_text(yaml.safe_dump(toc))
    assert build.pages(tmp_path / "_toc.yml") == [
        "book/index",
        "notebooks/b",
        "notebooks/c",
        "book/a",
        "notebooks/train",
    ]
    assert build.notebooks(tmp_path / "_toc.yml") == ["notebooks/train", "notebooks/b", "notebooks/c"]


def test_buttons_lead_to_a_repository_only_if_there_is_one():
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert build.with_repository(config, None) == config and "launch_buttons" not in config
    with_buttons = build.with_repository(config, "https://github.com/someone/project")
    assert with_buttons["repository"] == {"url": "https://github.com/someone/project", "branch": "main"}
    assert set(with_buttons["launch_buttons"]) == {"binderhub_url", "colab_url"}
    assert (ROOT / "environment.yml").exists(), "Binder makes its environment from this"


def test_parameters_of_the_build_exist():
    import papermill

    for name, parameters in build.PARAMETERS.items():
        assert name in PAGES and set(parameters) <= set(papermill.inspect_notebook(str(ROOT / f"{name}.ipynb")))


def write(path: Path, cell) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=[cell], metadata={"papermill": {"parameters": {"steps": 3}}}), path)
    return path


def image_cell():
    cell = new_code_cell("figure;", outputs=[new_output("display_data", {"image/png": "iVBORw=="})])
    cell.metadata["mystnb"] = {"figure": {"name": "fig-x"}}
    return cell


def test_an_executed_notebook_is_kept_only_while_nothing_has_changed(tmp_path):
    path = write(tmp_path / "a.ipynb", image_cell())
    at = path.stat().st_mtime
    assert build.fresh(path, at - 1, {"steps": 3})
    assert not build.fresh(path, at + 1, {"steps": 3}), "something is newer"
    assert not build.fresh(path, at - 1, {"steps": 4}), "other parameters"
    assert not build.fresh(tmp_path / "none.ipynb", 0, {})
    assert build.named_figures(path) == {"fig-x": b"\x89PNG"}


def test_errors_and_missing_figures_are_found(tmp_path):
    assert not list(check.errors(write(tmp_path / "well.ipynb", image_cell())))
    without = image_cell()
    without.outputs = []
    assert "fig-x" in next(check.errors(write(tmp_path / "without.ipynb", without)))
    error = new_code_cell("1 / 0", outputs=[new_output("error", ename="ZeroDivisionError", evalue="", traceback=[])])
    assert "ZeroDivisionError" in next(check.errors(write(tmp_path / "error.ipynb", error)))
    told = new_code_cell("", outputs=[new_output("stream", text="Traceback (most recent call last)\n")])
    assert "traceback" in next(check.errors(write(tmp_path / "told.ipynb", told)))


GOOD = """<html><body><img src="other.html"><article><h1 id="top">x</h1><a href="other.html#there">o</a><a href="#top">t</a>
<a href="https://example.org/gone">elsewhere</a><img src="p.png" alt="An image of something"></article></body></html>"""


def test_a_page_without_faults_has_none(tmp_path):
    """An image of the page's frame, outside the article, needs no text."""
    (tmp_path / "page.html").write_text(GOOD)
    (tmp_path / "other.html").write_text('<html><body><p id="there">x</p></body></html>')
    (tmp_path / "p.png").write_bytes(b"x")
    assert check.problems(tmp_path, []) == []
    without = image_cell()
    without.outputs = []
    notebook = write(tmp_path / "without.ipynb", without)
    assert check.problems(tmp_path, [notebook]) == [f"{notebook}: cell 0 should show figure fig-x and shows none"]


@pytest.mark.parametrize(
    "good, bad, fault",
    [
        ("other.html#there", "gone.html", "leads nowhere: gone.html"),
        ("other.html#there", "other.html#nowhere", "leads nowhere: other.html#nowhere"),
        ("#top", "#bottom", "leads nowhere: #bottom"),
        ('src="p.png"', 'src="q.png"', "leads nowhere: q.png"),
        ('alt="An image of something"', "", "without an alternative text: p.png"),
        ("An image of something", "images/p.png", "without an alternative text: p.png"),
        ("An image of something", "figure", "without an alternative text: p.png"),
        (
            ">t</a>",
            ">t</a><p>| a | b | |—|—| | 1 | 2 |</p><pre>|---|---|</pre>",
            "a table that was not rendered: | a | b | |—|—| | 1 | 2 |",
        ),
    ],
    ids=["page", "place of a page", "place", "image", "no text", "name of the file as text", "a word", "table"],
)
def test_faults_of_a_page_are_found(tmp_path, good, bad, fault):
    (tmp_path / "page.html").write_text(GOOD.replace(good, bad))
    (tmp_path / "other.html").write_text('<html><body><p id="there">x</p></body></html>')
    (tmp_path / "p.png").write_bytes(b"x")
    (found,) = check.problems(tmp_path, [])
    assert found == f"page.html: {'an image ' if fault.startswith('without') else ''}{fault}"


BLOCKS = [
    pytest.param(block, id=f"{path.stem}-{number}")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md", *TEXTS]
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL))
]
"""Every piece of Python in the README and the book's pages."""


@pytest.mark.parametrize("block", BLOCKS)
def test_a_piece_of_python_does_what_stands_beside_it(block, scenes_root, backbone_file, tmp_path, monkeypatch):
    """As written, in a folder with an image.jpg; recipes are made tiny, and data and runs lie elsewhere."""
    recipe = Experiment.preset.__func__

    def tiny(cls, name, **changes):
        asked = recipe(cls, name, **changes)  # what the block names must exist
        return tiny_experiment(scenes_root, backbone_file, steps=2, seed=asked.seed)

    few_samples(monkeypatch)
    monkeypatch.setattr(Experiment, "preset", classmethod(tiny))
    monkeypatch.setattr(paths, "project_root", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 30), "green").save("image.jpg")
    names: dict = {}
    exec(compile(block, "block", "exec"), names)
    assert names["label_map"].shape == (30, 50) and names["label_map"].dtype == np.uint8, "(H, W), as the text says"
    assert {"accuracy", "miou", "iou"} <= set(names["record"]["scores"]["cluster"])
    assert {"kmeans_features", "linear_features"} <= set(names["record"]["scores"]), "beside the baselines"


def test_pieces_of_python_are_found():
    assert len(BLOCKS) >= 2
