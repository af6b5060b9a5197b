"""The chapters on correspondences, on the loss and STEGO from scratch, run by papermill on tiny scenes."""

import base64
import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from common import ROOT

from stego_book.notebooks import run_notebook
from stego_book.studies.cooccurrence import read_curves
from stego_lib.datasets.scenes import draw_scenes


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Parameters of a tiny run: 20 scenes, 4 steps. The chapters share one run."""
    folder = tmp_path_factory.mktemp("chapters")
    draw_scenes(folder / "data" / "scenes", train=20, val=9)
    return {"data_root": str(folder / "data"), "runs_dir": str(folder / "runs"), "steps": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def correspondence(small, tmp_path_factory):
    """The executed chapter on correspondences, and the text of its summary."""
    path = tmp_path_factory.mktemp("correspondence") / "out.ipynb"
    parameters = small | {"pairs": 4000, "keep": small["data_root"] + "/curves.json"}
    text = run_notebook(ROOT / "notebooks" / "correspondence.ipynb", path, parameters)
    return nbformat.read(path, 4), text


def count_images(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


def test_the_chapter_on_correspondences_draws_curves_and_a_table(correspondence):
    notebook, text = correspondence
    assert count_images(notebook) == 6
    (cell,) = [cell for cell in notebook.cells if "average-precision" in cell.metadata.get("tags", [])]
    rows = re.findall(r"<th>([^<]+)</th>\s*<td>([\d.]+)</td>\s*<td>([\d.]+)</td>", cell.outputs[0].data["text/html"])
    table = {name: (float(within), float(across)) for name, within, across in rows}
    assert set(table) == {"backbone features", "STEGO's code", "random ViT", "color", "CRF kernel", "guessing"}
    assert all(0 < value <= 1 for values in table.values() for value in values)
    assert min(table["backbone features"]) > max(table["guessing"]), "the embedded backbone has learned something"
    for number, title in enumerate(("within an image", "across images")):
        best = max((name for name in table if name != "guessing"), key=lambda name: table[name][number])
        assert f"{title}: the best is {best} (AP {table[best][number]:.3f})" in text


def test_the_curves_are_written_where_requested(correspondence, small):
    _, text = correspondence
    curves, chance, about = read_curves(small["data_root"] + "/curves.json")
    assert about == "4,000 pairs of each kind in 9 images of scenes val, scenes_vit_tiny8"
    assert set(curves) == set(chance) == {"within an image", "across images"}
    for title, found in curves.items():
        assert f"AP {max(curve.average_precision for curve in found.values()):.3f}" in text, title


def test_the_page_shows_features_before_it_trains(correspondence):
    notebook, _ = correspondence
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    trains = next(number for number, source in enumerate(code) if "train(" in source)
    assert sum("heat_maps(" in source for source in code[:trains]) == 2 and "precision_recall(curves" in "".join(
        code[:trains]
    )


def test_the_page_contains_the_explorer_with_data_of_this_run(correspondence):
    notebook, _ = correspondence
    html, html_of_codes = [
        output.data["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "correspondence-explorer" in output.get("data", {}).get("text/html", "")
    ]
    for page, name in ((html, "backbone features"), (html_of_codes, "STEGO's code")):
        data = json.loads(re.search(r"const data = (\{.*\});", page)[1])
        (space,) = data["spaces"]
        assert space["name"] == name
        count = len(data["images"]) * np.prod(data["grid"]) * space["channels"]
        assert len(base64.b64decode(space["vectors"])) == count
    assert len(html) < 3e6, "small enough for a page"
    assert 'src="data:image/png' in html and "query point" in html, "a still image for readers without scripts"


def test_the_chapter_on_the_loss_agrees_with_its_naive_loops(small, tmp_path):
    path = tmp_path / "out.ipynb"
    text = run_notebook(ROOT / "notebooks" / "loss.ipynb", path, small)
    assert "the naive loops agree" in text
    notebook = nbformat.read(path, 4)
    assert count_images(notebook) == 5
    asserting = [cell for cell in notebook.cells if "assert_close" in cell.source]
    assert len(asserting) >= 5 and all(cell.execution_count for cell in asserting)


def test_stego_from_scratch_gives_what_the_library_gives(small, tmp_path):
    """Every comparison of the chapter passes, and its last table agrees with the library's run record."""
    path = tmp_path / "out.ipynb"
    parameters = {name: value for name, value in small.items() if name != "device"}
    text = run_notebook(ROOT / "notebooks" / "stego_from_scratch.ipynb", path, parameters)
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code if "parameters" not in cell.metadata.get("tags", []))
    compared = "\n".join(cell.source for cell in code)
    for function in (
        "library_backbone(", "nearest_neighbors(", "loss.correspondence(", "loss.sample(", "loss.stego_loss(", "library_head(",
        "probes.kmeans(", "metrics.confusion(", "metrics.match(", "metrics.scores(", "run.shifts", "run.log", 'record["confusion"]',
    ):  # fmt: skip
        assert function in compared, f"not compared with {function}"
    assert compared.count("assert_close(") >= 12
    figures = [cell for cell in code if "mystnb" in cell.metadata]
    assert count_images(notebook) == len(figures) == 5
    (record,) = Path(small["runs_dir"]).glob("from_scratch/*/metrics.json")
    expected = json.loads(record.read_text())["scores"]["cluster"]
    found = {
        name.strip(): float(miou)
        for name, miou in re.findall(r"^  (.{28}) accuracy.*mIoU +([\d.]+)$", text, re.MULTILINE)
    }
    assert found["stego_lib"] == pytest.approx(expected["miou"], abs=0.06)
    assert set(found) == {"k-means on frozen features", "STEGO from scratch", "stego_lib"}


def test_stego_from_scratch_is_short_and_says_how_long_it_takes():
    cells = nbformat.read(ROOT / "notebooks" / "stego_from_scratch.ipynb", 4).cells
    folded = {"hide-input", "hide-cell", "parameters", "summary", "remove-cell"}
    shown = [
        cell.source for cell in cells if cell.cell_type == "code" and not folded & set(cell.metadata.get("tags", []))
    ]
    assert sum(bool(line.strip()) for source in shown for line in source.splitlines()) <= 210
    assert max(len(source.splitlines()) for source in shown) <= 22, "one idea a cell"
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for part in ("**Question.**", "**Idea.**", "**You need**", "**It takes**", "## What to take away", "## Exercises"):
        assert part in text
    assert (
        len(re.findall(r"^\*\*\d\. ", text, re.MULTILINE))
        == sum("hide-cell" in cell.metadata.get("tags", []) for cell in cells)
        >= 3
    )
