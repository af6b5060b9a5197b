"""`make reproduce`: every row of the paper from archives to the table, on stand-ins at the full image size.

The parameters of one row are those of the line that make prints.
"""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import standins
from common import BASELINES, ROOT, few_samples, run_cells
from sources import cityscapes_archives, potsdam_patches_archive

from stego_book.notebooks import parameters_of
from stego_book.studies import results
from stego_lib import DataNotFound, StegoError
from stego_lib.datasets.cocostuff import FINE

SHORT = dict(steps=2, batch_size=4, device="cpu", precision="float32")
STEGO = {"cluster", "cluster_crf", "linear", "linear_crf"}


def place(row: str, root: Path, source: Path) -> None:
    """The archives of the row's dataset below `root`; COCO-Stuff as it is when unpacked (no archive has its lists)."""
    if row == "cityscapes-vitb8":
        cityscapes_archives(root, source, {"train": 2, "val": 1})
    elif row == "potsdam3-vits8":
        potsdam_patches_archive(root, source, 8, 2)
    else:
        standins.cocostuff(root, {"train": 2, "val": 1}, (FINE,))


def parameters(row: str, data: Path, **given: object) -> dict[str, object]:
    """Parameters that `make reproduce` passes to the notebook, read as its command line reads them."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    arguments = " ".join(f"-p {name} {shlex.quote(str(value))}" for name, value in given.items())
    command = ["make", "-n", "reproduce", f"ROW={row}", f"DATA={data}", f"ARGS={arguments}"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    (line,) = [shlex.split(line) for line in lines if "stego_book.notebooks" in line]
    assert line[1:5] == ["-m", "stego_book.notebooks", "notebooks/reproduce.ipynb", f"runs/reproduce-{row}.ipynb"]
    known = parameters_of(ROOT / "notebooks" / "reproduce.ipynb")
    assert set(line[5::3]) == {"-p"}
    return {name: known[name].parse(text) for name, text in zip(line[6::3], line[7::3], strict=True)}


def check_records(folder: Path, seeds: list[int]) -> list[dict]:
    """The records of the row: with and without CRF, beside the baselines; returns them."""
    kept = results.read_records(folder)
    assert [record["experiment"]["seed"] for record in kept] == seeds
    for record in kept:
        assert STEGO | BASELINES | {"kmeans_features_crf"} == record["scores"].keys()
        assert record["step"] == SHORT["steps"] and record["experiment"]["official"]["published"]
    return kept


def test_a_row_runs_to_its_table(tmp_path, dino_file):
    row, data, runs_dir = "cityscapes-vitb8", tmp_path / "my data", tmp_path / "runs_of_mine"
    place(row, data, tmp_path / "source")
    printed = run_cells("reproduce", **parameters(row, data, seeds=0, backbone=dino_file, runs_dir=runs_dir, **SHORT))
    kept = check_records(runs_dir / "records" / row, [0])
    table = results.markdown_table(kept, results.published_figures(row))
    assert table in printed and "| 73.2 | 21.0 |" in table and "published: 2,975" in printed
    assert "not the paper's row: steps is 2, the recipe's 7000" in printed
    assert "not the paper's row: scored on 1 images, the published figures are of 500" in printed


@pytest.mark.parametrize("row", ["cocostuff27-vits8", "potsdam3-vits8"])
def test_the_other_rows_run_to_their_tables(row, tmp_path, dino_file, monkeypatch):
    few_samples(monkeypatch)
    place(row, tmp_path / "data", tmp_path / "source")
    seeds = [3, 5] if row == "potsdam3-vits8" else [3]  # its CRF is quick
    where = dict(data_root=tmp_path / "data", runs_dir=tmp_path / "runs", backbone=dino_file)
    printed = run_cells("reproduce", row=row, seeds=str(seeds).strip("[]"), resume=False, **where, **SHORT)
    kept = check_records(tmp_path / "runs" / "records" / row, seeds)
    assert results.markdown_table(kept, results.published_figures(row)) in printed


def test_data_that_are_not_there_end_it_before_any_work(tmp_path):
    with pytest.raises(DataNotFound, match=r"www\.cityscapes-dataset\.com"):
        run_cells("reproduce", row="cityscapes-vitb8", data_root=tmp_path / "data", runs_dir=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_row_that_does_not_exist_ends_before_any_work(tmp_path):
    with pytest.raises(StegoError, match="its rows"):
        run_cells("reproduce", row="cityscape-vitb8", data_root=tmp_path / "data", runs_dir=tmp_path / "work")
    assert list(tmp_path.iterdir()) == []
