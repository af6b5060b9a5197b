"""The chapters on correspondences and on the loss, run on tiny scenes as papermill runs them."""

import base64
import json
import re

import nbformat
import numpy as np
import pytest
from common import ROOT

from stego_lib.cooccurrence import read_curves
from stego_lib.datasets.scenes import draw_scenes
from stego_lib.notebooks import run_notebook


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Parameters of a tiny run: 20 drawn scenes, 4 steps. Both chapters use one run."""
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


def pictures(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


def test_the_chapter_on_correspondences_draws_curves_and_a_table(correspondence):
    notebook, text = correspondence
    assert pictures(notebook) == 5
    (cell,) = [cell for cell in notebook.cells if "average-precision" in cell.metadata.get("tags", [])]
    rows = re.findall(r"<th>([^<]+)</th>\s*<td>([\d.]+)</td>\s*<td>([\d.]+)</td>", cell.outputs[0].data["text/html"])
    table = {name: (float(within), float(across)) for name, within, across in rows}
    assert set(table) == {"backbone features", "STEGO's code", "random ViT", "colour", "CRF kernel", "guessing"}
    assert all(0 < value <= 1 for values in table.values() for value in values)
    assert min(table["backbone features"]) > max(table["guessing"]), "the embedded backbone has learnt something"
    for number, title in enumerate(("within a picture", "across pictures")):
        best = max(list(table)[:-1], key=lambda name: table[name][number])
        assert f"{title}: the best is {best} (AP {table[best][number]:.3f})" in text


def test_the_curves_are_kept_where_asked(correspondence, small):
    _, text = correspondence
    curves, chance, about = read_curves(small["data_root"] + "/curves.json")
    assert about == "4,000 pairs of each kind in 9 pictures of scenes val, scenes_vit_tiny8"
    assert set(curves) == set(chance) == {"within a picture", "across pictures"}
    for title, found in curves.items():
        assert f"AP {max(curve.average_precision for curve in found.values()):.3f}" in text, title


def test_the_page_holds_the_explorer_with_data_of_this_run(correspondence):
    notebook, _ = correspondence
    (html,) = [
        output.data["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "correspondence-explorer" in output.get("data", {}).get("text/html", "")
    ]
    data = json.loads(re.search(r"const data = (\{.*\});", html)[1])
    assert [space["name"] for space in data["spaces"]] == ["backbone features", "STEGO's code"]
    for space in data["spaces"]:
        count = len(data["pictures"]) * np.prod(data["grid"]) * space["channels"]
        assert len(base64.b64decode(space["vectors"])) == count
    assert len(html) < 3e6, "small enough for a page"
    assert 'src="data:image/png' in html and "query point" in html, "a still picture for readers without scripts"


def test_the_chapter_on_the_loss_agrees_with_its_naive_loops(small, tmp_path):
    path = tmp_path / "out.ipynb"
    text = run_notebook(ROOT / "notebooks" / "loss.ipynb", path, small)
    assert "the naive loops agree" in text
    notebook = nbformat.read(path, 4)
    assert pictures(notebook) == 5
    asserting = [cell for cell in notebook.cells if "assert_close" in cell.source]
    assert len(asserting) >= 5 and all(cell.execution_count for cell in asserting)
