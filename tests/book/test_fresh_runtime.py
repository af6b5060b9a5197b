"""The first cell of every notebook, which makes a fresh runtime such as Colab's ready, and the quickstart."""

import http.server
import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import numpy as np
import pytest
from common import ROOT
from PIL import Image

from stego_book.notebooks import run_notebook

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICKSTART = ROOT / "notebooks" / "quickstart.ipynb"


def first_code(path: Path) -> nbformat.NotebookNode:
    return next(cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")


CELL = first_code(QUICKSTART).source


@pytest.fixture
def commands(monkeypatch, tmp_path) -> list[list[str]]:
    """What the cell would run, in a kernel without stego_lib; nothing is run."""
    seen: list[list[str]] = []
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "stego_lib" else find(name, *more)
    )
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: seen.append(command) or subprocess.CompletedProcess(command, 0)
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    for name in ("STEGO_SOURCE", "COLAB_JUPYTER_IP", "KMP_TARGET_PORT"):
        monkeypatch.delenv(name, raising=False)
    return seen


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_the_same_in_every_notebook_and_not_on_its_page(path):
    cell = first_code(path)
    assert cell.source == CELL and cell.metadata.tags == ["remove-cell"]


def test_it_does_nothing_where_the_library_is_installed(monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("nothing is to be installed"))
    exec(CELL, {})
    assert capsys.readouterr().out == ""


def test_it_fetches_the_project_and_installs_it_without_pins(commands, monkeypatch, capsys):
    monkeypatch.setenv("STEGO_SOURCE", "https://example.org/a/book")
    exec(CELL, {})
    clone, pip = commands
    assert clone[:2] == ["git", "clone"] and clone[-2:] == ["https://example.org/a/book", "stego"]
    assert pip[:4] == [sys.executable, "-m", "pip", "install"] and pip[-1].startswith("stego[")
    own = f"torch=={importlib.metadata.version('torch')}"
    assert own in pip, "what comes with a new torchvision would replace it"
    words = " ".join(word for word in pip if word != own)
    assert "==" not in words and "constraint" not in words and "torch" not in words and "upgrade" not in words
    assert sys.path[0] == str(Path("stego").resolve())
    assert "stego_lib from https://example.org/a/book, torch" in capsys.readouterr().out


def test_colab_tells_where_the_notebook_was_opened_from(commands, monkeypatch):
    name = "fileId=https%3A%2F%2Fgithub.com%2Fsomebody%2Fa-fork%2Fblob%2Fmain%2Fnotebooks%2Ftrain.ipynb"

    class Sessions(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/api/sessions"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps([{"name": "train.ipynb", "path": name}]).encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Sessions) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("COLAB_JUPYTER_IP", "127.0.0.1")
        monkeypatch.setenv("KMP_TARGET_PORT", str(server.server_port))
        exec(CELL, {})
    assert commands[0][-4:] == ["--branch", "main", "https://github.com/somebody/a-fork", "stego"]


def test_without_an_address_it_says_what_to_set(commands):
    with pytest.raises(ImportError, match=r"make setup.*STEGO_SOURCE"):
        exec(CELL, {})
    assert commands == []


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_clone_is_what_the_kernel_imports(tmp_path):
    """A kernel without the project, a repository with a library of that name; pip alone is left out."""
    source = tmp_path / "source"
    (source / "stego_lib").mkdir(parents=True)
    (source / "stego_lib" / "__init__.py").write_text("here = 'of the clone'\n")
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=source, check=True)
    kernel = f"""
import os, subprocess, sys
sys.path[:] = [path for path in sys.path if not os.path.isdir(os.path.join(path or ".", "stego_lib"))]
run = subprocess.run
subprocess.run = lambda command, **how: subprocess.CompletedProcess(command, 0) if "pip" in command else run(command, **how)
exec({CELL!r})
import stego_lib
print(stego_lib.here, os.path.relpath(stego_lib.__file__))
"""
    work = tmp_path / "content"
    work.mkdir()
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "STEGO_SOURCE": str(source), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", kernel], cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "of the clone stego/stego_lib/__init__.py"


def test_the_quickstart_runs_in_ten_cells(tmp_path, backbone_file):
    assert len(nbformat.read(QUICKSTART, 4).cells) <= 10
    images, rng = tmp_path / "images", np.random.default_rng(0)
    images.mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 56, 3), np.uint8)).save(images / f"{i}.png")
    given = dict(images=str(images), backbone=str(backbone_file), n_classes=2, steps=2, runs_dir=str(tmp_path / "runs"))
    said = run_notebook(QUICKSTART, tmp_path / "out.ipynb", given)
    assert said.startswith("6 images segmented by")
    (written,) = (tmp_path / "runs").glob("*/segmented")
    assert len(list((written / "labels").glob("*.png"))) == 6 and (written / "areas.csv").is_file()
