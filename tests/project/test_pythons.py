"""Setting up: what `make setup` says, what the wheel holds, which Pythons were tried; with stand-ins for Python."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import pythons
import yaml
from common import ROOT

from stego_lib.utils.files import read_json

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PIP = [sys.executable, "-m", "pip"]
ALL, CRF = "--editable .[all]", "--no-build-isolation --editable .[crf]"


TRY = """
import json
from pathlib import Path
import stego_lib
from stego_lib import Experiment, train
from stego_book.studies.results import paper_rows

run = train(Experiment.preset("scenes", data_root={root!r}, steps=2, batch_size=4, train_size=64, eval_size=64))
label_map = run.predict(next(Path({root!r}).glob("scenes/imgs/val/*.png")))
print(json.dumps(dict(
    library=stego_lib.__file__, run=str(Path(run.folder).resolve()), backbone=run.experiment.backbone,
    shape=label_map.shape, rows=list(paper_rows()),
)))
"""
"""What a user of the installed package does; its last line is JSON."""


def stand_in(path: Path, does: str) -> Path:
    """Writes a program that is a shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    return path


def python(folder: Path, fails: str = "nothing") -> Path:
    """A Python that logs its arguments to `asked`, makes environments of itself, and fails on arguments with `fails`."""
    return stand_in(
        folder / "python",
        f"""echo "$*" >>{folder}/asked
        case "$*" in
            *"{fails}"*) echo "the reason of pip"; exit 1;;
            "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python";;
            "-m pip install"*) echo "WARNING: of no use";;
        esac""",
    )


def set_up(program: Path, folder: Path, *words: str) -> tuple[int, str]:
    """Exit status of `make setup` with that Python, and what it printed."""
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith("MAKE")
    }  # not those of a make above
    command = ["make", "--no-print-directory", "setup", f"PYTHON={program}", f"VENV={folder / 'venv'}", *words]
    done = subprocess.run(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def test_set_up_installs_all_then_the_crf_and_says_one_line(tmp_path):
    status, printed = set_up(python(tmp_path), tmp_path)
    assert status == 0 and printed.splitlines() == [printed.strip()] and printed.startswith("setting up")
    asked = (tmp_path / "asked").read_text()
    assert 0 < asked.index(ALL) < asked.index(CRF) and asked.count("--constraint constraints.txt") == 2
    assert set_up(python(tmp_path), tmp_path) == (0, "make: Nothing to be done for 'setup'.\n"), "once"


def test_without_constraints_the_newest_dependencies_are_installed(tmp_path):
    assert set_up(python(tmp_path), tmp_path, "CONSTRAINTS=")[0] == 0
    asked = (tmp_path / "asked").read_text()
    assert ALL in asked and CRF in asked and "--constraint" not in asked


def test_without_a_compiler_it_goes_on_without_pydensecrf_and_says_so_in_one_line(tmp_path):
    status, printed = set_up(python(tmp_path, fails=CRF), tmp_path)
    _, line = printed.splitlines()
    assert status == 0 and (tmp_path / "venv" / ".ready").exists()
    assert (
        "without pydensecrf" in line and "slower engine" in line and "C++ compiler" in line and "make -B setup" in line
    )
    (log,) = re.findall(r"see (\S+)", line)
    assert Path(log).read_text() == "the reason of pip\n"


def test_what_pip_says_is_shown_if_it_fails(tmp_path):
    status, printed = set_up(python(tmp_path, fails=ALL), tmp_path)
    assert status != 0 and "the reason of pip" in printed and not (tmp_path / "venv" / ".ready").exists()


def test_an_environment_that_was_cut_short_is_made_anew(tmp_path):
    """`python -m venv` broke off before it had brought pip, as it does on Debian without python3-venv."""
    stand_in(tmp_path / "venv" / "bin" / "python", "exit 1")
    assert set_up(python(tmp_path), tmp_path)[0] == 0 and (tmp_path / "venv" / ".ready").exists()


def test_an_old_python_is_one_line_that_names_the_way_out(tmp_path):
    status, printed = set_up(python(tmp_path, fails="version_info"), tmp_path)
    assert status != 0 and "Python 3.11 or later is needed" in printed and "make PYTHON=python3.12" in printed
    assert not (tmp_path / "venv").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the library."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools is not installed (extra `build`)")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "stego_lib", folder / "stego_lib", ignore=shutil.ignore_patterns("__pycache__"))
    build = [*PIP, "wheel", "--verbose", "--no-deps", "--no-index", "--no-build-isolation", "."]
    done = subprocess.run(build, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stdout + done.stderr, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_file_of_the_library_and_is_built_without_a_warning(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    library = {str(p.relative_to(wheel.parent)) for p in (wheel.parent / "stego_lib").rglob("*") if p.is_file()}
    assert {Path(name).suffix for name in library} >= {".csv", ".html", ".json", ".md", ".safetensors"}
    assert library <= held


def test_the_wheel_trains_the_embedded_default_outside_the_checkout(wheel, tmp_path, scenes_root):
    """It finds its weights and the table of published results, and puts the run below the working folder."""
    installed, work = tmp_path / "installed", tmp_path / "work"
    install = [*PIP, "install", "--quiet", "--no-deps", "--no-index", "--target", installed, wheel]
    subprocess.run(install, check=True)
    work.mkdir()
    (work / "try.py").write_text(TRY.format(root=str(scenes_root)))
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "try.py"], cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert Path(result["library"]).is_relative_to(installed) and Path(result["run"]).is_relative_to(work / "runs")
    assert (
        result["backbone"] == "scenes_vit_tiny8"
        and result["shape"] == [64, 64]
        and "cityscapes-vitb8" in result["rows"]
    )


def test_the_newest_python_of_each_minor_version_is_found(tmp_path):
    def put(folder: str, name: str, version: str) -> None:
        stand_in(tmp_path / folder / name, f"echo {version.replace('.', ' ')} {version} /{folder}/{name}")

    put("a", "python3.13", "3.13.0")
    put("a", "python3.12", "3.12.9")
    put("b", "python3.12", "3.12.10")
    put("b", "python3.12-config", "3.12.11")
    put("b", "python3.10", "3.10.14")
    stand_in(tmp_path / "b" / "python3.14", "echo python3.14: command not found; exit 127")
    found = pythons.find([tmp_path / "a", tmp_path / "b", tmp_path / "none"])
    assert list(found.items()) == [("3.12.10", "/b/python3.12"), ("3.13.0", "/a/python3.13")]


def test_a_python_that_fails_is_reported_and_its_logs_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pythons, "REPORT", tmp_path / "report.json")
    monkeypatch.setattr(pythons, "find", lambda _: {"3.99.0": python(tmp_path, ALL)})
    assert pythons.main() == 1
    (row,) = read_json(tmp_path / "report.json")["pythons"]
    assert row.pop("seconds") < 60 and row == {"python": "3.99.0", "torch": None, "crf": False, "trained": False}
    out, err = capsys.readouterr()
    assert re.search(r"3\.99\.0 +- +no +no", out)
    kept = Path(err.split()[-1])
    assert "the reason of pip" in (kept / "setup.log").read_text()
    shutil.rmtree(kept)


