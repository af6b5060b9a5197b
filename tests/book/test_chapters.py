"""Each chapter from data to speed runs on its own, from files, with tiny parameters."""

import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from common import ROOT, write_backbone
from PIL import Image
from records import record, speed_rows
from standins import save

from stego_book.notebooks import run_notebook
from stego_book.studies import results
from stego_lib import Experiment, train
from stego_lib.calibration import AUTO
from stego_lib.datasets.scenes import draw_scenes
from stego_lib.metrics import match, scores
from stego_lib.utils.files import write_json

CHAPTERS = (
    "data",
    "evaluation",
    "ablations",
    "benchmark",
    "baselines",
    "choosing",
    "speed",
    "light",
    "segment_your_images",
    "name_your_segments",
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Parameters of a tiny run: 20 scenes and a backbone of two blocks; the chapters share its features."""
    folder = tmp_path_factory.mktemp("chapters")
    draw_scenes(folder / "data" / "scenes", train=20, val=6)
    backbone = write_backbone(folder / "tiny.safetensors")
    paths = {"data_root": folder / "data", "runs_dir": folder / "runs", "backbone": backbone}
    return {name: str(path) for name, path in paths.items()} | {"device": "cpu"}


def run(name: str, parameters: dict, folder: Path) -> tuple[str, nbformat.NotebookNode]:
    """Runs a chapter; its summary and the executed copy, in which every named figure has an image."""
    text = run_notebook(ROOT / "notebooks" / f"{name}.ipynb", folder / f"{name}.ipynb", parameters)
    executed = nbformat.read(folder / f"{name}.ipynb", 4)
    for cell in executed.cells:
        if "figure" in cell.metadata.get("mystnb", {}):
            assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source
    return text, executed


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_has_all_its_parts(name):
    """Question, idea, equation, library source, a version by hand with a comparison, figure, take-away, differences."""
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert text.startswith("# ") and "**Question.**" in text and "**Idea.**" in text and "by hand" in text.lower()
    assert re.search(r"^\$\$ \(eq-[a-z-]+\)$", text, re.MULTILINE), "a numbered equation"
    assert "inspect.getsource(" in code and re.search(r"^ *assert", code, re.MULTILINE)
    for heading in ("What to take away", "Differences from the paper and the published code"):
        assert f"\n## {heading}\n" in text, heading
    figures = [cell.metadata["mystnb"] for cell in cells if "mystnb" in cell.metadata]
    assert figures and all(
        f["figure"]["name"].startswith("fig-") and f["figure"]["caption"] and f["image"]["alt"] for f in figures
    )


def test_labels_of_equations_and_figures_occur_once():
    found = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, 4).cells:
            found += re.findall(r"\$\$ \((eq-[a-z-]+)\)", cell.source)
            found += [cell.metadata["mystnb"]["figure"]["name"]] if "figure" in cell.metadata.get("mystnb", {}) else []
    assert len(set(found)) == len(found) > 15


def test_data(small, tmp_path):
    text, executed = run("data", small | {"queries": "3 5", "crops_of": 4}, tmp_path)
    assert "20 training images, 100 after five-crop" in text
    found = {name: float(value) for name, value in re.findall(r"([a-z ]+) share (0\.\d+)", text)}
    assert list(found) == ["nearest neighbors", " random partners"]
    table = next(
        o["data"]["text/html"]
        for cell in executed.cells
        for o in cell.get("outputs", [])
        if "text/html" in o.get("data", {})
    )
    assert "scenes" in table and "not here" in table, "the table lists present and missing datasets"


def test_evaluation(small, tmp_path):
    records = tmp_path / "records"
    for seed in range(4):
        write_json(records / f"{seed}.json", record(seed))
    parameters = {"steps": 6, "clusters": "0 3", "crf": False, "records": str(records)}
    text, _ = run("evaluation", small | parameters, tmp_path)
    (kept,) = Path(small["runs_dir"]).glob("*/metrics.json")
    counts = np.array(json.loads(kept.read_text())["confusion"])
    expected = scores(counts, match(counts))
    assert f"accuracy {expected['accuracy']:.1f}, mIoU {expected['miou']:.1f}" in text
    values = [one["scores"]["cluster"]["miou"] for one in results.read_records(records)]
    assert f"best of 4 recorded seeds {max(values):.1f}, their mean {np.mean(values):.1f}" in text


def test_ablations_run_what_is_missing_and_read_the_rest(small, tmp_path):
    """With limit 1, one missing run is trained; the recorded variant is read; all others are marked as not run."""
    records = tmp_path / "records"
    parameters = small | {"steps": 4, "seeds": "0 1", "records": str(records)}
    changes = {k: parameters[k] for k in ("data_root", "backbone", "steps", "device")}
    base = Experiment.preset("scenes", head="nonlinear", **changes)
    values = [30.0, 34.0]
    for seed, miou in enumerate(values):
        known = base.but(zero_clamp=True, crop="none", centering=False, crf=False, seed=seed)
        about = {"experiment": known.to_record(), "scores": {"cluster": {"accuracy": 50.0, "miou": miou}}, "seconds": 2}
        write_json(records / f"{seed}.json", about | {"step": 4})
    text, _ = run("ablations", parameters | {"limit": 1}, tmp_path)
    (new,) = [path for path in records.glob("*.json") if "ingredients" in path.name]
    done = results.read_record(new)
    assert new.name.startswith("ingredients-plain-seed0-") and done["experiment"]["zero_clamp"] is False
    lines = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    assert f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" in lines["+ zero clamp"]
    assert f"{done['scores']['cluster']['miou']:.1f}" in lines["plain"] and "not run" in lines["+ centering"]
    assert "have no record" in text


def test_a_chapter_without_records_says_so(small, tmp_path):
    """A chapter without any record shows no number and trains nothing."""
    folder = tmp_path / "nothing"
    text, _ = run("ablations", small | {"records": str(folder)}, tmp_path)
    assert "not run" in text and not folder.exists() and not re.search(r"\d+\.\d", text)


def test_baselines(small, tmp_path):
    records = tmp_path / "records"
    parameters = {"steps": 4, "seeds": "0", "dims": "2 8 64", "limit": 3, "records": str(records)}
    text, _ = run("baselines", small | parameters, tmp_path)
    kept = results.read_records(records)
    assert sorted((one["fixed_head"], one["experiment"]["code_dim"]) for one in kept) == [
        ("pca", 2), ("pca", 8), ("random projection", 2),
    ], "64 exceeds the 32 channels of the backbone"  # fmt: skip
    best = max(one["scores"]["cluster"]["miou"] for one in kept if one["fixed_head"] == "pca")
    assert f"pca: best {best:.1f} mIoU" in text


def test_speed(tmp_path):
    machine = dict(cpu="a CPU", amx=False, gpu=None, torch="2", date="2026-01-01 00:00", load=0.1)
    result = {"machine": machine, "settings": {"tiny": False, "threads": 2}, "rows": speed_rows()}
    write_json(tmp_path / "results" / "a-cpu.json", result)
    text, executed = run("speed", {"results": str(tmp_path / "results")}, tmp_path)
    assert "a-cpu.json: 8 rows" in text and "40.0 x" in text and "impossible here" in text
    shown = "\n".join(str(output.get("text", "")) for cell in executed.cells for output in cell.get("outputs", []))
    assert (
        "multiplies bfloat16 more slowly" in shown
        and "Neighbors of 600,000 images, all pairs compared: 200.0 hours" in shown
    )


def test_benchmark(tmp_path):
    text, executed = run("benchmark", {}, tmp_path)
    published = results.published_results()
    assert f"{len(published)} published rows, {(published.verified == 'yes').sum()} of them verified" in text
    shown = "\n".join(
        o["data"].get("text/html", "") for cell in executed.cells for o in cell.get("outputs", []) if "data" in o
    )
    for _, row in published.iterrows():
        assert row.source in shown and row.method in shown, row
    for folder in (ROOT / "book" / "records").glob("*/"):
        if list(folder.glob("*.json")):
            mean = results.summary(results.read_records(folder)).loc["cluster", ("miou", "mean")]
            assert f"{mean:.1f}" in shown, folder
    assert shown.count("not run: needs") >= 1


def test_choosing(small, tmp_path):
    text, _ = run("choosing", small | {"steps": 5, "trials": "20 80"}, tmp_path)
    percents = [float(p) for p in re.findall(r"([\d.]+) % of the pairs attract", text)]
    assert percents == pytest.approx([100 - float(shift[1:]) for shift in AUTO], abs=0.2), (
        "a percentile separates the pairs"
    )
    assert text.count("all shifts at p") == 2 and "the recipe's shifts" in text


def test_the_evidence_for_the_shifts_reads_records(tmp_path):
    text, _executed = run("choosing_evidence", {}, tmp_path)
    assert "none of 50" in text and "of these runs have no record" in text


def test_segmenting_a_folder(small, tmp_path):
    """Images of two sizes give label maps of their own size, and the notebook's comparison by hand passes."""
    run_folder = train(
        Experiment.preset("scenes", **{k: v for k, v in small.items() if k != "runs_dir"}, steps=4), runs_dir=tmp_path
    ).folder
    sizes = {"wide": (90, 150), "tall": (130, 75)}
    for name, (height, width) in sizes.items():
        noise = np.random.default_rng(height).integers(0, 255, (height, width, 3), dtype=np.uint8)
        save(tmp_path / "images" / f"{name}.png", noise)
    parameters = {"run": str(run_folder), "images": str(tmp_path / "images"), "output": str(tmp_path / "out")}
    text, _ = run("segment_your_images", parameters, tmp_path)
    assert text.startswith("2 images segmented")
    for name, size in sizes.items():
        assert np.array(Image.open(tmp_path / "out" / "labels" / f"{name}.png")).shape == size


def test_a_folder_without_a_run_is_trained_on(small, tmp_path):
    """As the chapter does it without parameters, on images without labels."""
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 255, (40, 56, 3), dtype=np.uint8)
        save(tmp_path / "images" / f"{number}.png", noise)
    parameters = {
        "images": str(tmp_path / "images"),
        "backbone": small["backbone"],
        "runs_dir": str(tmp_path / "runs"),
        "device": "cpu",
    }
    text, _executed = run("segment_your_images", parameters | {"steps": 2, "n_classes": 3}, tmp_path)
    assert text.startswith("4 images segmented")
    (folder,) = (tmp_path / "runs").glob("*-folder-*")
    assert (
        len(list((folder / "segmented" / "labels").glob("*.png"))) == 4
        and "cluster 2" in (folder / "segmented" / "areas.csv").read_text()
    )


