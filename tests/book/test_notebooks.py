"""The notebooks as users run them: with papermill, with the project's runner, and with nbval."""

import ast
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import papermill
import pytest
import standins
import torch
from common import BASELINES, ROOT
from records import record as made_up_record
from safetensors import safe_open

from stego_book import notebooks
from stego_book.notebooks import check_parameters, main, run_notebook
from stego_book.studies import results
from stego_lib import StegoError
from stego_lib.datasets.scenes import draw_scenes
from stego_lib.utils.files import load_state

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TRAIN = ROOT / "notebooks" / "train.ipynb"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Parameters of a tiny run: 20 scenes, 12 steps."""
    folder = tmp_path_factory.mktemp("notebooks")
    draw_scenes(folder / "data" / "scenes", train=20, val=6)
    return {"data_root": str(folder / "data"), "runs_dir": str(folder / "runs"), "steps": 12, "device": "cpu"}


@pytest.fixture(scope="module")
def executed(small, tmp_path_factory):
    """train.ipynb executed on tiny scenes, and the text of its summary."""
    path = tmp_path_factory.mktemp("executed") / "train.ipynb"
    return path, run_notebook(TRAIN, path, small | {"validate_every": 6})


def outputs(path: Path) -> list:
    return [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]


def test_train_runs_to_the_end_and_prints_scores(executed, small):
    path, text = executed
    assert not [output for output in outputs(path) if output.output_type == "error"]
    (run,) = [line.removeprefix("run folder: ") for line in text.splitlines() if line.startswith("run folder: ")]
    record = json.loads((Path(run) / "metrics.json").read_text())
    assert record["step"] == small["steps"]
    for method, name in results.METHODS.items():
        if method in record["scores"]:
            (line,) = [line for line in text.splitlines() if line.split(" accuracy")[0].strip() == name]
            assert f"{record['scores'][method]['miou']:.1f}" in line
    assert {*BASELINES, "cluster", "linear"} <= set(record["scores"])
    best = record["best_by_label"]
    (line,) = [line for line in text.splitlines() if "not a result" in line]
    assert (
        best["steps"] == [6, 12]
        and f"{best['step']}: accuracy {best['accuracy']:.1f}   mIoU {best['miou']:.1f}" in line
    )
    saved = {figure.stem for figure in (Path(run) / "figures").glob("*.png")}
    assert saved == {"correspondences", "curves", "scores", "predictions", "confusion", "class_iou"}
    images = [output for output in outputs(path) if "image/png" in output.get("data", {})]
    assert len(images) == 8, "six saved figures, the examples of the data and one step"


def test_nbval_runs_every_cell_of_the_executed_notebook_again(executed):
    path, _ = executed
    source = nbformat.read(path, 4)
    asserting = [cell for cell in source.cells if cell.cell_type == "code" and "assert " in cell.source]
    assert len(asserting) >= 2, "without assertions nbval only checks that there are no errors"
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "-p", "no:cacheprovider", "-q", str(path)]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, timeout=600)
    cells = [cell for cell in source.cells if cell.cell_type == "code"]
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{len(cells)} passed" in done.stdout, done.stdout[-3000:]


def test_nbval_fails_when_an_assertion_of_the_notebook_does(executed, tmp_path):
    broken = nbformat.read(executed[0], 4)
    broken.cells = [nbformat.v4.new_code_cell("x = 1"), nbformat.v4.new_code_cell("assert x == 2")]
    nbformat.write(broken, tmp_path / "broken.ipynb")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval-lax",
        "-p",
        "no:cacheprovider",
        "-q",
        str(tmp_path / "broken.ipynb"),
    ]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=300).returncode == 1


def test_the_runner_refuses_a_misspelled_parameter_before_it_runs_anything(tmp_path, capsys):
    with pytest.raises(StegoError, match=r"'stesp' \(did you mean 'steps'\?\)"):
        run_notebook(TRAIN, tmp_path / "out.ipynb", {"stesp": 3})
    assert main([str(TRAIN), str(tmp_path / "out.ipynb"), "-p", "stesp", "3"]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err
    assert not (tmp_path / "out.ipynb").exists()


def test_the_command_line_says_how_it_ended(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise papermill.PapermillExecutionError(3, 2, "1 / 0", "ZeroDivisionError", "division by zero", [])

    given = [str(TRAIN), str(tmp_path / "out.ipynb"), "-p", "steps", "3", "-p", "shifts", "[p70, 0.1, p80]"]
    asked = []
    monkeypatch.setattr(notebooks, "run_notebook", lambda *arguments: (asked.append(arguments), "mIoU 40.0\n")[1])
    assert main(given) == 0 and asked[0][2] == {"steps": 3, "shifts": "[p70, 0.1, p80]"}, (
        "values are read by the declared type"
    )
    assert capsys.readouterr().out == f"mIoU 40.0\nexecuted notebook: {tmp_path / 'out.ipynb'}\n"
    monkeypatch.setattr(notebooks, "run_notebook", fails)
    assert main(given) == 1
    error = capsys.readouterr().err
    assert "train.ipynb" in error and "ZeroDivisionError: division by zero" in error


def test_the_module_is_the_command_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "stego_book.notebooks",
        str(TRAIN),
        str(tmp_path / "out.ipynb"),
        "-p",
        "stesp",
        "3",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "did you mean 'steps'" in done.stderr


def test_the_check_of_parameters_reads_the_cells_before_it(monkeypatch):
    cells = ["%%time\nstesp = 1", "steps: int = 3  # help", "stesp = 2", "# Parameters\nstesp = 4"]
    shell = SimpleNamespace(user_ns={"In": cells})
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    with pytest.raises(StegoError, match=r"this notebook has no parameter 'stesp' \(did you mean 'steps'\?\)"):
        check_parameters()
    cells[-1] = "# Parameters\nsteps = 4"
    check_parameters()
    cells[-1] = "# Parameters\nstesp = 4"
    monkeypatch.setitem(sys.modules, "IPython", None)
    check_parameters()  # outside a notebook it does nothing


def test_papermill_alone_leaves_few_outputs_in_a_notebook(small, tmp_path):
    """A progress bar that is redrawn twice per second would leave an output each time."""
    startup = tmp_path / "profile_default" / "startup" / "first.py"
    startup.parent.mkdir(parents=True)
    startup.write_text("from stego_lib.utils import progress\nprogress.LINE_EVERY = 0\n")
    environment = os.environ | {"IPYTHONDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("STEGO_BARS", None)
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(TRAIN), str(tmp_path / "out.ipynb")]
    for name, value in (small | {"steps": 40, "runs_dir": str(tmp_path / "runs")}).items():
        command += ["-p", name, str(value)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    streams = [output.text for output in outputs(tmp_path / "out.ipynb") if output.output_type == "stream"]
    assert len(streams) < 40 and not any("\r" in text for text in streams)
    printed = "".join(streams)
    for what in (
        "fitting the cluster probe",
        "fitting the linear probe",
        "baseline: k-means on features",
        "baseline: k-means on colors",
    ):
        assert what in printed, "each part without a progress bar is named"


@pytest.mark.parametrize("name", ["train", "seeds", "reproduce"])
def test_the_summary_reports_a_collapse(name, capsys):
    """The summary cell, run on the record of a collapsed run and of a healthy run."""
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells
    (cell,) = [cell for cell in cells if "summary" in cell.metadata.get("tags", [])]
    seen = "step 75: the codes are nearly all alike"
    for collapsed in (True, False):
        record = made_up_record(3) | {
            "collapsed": collapsed,
            "codes": {"seen": seen if collapsed else None},
            "images": 6,
        }
        run = SimpleNamespace(step=100, folder="runs/a", watched={"seen": seen}, experiment=SimpleNamespace(name="a"))
        values = dict(
            method_names=results.method_names,
            METHODS=results.METHODS,
            collapses=results.collapses,
            record=record,
            kept=[record],
            run=run,
            experiment=SimpleNamespace(name="a"),
            results=results,
            seeds=[3],
            records="r",
        )
        exec(cell.source, values | dict(row="cityscapes-vitb8", published=True, figures=None, departures=[]))
        assert (f"do not trust this run: seed 3: {seen}" in capsys.readouterr().out) == collapsed


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_papermill_alone_refuses_a_misspelled_parameter_too(notebook, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="no parameter 'sede'"):
        papermill.execute_notebook(str(notebook), str(tmp_path / "out.ipynb"), {"sede": 3}, progress_bar=False)
    ran = [cell for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells if cell.get("execution_count")]
    assert len(ran) <= 4, "only parameters and the check have run (papermill adds a cell that shows the error)"


def test_absent_data_stop_papermill_with_one_clear_error(tmp_path):
    command = [sys.executable, "-m", "papermill", str(TRAIN), str(tmp_path / "out.ipynb")]
    command += ["-p", "dataset", "cityscapes", "-p", "data_root", str(tmp_path / "nowhere")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    message = done.stderr[done.stderr.index("DataNotFound") :]
    assert str(tmp_path / "nowhere" / "cityscapes") in message
    assert "leftImg8bit/{train,val}" in message and "gtFine" in message and "cityscapes-dataset.com" in message
    assert "Traceback" not in message
    errors = [output for output in outputs(tmp_path / "out.ipynb") if output.output_type == "error"]
    assert [error.ename for error in errors] == ["DataNotFound"]
    assert not list(tmp_path.glob("runs*")), "no work was done"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_has_type_default_and_a_line_of_help(notebook):
    parameters = papermill.inspect_notebook(str(notebook))
    assert parameters
    for name, about in parameters.items():
        assert about["inferred_type_name"] in ("str", "int", "bool", "float", "list[int]"), name
        assert about["default"] != "" and len(about["help"]) > 10, name


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_clean_and_define_nothing(notebook):
    content = nbformat.read(notebook, 4)
    nbformat.validate(content)
    code = [cell for cell in content.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert content.metadata.kernelspec.name == "python3"
    for cell in code:
        defined = [
            node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        ]
        if notebook.stem != "stego_from_scratch":  # which implements the method by hand to compare it with the library
            assert not defined, "definitions live in the library"


def test_seeds_gives_mean_and_spread_of_its_records(small, tmp_path):
    records = tmp_path / "records"
    text = run_notebook(
        ROOT / "notebooks" / "seeds.ipynb",
        tmp_path / "out.ipynb",
        small | {"seeds": "3 5 8", "crf": False, "records": str(records)},
    )
    kept = results.read_records(records)
    assert sorted(record["experiment"]["seed"] for record in kept) == [3, 5, 8]
    assert results.markdown_table(kept) in text


def test_pretraining_notebook_makes_a_backbone(tmp_path):
    parameters = dict(
        steps=4, second_steps=2, images=16, watched=10, save_every=2, folder=str(tmp_path / "pre"), device="cpu"
    )
    text = run_notebook(ROOT / "notebooks" / "pretrain_scenes.ipynb", tmp_path / "out.ipynb", parameters)
    assert "no labels" in text and (tmp_path / "pre" / "scenes_vit_tiny8.safetensors").exists()
    curve = json.loads((tmp_path / "pre" / "curve.json").read_text())["curve"]
    expected = [("clear", 1), ("clear", 3), ("weather", 0), ("weather", 1)]
    assert [(point["stage"], point["step"]) for point in curve] == expected


def test_pretraining_on_photographs_makes_a_backbone_from_folders(tmp_path):
    for folder, count in (("camvid/train", 3), ("camvid/val", 3), ("photos", 2)):
        for number in range(count):
            flat = np.full((60, 80, 3), 40 * number + 20, np.uint8)
            standins.save(tmp_path / "data" / folder / f"drive_{number}.png", flat)
            if "camvid" in folder:
                ids = standins.stripes([0, 3, 11], 60, 80)
                standins.save(tmp_path / "data" / f"{folder}annot" / f"drive_{number}.png", ids)
    parameters = dict(
        data_root=str(tmp_path / "data"), recipe="photos", steps="2 1", batch_size=2, watched=1, save_every=2,
        watch_every=2, folder=str(tmp_path / "pre"), device="cpu",
    )  # fmt: skip
    text = run_notebook(ROOT / "notebooks" / "pretrain_photos.ipynb", tmp_path / "out.ipynb", parameters)
    assert "4 photographs, dense contrast, 2 and 1 steps, no labels" in text, "one of three frames is held out"
    assert (tmp_path / "pre" / "photos_vit_tiny8.safetensors").stat().st_size < 12e6
    for stage, steps in (("first", 2), ("second", 1)):
        measured = json.loads((tmp_path / "pre" / f"{stage}.json").read_text())["measured"]
        assert [look["step"] for look in measured] == [0, steps]


def test_the_recipe_of_the_embedded_backbone_has_three_stages_and_keeps_the_last(tmp_path):
    parameters = dict(images="scenes", steps="2 1 1", batch_size=2, watched=10, folder=str(tmp_path), device="cpu")
    text = run_notebook(ROOT / "notebooks" / "pretrain_photos.ipynb", tmp_path / "out.ipynb", parameters)
    assert "64 scenes, dense contrast, 2 and 1 and 1 steps, no labels" in text
    with safe_open(tmp_path / "photos_vit_tiny8_d6.safetensors", "pt") as file:
        kept = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (no dictionary)
    last = load_state(tmp_path / "third" / "pretraining.pt")["objective"]
    torch.testing.assert_close(
        kept["blocks.5.mlp.fc2.weight"], last["vit.blocks.5.mlp.fc2.weight"], rtol=1e-2, atol=1e-3
    )
    for stage, crop in (("first", 40), ("second", 80), ("third", 112)):
        assert json.loads((tmp_path / f"{stage}.json").read_text())["recipe"]["crop"] == crop


def test_objectives_are_compared_on_equal_time(tmp_path):
    parameters = dict(
        images="scenes", recipe="photos", steps="1 1", batch_size=2, compare_seconds=1, watched=10, folder=str(tmp_path),
        device="cpu",
    )  # fmt: skip
    text = run_notebook(ROOT / "notebooks" / "pretrain_photos.ipynb", tmp_path / "out.ipynb", parameters)
    assert "kmeans_miou after equal time, best first: " in text
    for name in ["dense", "dino", "ibot", "dense, random start"]:
        content = json.loads((tmp_path / "objectives" / f"{name}.json").read_text())
        assert content["recipe"]["objective"] == name.split(",")[0] and len(content["measured"]) >= 2
        assert content["recipe"]["structured"] == ("random" not in name)
    starts = json.loads((tmp_path / "starts.json").read_text())
    assert [(one["start"], one["seed"]) for one in starts] == list(product(["random", "structured"], range(3)))