def test_what_is_promised_was_tried():
    """If this fails, a Python came or went: `make pythons`, then update the classifiers, README.md and environment.yml."""
    rows = read_json(pythons.REPORT)["pythons"]
    assert all(row["trained"] and row["crf"] and row["torch"] for row in rows)
    minors = [row["python"].rpartition(".")[0] for row in rows]
    named = [
        c.rpartition(" ")[2] for c in PROJECT["classifiers"] if c.startswith("Programming Language :: Python :: 3.")
    ]
    assert (
        named == minors and PROJECT["requires-python"] == f">={minors[0]}" == f">={'.'.join(map(str, pythons.OLDEST))}"
    )
    for name in ("README.md", "environment.yml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert all(row["python"] in text for row in rows), name
    (conda,) = [d for d in yaml.safe_load(text)["dependencies"] if str(d).startswith("python=")]
    assert conda.removeprefix("python=") in minors
    lines = pythons.table(rows).splitlines()
    assert len(lines) == len(rows) + 1 and all(row["python"] in line for row, line in zip(rows, lines[1:], strict=True))


def test_a_python_that_trains_has_its_row(tmp_path):
    """`try_python` with a stand-in that writes the record the notebook would write."""
    record = '{"environment": {"python": "3.99.0", "torch": "9.1"}, "scores": {"cluster_crf": {}}}'
    program = stand_in(
        tmp_path / "python",
        f"""case "$*" in
            "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python";;
            *notebooks/train.ipynb*) mkdir -p {tmp_path}/runs/one && echo '{record}' >{tmp_path}/runs/one/metrics.json;;
        esac""",
    )
    row = {"python": "3.99.0", "torch": "9.1", "crf": True, "trained": True}
    assert pythons.try_python("3.99.0", str(program), tmp_path).items() >= row.items()
    assert not pythons.try_python("3.99.1", str(program), tmp_path)["trained"], "the kernel was another Python's"