def test_naming_segments(small, tmp_path):
    """Without names the placeholders, kept beside the run; with a file its names, in every annotation."""
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 255, (5, 7, 3), dtype=np.uint8)
        save(tmp_path / "images" / f"{number}.png", np.array(Image.fromarray(noise).resize((112, 80))))
    parameters = {
        "images": str(tmp_path / "images"),
        "backbone": small["backbone"],
        "runs_dir": str(tmp_path / "runs"),
        "device": "cpu",
    }
    text, _ = run("name_your_segments", parameters | {"steps": 2, "n_classes": 5}, tmp_path)
    (folder,) = (tmp_path / "runs").glob("*-folder-*")
    placeholders = list(json.loads((folder / "names.json").read_text())["names"].values())
    assert text.startswith("4 images annotated with 3 names") and sorted(map(str, placeholders)) == [
        "None",
        "merged",
        "merged",
    ]
    write_json(tmp_path / "names.json", {"cluster 0": "ground", "cluster 4": "ground", "cluster 2": None})
    given = {
        "images": str(tmp_path / "images"),
        "run": str(folder),
        "names": str(tmp_path / "names.json"),
        "device": "cpu",
    }
    text, _ = run("name_your_segments", given | {"formats": "coco-panoptic"}, tmp_path)
    assert text.startswith("4 images annotated with 3 names in coco-panoptic")
    categories = json.loads((folder / "annotated" / "panoptic.json").read_text())["categories"]
    assert [one["name"] for one in categories] == ["ground", "cluster 1", "cluster 3"]


