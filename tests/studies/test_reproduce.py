"""`make reproduce`: every row of the paper from archives to the table, on stand-ins at the full image size.

One row runs as a person runs it, by the line that make prints. The others go through the same notebook's cells in this
process, which is quicker.
"""

import shlex
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
import standins
from common import BASELINES, ROOT, few_samples
from sources import cityscapes_archives, potsdam_patches_archive

from stego_book.notebooks import main
from stego_book.studies import results
from stego_lib import StegoError
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


def make(folder: Path, row: str, data: Path, monkeypatch: pytest.MonkeyPatch, **parameters: object) -> int:
    """Runs what `make reproduce` would run, in `folder`; returns the exit status."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    arguments = " ".join(f"-p {name} {shlex.quote(str(value))}" for name, value in parameters.items())
    command = ["make", "-n", "reproduce", f"ROW={row}", f"DATA={data}", f"ARGS={arguments}"]  # fmt: skip
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    (line,) = [line for line in lines if "stego_book.notebooks" in line]
    (folder / "notebooks").symlink_to(ROOT / "notebooks")
    monkeypatch.chdir(folder)
    interpreter, *module, notebook, output = shlex.split(line)[:5]
    assert (Path(interpreter).name, module) == ("python", ["-m", "stego_book.notebooks"])
    return main([notebook, output, *shlex.split(line)[5:]])


def check_records(folder: Path, seeds: list[int]) -> list[dict]:
    """The records of the row: with and without CRF, beside the baselines; returns them."""
    kept = results.read_records(folder)
    assert [record["experiment"]["seed"] for record in kept] == seeds
    for record in kept:
        assert STEGO | BASELINES | {"kmeans_features_crf"} == record["scores"].keys()
        assert record["step"] == SHORT["steps"] and record["experiment"]["official"]["published"]
    return kept


def test_a_row_runs_to_its_table(tmp_path, dino_file, monkeypatch, capsys):
    row = "cityscapes-vitb8"
    place(row, tmp_path / "my data", tmp_path / "source")
    runs_dir = tmp_path / "runs_of_mine"
    status = make(
        tmp_path, row, tmp_path / "my data", monkeypatch, seeds=0, backbone=dino_file, runs_dir=runs_dir, **SHORT
    )
    said = capsys.readouterr().out
    assert status == 0, said
    kept = check_records(runs_dir / "records" / row, [0])
    table = results.markdown_table(kept, results.published_figures(row))
    assert table in said and "| 73.2 | 21.0 |" in table
    assert "not the paper's row: steps is 2, the recipe's 7000" in said
    assert "not the paper's row: scored on 1 images, the published figures are of 500" in said
    executed = nbformat.read(tmp_path / "runs" / f"reproduce-{row}.ipynb", 4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert any("published: 2,975" in output.get("text", "") for output in outputs)


def run_cells(parameters: dict[str, object]) -> dict[str, object]:
    """Runs the notebook's code in this process; returns its variables."""
    variables: dict[str, object] = {}
    for cell in nbformat.read(ROOT / "notebooks" / "reproduce.ipynb", 4).cells:
        if cell.cell_type == "code":
            exec(cell.source, variables)
            variables |= parameters if "parameters" in cell.metadata.get("tags", []) else {}
    return variables


@pytest.mark.parametrize("row", ["cocostuff27-vits8", "potsdam3-vits8"])
def test_the_other_rows_run_to_their_tables(row, tmp_path, dino_file, monkeypatch, capsys):
    few_samples(monkeypatch)
    place(row, tmp_path / "data", tmp_path / "source")
    seeds = [3, 5] if row == "potsdam3-vits8" else [3]  # its CRF is quick
    where = {"data_root": str(tmp_path / "data"), "runs_dir": str(tmp_path / "runs")}
    run_cells(
        {"row": row, "seeds": str(seeds).strip("[]"), "backbone": str(dino_file), "resume": False} | where | SHORT
    )
    kept = check_records(tmp_path / "runs" / "records" / row, seeds)
    assert results.markdown_table(kept, results.published_figures(row)) in capsys.readouterr().out


def test_data_that_are_not_there_end_it_with_one_clear_error(tmp_path, monkeypatch, capfd):
    status = make(tmp_path, "cityscapes-vitb8", tmp_path / "data", monkeypatch, runs_dir=tmp_path / "work")
    said = capfd.readouterr().err
    assert status != 0 and "Traceback" not in said
    assert said.count("www.cityscapes-dataset.com") == 1
    assert not (tmp_path / "work").exists(), "no work was done"


def test_a_row_that_does_not_exist_ends_before_any_work(tmp_path):
    with pytest.raises(StegoError, match="its rows"):
        run_cells(dict(row="cityscape-vitb8", data_root=str(tmp_path / "data"), runs_dir=str(tmp_path / "work")))
    assert list(tmp_path.iterdir()) == []
