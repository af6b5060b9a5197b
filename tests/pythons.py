"""Sets the project up with each Python found on the machine, as `make setup` does, and trains a few steps.

`make pythons` writes tests/reports/pythons.json and shows it as a table. Of each minor version the newest is taken. An
environment in which training succeeds is removed; one in which it fails stays, with setup.log and train.log.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import ROOT

from stego_lib.utils.environment import environment
from stego_lib.utils.files import read_json, write_json

REPORT = ROOT / "tests" / "reports" / "pythons.json"
OLDEST = (3, 11)
STEPS = 20
ABOUT = "import platform, sys; print(*sys.version_info[:3], platform.python_version(), sys.executable)"
COLUMNS = {"python": "Python", "torch": "torch", "crf": "CRF", "trained": "trained", "seconds": "seconds"}


def search_path() -> list[Path]:
    """Where Pythons may be: the folders of PATH, and each version of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    return [Path(part) for part in os.environ["PATH"].split(os.pathsep)] + sorted(pyenv.glob("versions/*/bin"))


def find(folders: Iterable[Path]) -> dict[str, str]:
    """Version -> program of the newest Python of each minor version from the oldest supported on, oldest first."""
    newest: dict[tuple[int, ...], tuple[tuple[int, ...], str, str]] = {}
    for program in [path for folder in folders for path in sorted(folder.glob("python3.*"))]:
        if not re.fullmatch(r"python3\.\d+", program.name):
            continue  # python3.12-config
        answer = subprocess.run([program, "-c", ABOUT], capture_output=True, text=True)
        if answer.returncode:
            continue  # a shim of pyenv whose version is not chosen
        *numbers, name, path = answer.stdout.strip().split(" ", 4)
        version = tuple(map(int, numbers))
        if version[:2] >= OLDEST and (version[:2] not in newest or version > newest[version[:2]][0]):
            newest[version[:2]] = version, name, path
    return {name: path for _, name, path in sorted(newest.values())}


def run(command: list[str | Path], log: Path) -> bool:
    """Runs a command in the project's folder, without the variables of a make above; its output goes to `log`."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    with log.open("w", encoding="utf-8") as file:
        return subprocess.run(command, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT).returncode == 0


def try_python(version: str, program: str, folder: Path) -> dict[str, Any]:
    """Sets up an environment in `folder` and trains in it; returns the row of the report."""
    began, python, runs = time.monotonic(), folder / "venv" / "bin" / "python", folder / "runs"
    row: dict[str, Any] = {"python": version, "torch": None, "crf": False, "trained": False}
    if run(["make", "setup", f"PYTHON={program}", f"VENV={folder / 'venv'}"], folder / "setup.log"):
        row["crf"] = run([python, "-c", "import pydensecrf.densecrf"], folder / "crf.log")
        parameters = {"steps": STEPS, "runs_dir": runs, "data_root": folder / "data"}
        given = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
        notebook = [python, "-m", "stego_book.notebooks", "notebooks/train.ipynb", str(folder / "out.ipynb"), *given]
        if run(notebook, folder / "train.log"):
            (record,) = map(read_json, runs.glob("*/metrics.json"))
            row["torch"] = record["environment"]["torch"]
            row["crf"] &= "cluster_crf" in record["scores"]
            row["trained"] = record["environment"]["python"] == version  # and not in a kernel of another Python
    return row | {"seconds": round(time.monotonic() - began)}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of a report as a table for the terminal."""
    words = {True: "yes", False: "no", None: "-"}
    cells = [list(COLUMNS.values())]
    cells += [
        [words.get(row[key]) if isinstance(row[key], bool | None) else str(row[key]) for key in COLUMNS] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def main() -> int:
    """The command line; returns the exit status, 1 unless every Python trained with the CRF."""
    rows, failed = [], []
    for version, program in find(search_path()).items():
        print(f"Python {version}: setting up and training ...", flush=True)
        folder = Path(tempfile.mkdtemp(prefix=f"python-{version}-"))
        rows.append(try_python(version, program, folder))
        if rows[-1]["trained"] and rows[-1]["crf"]:
            shutil.rmtree(folder)
        else:
            failed.append(f"Python {version}: see the logs in {folder}")
    about = environment()
    write_json(REPORT, {
        "written by": "make pythons", "steps": STEPS, "pythons": rows,
        "environment": {"machine": about["machine"], "date": about["date"]},
    })  # fmt: skip
    print(table(rows))
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
