"""The notebooks that train, as users run them."""

import json
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import papermill
import pytest
import standins
from common import BASELINES, ROOT
from records import record as made_up_record

from stego_book.notebooks import run_notebook
from stego_book.studies import results
from stego_lib import Backbone
from stego_lib.datasets.scenes import draw_scenes

NOTEBOOKS = ROOT / "notebooks"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict:
    """Parameters of a tiny run: 20 scenes, 12 steps."""
    folder = tmp_path_factory.mktemp("notebooks")
    draw_scenes(folder / "data" / "scenes", train=20, val=6)
    return {"data_root": str(folder / "data"), "runs_dir": str(folder / "runs"), "steps": 12, "device": "cpu"}


def outputs(path: Path) -> list:
    return [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]


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
    parameters = small | {"seeds": "3 5", "crf": False, "records": str(tmp_path / "records"), "steps": 4}
    text = run_notebook(NOTEBOOKS / "seeds.ipynb", tmp_path / "out.ipynb", parameters)
    kept = results.read_records(tmp_path / "records")
    assert sorted(record["experiment"]["seed"] for record in kept) == [3, 5]
    assert results.markdown_table(kept) in text


def test_absent_data_stop_papermill_with_one_clear_error(tmp_path):
    parameters = {"dataset": "cityscapes", "data_root": str(tmp_path / "nowhere")}
    with pytest.raises(papermill.PapermillExecutionError, match=r"nowhere/cityscapes"):
        out = tmp_path / "out.ipynb"
        papermill.execute_notebook(str(NOTEBOOKS / "train.ipynb"), str(out), parameters, progress_bar=False)
    errors = [output for output in outputs(tmp_path / "out.ipynb") if output.output_type == "error"]
    assert [error.ename for error in errors] == ["DataNotFound"]


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


def test_pretraining_on_scenes_makes_a_backbone(tmp_path):
    parameters = dict(steps=4, second_steps=2, images=16, watched=10, save_every=2, folder=str(tmp_path), device="cpu")
    run_notebook(NOTEBOOKS / "pretrain_scenes.ipynb", tmp_path / "out.ipynb", parameters)
    curve = json.loads((tmp_path / "curve.json").read_text())["curve"]
    expected = [("clear", 1), ("clear", 3), ("weather", 0), ("weather", 1)]
    assert [(point["stage"], point["step"]) for point in curve] == expected
    assert Backbone(str(tmp_path / "scenes_vit_tiny8.safetensors"), device="cpu").dim == 192


def test_pretraining_on_photographs_makes_a_backbone_from_folders(tmp_path):
    for folder, count in (("camvid/train", 3), ("camvid/val", 3), ("photos", 2), ("photos_more", 1)):
        for number in range(count):
            flat = np.full((60, 80, 3), 40 * number + 20, np.uint8)
            standins.save(tmp_path / "data" / folder / f"drive_{number}.png", flat)
            if "camvid" in folder:
                ids = standins.stripes([0, 3, 11], 60, 80)
                standins.save(tmp_path / "data" / f"{folder}annot" / f"drive_{number}.png", ids)
    paths = dict(data_root=str(tmp_path / "data"), folder=str(tmp_path / "pre"))
    sizes = dict(steps="2 1 1", batch_size=2, watched=1, save_every=2, watch_every=2, device="cpu")
    text = run_notebook(NOTEBOOKS / "pretrain_photos.ipynb", tmp_path / "out.ipynb", paths | sizes)
    assert "5 photographs, dense contrast, 2 and 1 and 1 steps, no labels" in text, "one of three frames is held out"
    for stage, steps, crop in (("first", 2, 40), ("second", 1, 80), ("third", 1, 112)):
        content = json.loads((tmp_path / "pre" / f"{stage}.json").read_text())
        assert [look["step"] for look in content["measured"]] == [0, steps] and content["recipe"]["crop"] == crop
    assert Backbone(str(tmp_path / "pre" / "photos_vit_tiny8_d6.safetensors"), device="cpu").dim == 192
