"""The notebooks, run with tiny parameters and compared with records and files; `make book` runs them all."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from common import BASELINES, ROOT, run_cells, write_backbone
from killing import runs_in, same
from records import record
from standins import noise_images

from stego_book.exercises import check
from stego_book.notebooks import run_notebook
from stego_book.studies import results
from stego_lib import evaluate, load_run, train, training
from stego_lib.datasets.scenes import draw_scenes
from stego_lib.metrics import match, scores
from stego_lib.utils.files import write_json

pytestmark = pytest.mark.usefixtures("few_samples")

NOTEBOOKS = ROOT / "notebooks"
CHAPTERS = (
    "stego_from_scratch", "train", "correspondence", "loss", "data", "evaluation", "ablations", "baselines",
    "benchmark", "choosing", "speed", "negative_results", "segment_your_images", "resolution", "name_your_segments",
    "five_labels", "few_labels",
)  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Parameters of a tiny run: 20 scenes and a backbone of two blocks; the notebooks share its features."""
    folder = tmp_path_factory.mktemp("notebooks")
    draw_scenes(folder / "data" / "scenes", train=20, val=6)
    backbone = write_backbone(folder / "tiny.safetensors")
    paths = {"data_root": folder / "data", "runs_dir": folder / "runs", "backbone": backbone}
    return {name: str(path) for name, path in paths.items()} | {"device": "cpu"}


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_folds_its_set_up_and_has_a_folded_solution_for_each_exercise(name):
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells
    folded = [cell for cell in cells if {"hide-input", "hide-cell"} & set(cell.metadata.get("tags", []))]
    assert "**Question.**" in cells[0].source and "**Idea.**" in cells[0].source
    assert name == "stego_from_scratch" or any("check_parameters()" in cell.source for cell in folded)
    at = next(number for number, cell in enumerate(cells) if "## Exercises" in cell.source)
    text = "\n".join(cell.source for cell in cells[at:] if cell.cell_type == "markdown")
    solutions = [cell for cell in cells[at:] if "hide-cell" in cell.metadata.get("tags", [])]
    assert len(re.findall(r"^\*\*\d\. ", text, re.MULTILINE)) == len(solutions) >= 3


def test_evaluation_scores_as_the_record_and_the_seeds_on_record_say(small, tmp_path):
    records = tmp_path / "records"
    for seed in range(4):
        write_json(records / f"{seed}.json", record(seed))
    text = run_cells("evaluation", **small, steps=6, clusters="0 3", crf=False, records=records)
    (kept,) = Path(small["runs_dir"]).glob("*/metrics.json")
    counts = np.array(json.loads(kept.read_text())["confusion"])
    expected = scores(counts, match(counts))
    assert f"accuracy {expected['accuracy']:.1f}, mIoU {expected['miou']:.1f}" in text
    values = [kept["scores"]["cluster"]["miou"] for kept in results.read_records(records)]
    assert f"best of 4 recorded seeds {max(values):.1f}, their mean {np.mean(values):.1f}" in text


def test_names_of_segments_are_in_every_annotation(small, tmp_path):
    """Without names the chapter shows placeholders on a copy of the run; then names come from a file."""
    images = tmp_path / "images"
    noise_images(images, *[(112 + number, 80) for number in range(4)])
    parameters = dict(images=images, backbone=small["backbone"], runs_dir=tmp_path / "runs", device="cpu")
    run_cells("name_your_segments", **parameters, steps=2, n_classes=5, max_rows=3)
    (folder,) = (tmp_path / "runs").glob("*-folder-*")
    assert not (folder / "names.json").exists()
    categories = json.loads((folder / "annotated" / "panoptic.json").read_text())["categories"]
    assert [category["name"] for category in categories] == [f"cluster {number}" for number in range(5)]
    write_json(tmp_path / "names.json", {"cluster 0": "ground", "cluster 4": "ground", "cluster 2": None})
    given = dict(images=images, run=folder, names=tmp_path / "names.json", formats="coco-panoptic", device="cpu")
    run_cells("name_your_segments", **given)
    categories = json.loads((folder / "annotated" / "panoptic.json").read_text())["categories"]
    assert [category["name"] for category in categories] == ["ground", "cluster 1", "cluster 3"]


def test_stego_from_scratch_gives_what_the_library_gives(small, tmp_path):
    """Every comparison inside the chapter passes, and its last table agrees with the library's run record."""
    text = run_cells("stego_from_scratch", data_root=small["data_root"], runs_dir=tmp_path / "runs", steps=4)
    (kept,) = (tmp_path / "runs").glob("from_scratch/*/metrics.json")
    expected = json.loads(kept.read_text())["scores"]["cluster"]
    rows = re.findall(r"^  (.{28}) accuracy.*mIoU +([\d.]+)$", text, re.MULTILINE)
    shown = {name.strip(): float(miou) for name, miou in rows}
    assert shown["stego_lib"] == pytest.approx(expected["miou"], abs=0.06)
    assert set(shown) == {"k-means on frozen features", "STEGO from scratch", "stego_lib"}