def test_light_makes_what_is_missing_and_shows_the_rest(small, tmp_path):
    parameters = small | {"seeds": "0", "limit": 1, "records": str(tmp_path / "records")}
    text, _ = run("light", parameters, tmp_path)
    (made,) = (tmp_path / "records").glob("*.json")
    assert results.read_record(made)["light"] == 0 and made.name.endswith("-seed0-light0.json")
    assert text.count("no record") == 3, "those of the book are of other backbones"


def test_after_stego_reads_the_records(tmp_path):
    text, _ = run("after_stego", {}, tmp_path)
    rows = {line.split("  ")[0] for line in text.splitlines()}
    assert rows >= {
        "k-means on the features",
        "STEGO",
        "SmooSeg",
        "PriMaPs-EM",
        "HP",
        "CAUSE-MLP",
        "depth term (ours, after DepthG)",
    }


def test_the_photographs_that_come_with_the_project_are_small_and_can_be_read():
    files = sorted((ROOT / "data" / "photographs").glob("*.jpg"))
    assert len(files) == 24 and sum(file.stat().st_size for file in files) < 600_000
    for file in files:
        with Image.open(file) as image:
            assert image.convert("RGB").size[0] >= 240
    assert "public domain" in (ROOT / "data" / "photographs" / "README.md").read_text()


@pytest.mark.parametrize("name", ["stego_from_scratch", "train", "correspondence", "loss", *CHAPTERS])
def test_a_chapter_says_what_it_needs_folds_its_set_up_and_ends_with_exercises(name):
    """Every solution is folded, and runs wherever the chapter runs in these tests."""
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells
    first = cells[0].source
    assert "**You need**" in first and "**It takes**" in first
    folded = {"hide-input", "hide-cell"}
    for cell in cells:
        tags = set(cell.metadata.get("tags", []))
        if "parameters" in tags or "check_parameters()" in cell.source or "use_style()" in cell.source:
            assert tags & folded or name == "stego_from_scratch", cell.source[:60]
    at = next(number for number, cell in enumerate(cells) if "## Exercises" in cell.source)
    tasks = re.findall(
        r"^\*\*\d\. ", "\n".join(cell.source for cell in cells[at:] if cell.cell_type == "markdown"), re.MULTILINE
    )
    solutions = [cell for cell in cells[at:] if "hide-cell" in cell.metadata.get("tags", [])]
    assert len(tasks) == len(solutions) >= 3
