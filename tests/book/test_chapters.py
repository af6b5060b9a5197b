"""Chapters whose output can be compared with records and files, run with tiny parameters; `make book` runs them all."""

import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from common import ROOT, run_cells, write_backbone
from PIL import Image
from records import record
from standins import save

from stego_book.studies import results
from stego_lib import Experiment, train
from stego_lib.datasets.scenes import draw_scenes
from stego_lib.metrics import match, scores
from stego_lib.utils.files import write_json

NOTEBOOKS = ROOT / "notebooks"
CHAPTERS = (
    "stego_from_scratch", "train", "correspondence", "loss", "data", "evaluation", "ablations", "baselines",
    "benchmark", "choosing", "speed", "negative_results", "segment_your_images", "resolution", "name_your_segments",
    "five_labels", "few_labels",
)  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Parameters of a tiny run: 20 scenes and a backbone of two blocks; the chapters share its features."""
    folder = tmp_path_factory.mktemp("chapters")
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


def noisy_images(folder: Path) -> str:
    """A folder with four images of different sizes."""
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 255, (5, 7, 3), dtype=np.uint8)
        save(folder / f"{number}.png", np.array(Image.fromarray(noise).resize((112 + number, 80))))
    return str(folder)


def test_segmenting_a_folder_gives_label_maps_of_the_images_size(small, tmp_path):
    values = {name: value for name, value in small.items() if name != "runs_dir"}
    folder = train(Experiment.preset("scenes", **values, steps=4), runs_dir=tmp_path).folder
    images = noisy_images(tmp_path / "images")
    run_cells("segment_your_images", run=folder, images=images, output=tmp_path / "out")
    for number in range(4):
        assert np.array(Image.open(tmp_path / "out" / "labels" / f"{number}.png")).shape == (80, 112 + number)


def test_names_of_segments_are_in_every_annotation(small, tmp_path):
    """Without names the chapter shows placeholders on a copy of the run; then names come from a file."""
    images = noisy_images(tmp_path / "images")
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