def test_train_runs_to_the_end_and_prints_the_scores_of_its_record(small, tmp_path):
    text = run_notebook(NOTEBOOKS / "train.ipynb", tmp_path / "out.ipynb", small | {"steps": 12, "keep_every": 6})
    (run,) = [line.removeprefix("run folder: ") for line in text.splitlines() if line.startswith("run folder: ")]
    scored = json.loads((Path(run) / "metrics.json").read_text())
    assert scored["step"] == 12 and {*BASELINES, "cluster", "linear"} <= set(scored["scores"])
    for method, name in results.METHODS.items():
        if method in scored["scores"]:
            (line,) = [line for line in text.splitlines() if line.split(" accuracy")[0].strip() == name]
            assert f"{scored['scores'][method]['miou']:.1f}" in line
    best = scored["best_by_label"]
    assert best["steps"] == [6, 12] and f"mIoU {best['miou']:.1f}" in text
    saved = {figure.stem for figure in (Path(run) / "figures").glob("*.png")}
    assert saved == {"correspondences", "curves", "scores", "predictions", "confusion", "class_iou"}


def test_an_interrupted_notebook_resumes_to_the_same_weights_and_scores(
    scenes_root, backbone_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "SAVE_EVERY", 3)
    parameters = dict(data_root=scenes_root, backbone=backbone_file, train_size=[64], eval_size=[64])
    parameters |= dict(steps=10, batch_size=4, keep_every=4, device="cpu", crf=False)
    step, steps = training.train_step, []

    def interrupted(*arguments):
        steps.append(arguments)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_cells("train", **parameters, runs_dir=tmp_path / "broken")
    (folder,) = runs_in(tmp_path / "broken")
    assert load_run(folder).step == 3 and not (folder / "metrics.json").exists()
    run_cells("train", **parameters, runs_dir=tmp_path / "broken", resume=True)
    assert runs_in(tmp_path / "broken") == [folder]
    whole = train(load_run(folder).experiment, runs_dir=tmp_path / "whole")
    evaluate(whole)
    same(folder, whole.folder)


def test_seeds_gives_mean_and_spread_of_its_records(small, tmp_path):
    text = run_cells("seeds", **small, seeds="3 5", crf=False, records=tmp_path / "records", steps=4)
    kept = results.read_records(tmp_path / "records")
    assert sorted(scored["experiment"]["seed"] for scored in kept) == [3, 5]
    assert results.markdown_table(kept) in text


@pytest.mark.parametrize("name", ["train", "seeds", "reproduce"])
def test_the_summary_reports_a_collapse(name, capsys):
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells
    (cell,) = [cell for cell in cells if "summary" in cell.metadata.get("tags", [])]
    seen = "step 75: the codes are nearly all alike"
    for collapsed in (True, False):
        codes = {"seen": seen if collapsed else None}
        scored = record(3) | {"collapsed": collapsed, "codes": codes, "images": 6}
        run = SimpleNamespace(step=100, folder="runs/a", watched={"seen": seen}, experiment=SimpleNamespace(name="a"))
        names = dict(method_names=results.method_names, collapses=results.collapses, results=results)
        values = dict(record=scored, kept=[scored], run=run, seeds=[3], records="r", row="cityscapes-vitb8")
        exec(cell.source, names | values | dict(published=True, figures=None, departures=[]))
        assert (f"do not trust this run: seed 3: {seen}" in capsys.readouterr().out) == collapsed


@pytest.mark.parametrize(
    "answer, solution, verdict",
    [
        (0.5, 0.52, "Correct"), (0.4, 0.52, "small"), (-0.4, -0.52, "large"), (float("nan"), 0.52, "number"),
        (None, 0.52, "Replace"), (0.5, None, "no solution"), (0.5, float("nan"), "no solution"),
    ],
)  # fmt: skip
def test_an_answer_is_judged_without_giving_the_solution_away(answer, solution, verdict, capsys):
    check(answer, solution, within=0.03)
    printed = capsys.readouterr().out
    assert verdict in printed and "0.52" not in printed


def test_no_chapter_is_stored_with_an_answer():
    sources = [cell.source for path in NOTEBOOKS.glob("*.ipynb") for cell in nbformat.read(path, 4).cells]
    answers = [answer for source in sources for answer in re.findall(r"^check\(([^,]+),", source, re.MULTILINE)]
    assert set(answers) == {"None"} and len(answers) >= 10
