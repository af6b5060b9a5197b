"""The notebooks that train, as users run them."""

import json
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from common import BASELINES, ROOT, run_cells
from records import record as made_up_record

from stego_book.notebooks import run_notebook
from stego_book.studies import results
from stego_lib import DataNotFound
from stego_lib.datasets.scenes import draw_scenes

NOTEBOOKS = ROOT / "notebooks"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict:
    """Parameters of a tiny run: 20 scenes, 12 steps."""
    folder = tmp_path_factory.mktemp("notebooks")
    draw_scenes(folder / "data" / "scenes", train=20, val=6)
    return {"data_root": str(folder / "data"), "runs_dir": str(folder / "runs"), "steps": 12, "device": "cpu"}


def test_train_runs_to_the_end_and_prints_the_scores_of_its_record(small, tmp_path):
    text = run_notebook(NOTEBOOKS / "train.ipynb", tmp_path / "out.ipynb", small | {"keep_every": 6})
    (run,) = [line.removeprefix("run folder: ") for line in text.splitlines() if line.startswith("run folder: ")]
    record = json.loads((Path(run) / "metrics.json").read_text())
    assert record["step"] == small["steps"] and {*BASELINES, "cluster", "linear"} <= set(record["scores"])
    for method, name in results.METHODS.items():
        if method in record["scores"]:
            (line,) = [line for line in text.splitlines() if line.split(" accuracy")[0].strip() == name]
            assert f"{record['scores'][method]['miou']:.1f}" in line
    best = record["best_by_label"]
    assert best["steps"] == [6, 12] and f"mIoU {best['miou']:.1f}" in text
    saved = {figure.stem for figure in (Path(run) / "figures").glob("*.png")}
    assert saved == {"correspondences", "curves", "scores", "predictions", "confusion", "class_iou"}


def test_seeds_gives_mean_and_spread_of_its_records(small, tmp_path):
    text = run_cells("seeds", **small | {"seeds": "3 5", "crf": False, "records": tmp_path / "records", "steps": 4})
    kept = results.read_records(tmp_path / "records")
    assert sorted(record["experiment"]["seed"] for record in kept) == [3, 5]
    assert results.markdown_table(kept) in text


def test_absent_data_stop_the_notebook_with_one_clear_error(tmp_path):
    with pytest.raises(DataNotFound, match=r"nowhere/cityscapes"):
        run_cells("train", dataset="cityscapes", data_root=tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["train", "seeds", "reproduce"])
def test_the_summary_reports_a_collapse(name, capsys):
    """The summary cell, run on the record of a collapsed run and of a healthy run."""
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells
    (cell,) = [cell for cell in cells if "summary" in cell.metadata.get("tags", [])]
    seen = "step 75: the codes are nearly all alike"
    for collapsed in (True, False):
        codes = {"seen": seen if collapsed else None}
        record = made_up_record(3) | {"collapsed": collapsed, "codes": codes, "images": 6}
        run = SimpleNamespace(step=100, folder="runs/a", watched={"seen": seen}, experiment=SimpleNamespace(name="a"))
        names = dict(method_names=results.method_names, collapses=results.collapses, results=results)
        values = dict(record=record, kept=[record], run=run, seeds=[3], records="r", row="cityscapes-vitb8")
        exec(cell.source, names | values | dict(published=True, figures=None, departures=[]))
        assert (f"do not trust this run: seed 3: {seen}" in capsys.readouterr().out) == collapsed
