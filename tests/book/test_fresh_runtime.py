"""The first cell of every notebook, which makes a fresh runtime such as Colab's ready, and the quickstart."""

import http.server
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from common import ROOT, run_cells
from sources import serving
from standins import noise_images

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CELLS = [next(cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code") for path in NOTEBOOKS]
# Python that hides an installed stego_lib, keeps pip from running, prints its arguments, and runs the cell.
KERNEL = """
import os, subprocess, sys
sys.path[:] = [path for path in sys.path if not os.path.isdir(os.path.join(path or ".", "stego_lib"))]
run = subprocess.run
def without_pip(command, **options):
    return print(command) if "pip" in command else run(command, **options)
subprocess.run = without_pip
"""


def run_cell(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"{KERNEL}\n{CELLS[0].source}\nimport stego_lib, stego_book; print(stego_lib.__file__, stego_book.__file__)"
    values = {"PATH": os.environ["PATH"], "HOME": str(folder), "NO_PROXY": "127.0.0.1"} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=values, capture_output=True, text=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository that holds the packages and the helper script."""
    for name in ("stego_lib", "book/stego_book", "notebooks"):
        (tmp_path / "a" / "book" / name).mkdir(parents=True)
    for name in ("stego_lib/__init__.py", "book/stego_book/__init__.py"):
        (tmp_path / "a" / "book" / name).touch()
    shutil.copy(ROOT / "notebooks" / "colab_setup.py", tmp_path / "a" / "book" / "notebooks")
    for command in ("init -q -b trial", "add -A", "-c user.name=a -c user.email=a@example.org commit -qm a"):
        subprocess.run(["git", *command.split()], cwd=tmp_path / "a" / "book", check=True)
    return tmp_path / "a" / "book"


def test_it_is_the_same_in_every_notebook_and_hidden_on_its_page():
    assert len({cell.source for cell in CELLS}) == 1 and all(cell.metadata.tags == ["remove-cell"] for cell in CELLS)


def test_it_clones_and_installs_the_project_and_keeps_torch(repository, tmp_path):
    done = run_cell(tmp_path, STEGO_SOURCE=str(repository))
    assert done.returncode == 0, done.stderr
    pip, about, files = done.stdout.splitlines()
    assert f"torch=={importlib.metadata.version('torch')}" in pip and pip.count("==") == 1
    assert "torch" in about and files.split() == [
        str(tmp_path / "stego" / name / "__init__.py") for name in ("stego_lib", "book/stego_book")
    ]


def test_it_asks_colab_for_the_repository_and_the_branch(repository, tmp_path):
    path = "fileId=https%3A%2F%2Fgithub.com%2Fa%2Fbook%2Fblob%2Ftrial%2Fnotebooks%2Ftrain.ipynb"

    class Sessions(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps([{"path": path}]).encode())

    with serving(Sessions) as root:
        address = {"COLAB_JUPYTER_IP": "127.0.0.1", "KMP_TARGET_PORT": root.rpartition(":")[2]}
        github = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_VALUE_0": "https://github.com/"}
        github["GIT_CONFIG_KEY_0"] = f"url.{tmp_path}/.insteadOf"
        done = run_cell(tmp_path, **address, **github)
    assert done.returncode == 0, done.stderr


def test_without_an_address_it_names_the_remedy(tmp_path):
    assert "STEGO_SOURCE" in run_cell(tmp_path).stderr


def test_the_quickstart_runs_in_ten_cells(tmp_path, backbone_file):
    assert len(nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", 4).cells) <= 10
    images = tmp_path / "images"
    noise_images(images, *[(56, 40)] * 6)
    run_cells("quickstart", images=images, backbone=backbone_file, n_classes=2, steps=2, runs_dir=tmp_path / "runs")
    (written,) = (tmp_path / "runs").glob("*/segmented")
    assert len(list((written / "labels").glob("*.png"))) == 6 and (written / "areas.csv").is_file()
