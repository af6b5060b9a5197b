"""`make reproduce`: rows of the paper to their tables, on stand-ins, with the parameters that make passes."""

import shlex
import shutil
import subprocess

import pytest
import standins
from common import BASELINES, ROOT, run_cells

from stego_book.notebooks import parameters_of
from stego_book.studies import results
from stego_lib import DataNotFound, StegoError
from stego_lib.datasets.cocostuff import FINE

pytestmark = pytest.mark.usefixtures("few_samples")

SHORT = dict(steps=2, batch_size=4, eval_size=64, device="cpu")
STEGO = {"cluster", "cluster_crf", "linear", "linear_crf"}
# Row -> what puts its dataset below a folder.
ROWS = {
    "cityscapes-vitb8": lambda root: standins.cityscapes(root, {"train": 2, "val": 1}, 128, 256),
    "cocostuff27-vits8": lambda root: standins.cocostuff(root, {"train": 2, "val": 1}, (FINE,), 120, 182),
    "potsdam3-vits8": lambda root: standins.potsdam_patches(root, 8, 2),
}


def passed_by_make(row: str, **given: object) -> dict[str, object]:
    """Parameters that `make reproduce` passes to the notebook, read as its command line reads them."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    data = given.pop("data_root")
    arguments = " ".join(f"-p {name} {shlex.quote(str(value))}" for name, value in given.items())
    command = ["make", "-n", "reproduce", f"ROW={row}", f"DATA={data}", f"ARGS={arguments}"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    (line,) = [shlex.split(line) for line in lines if "stego_book.notebooks" in line]
    assert line[1:5] == ["-m", "stego_book.notebooks", "notebooks/reproduce.ipynb", f"runs/reproduce-{row}.ipynb"]
    assert set(line[5::3]) == {"-p"}
    known = parameters_of(ROOT / "notebooks" / "reproduce.ipynb")
    return {name: known[name].parse(text) for name, text in zip(line[6::3], line[7::3], strict=True)}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_runs_to_its_table(row, tmp_path, dino_file):
    given = dict(data_root=tmp_path / "my data", runs_dir=tmp_path / "my runs", backbone=dino_file)
    ROWS[row](given["data_root"])
    seeds = [3, 5] if row == "potsdam3-vits8" else [3]
    printed = run_cells("reproduce", **passed_by_make(row, seeds=str(seeds).strip("[]"), **given, **SHORT))
    kept = results.read_records(tmp_path / "my runs" / "records" / row)
    assert [record["experiment"]["seed"] for record in kept] == seeds
    for record in kept:
        assert STEGO | BASELINES | {"kmeans_features_crf"} == record["scores"].keys()
        assert record["step"] == SHORT["steps"] and record["experiment"]["official"]["published"]
    table = results.markdown_table(kept, results.published_figures(row))
    assert table in printed and "not the paper's row: steps is 2, the recipe's" in printed
    if row == "cityscapes-vitb8":
        assert "| 73.2 | 21.0 |" in table and "published: 2,975" in printed
        assert "not the paper's row: scored on 1 images, the published figures are of 500" in printed


@pytest.mark.parametrize(
    "row, error, said",
    [("cityscapes-vitb8", DataNotFound, "cityscapes-dataset"), ("cityscape-vitb8", StegoError, "its rows")],
    ids=["no data", "no row"],
)
def test_what_is_missing_ends_it_before_any_work(tmp_path, row, error, said):
    with pytest.raises(error, match=said):
        run_cells("reproduce", row=row, data_root=tmp_path / "data", runs_dir=tmp_path / "work")
    assert not (tmp_path / "work").exists()
