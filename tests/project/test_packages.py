"""The two packages: what the wheel of the library holds, that it works alone."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from common import ROOT

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]

# Third-party packages come from the environment of the test, ours only from the folder that the wheel is installed in.
TRAIN = """
import importlib.util, json, os, sys
installed, data = sys.argv[1:]
ours = ("stego_lib", "stego_book")
others = [path for path in sys.path if not any(os.path.isdir(os.path.join(path or ".", name)) for name in ours)]
sys.path[:] = [installed, *others]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", str(finder))]
assert importlib.util.find_spec("stego_book") is None
import stego_lib
values = dict(train_size=64, eval_size=64, steps=3, batch_size=4, neighbors=2, crf=False, device="cpu", data_root=data)
run = stego_lib.train(stego_lib.Experiment.preset("scenes", **values), runs_dir="runs")
record = stego_lib.evaluate(run)
labels = run.predict(stego_lib.open_dataset("scenes", data, "val").images[0])
print(json.dumps({"library": stego_lib.__file__, "shape": labels.shape, "scores": list(record["scores"])}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the library, built from a copy of the checkout."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("stego_lib", "book", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "_build", "records")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    command = [*PIP, "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "."]
    subprocess.run(command, cwd=folder, check=True)
    return next(folder.glob("stego_lib-*.whl"))


def test_the_wheel_holds_the_library_and_its_weights_only(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [path for path in (ROOT / "stego_lib").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert held == {str(path.relative_to(ROOT)) for path in files}
    assert "stego_lib/py.typed" in held and any(name.endswith(".safetensors") for name in held)


def test_the_wheel_names_the_images_behind_its_weights_and_their_licenses(wheel):
    archive = zipfile.ZipFile(wheel)
    names = [name for name in archive.namelist() if ".dist-info/" in name]
    (metadata,) = [archive.read(name).decode() for name in names if name.endswith("/METADATA")]
    for weights in (ROOT / "stego_lib" / "weights").glob("*.safetensors"):
        card = f"stego_lib/weights/{weights.stem}.md"
        assert f"License-File: {card}" in metadata and weights.stem in metadata
        (text,) = [archive.read(name).decode() for name in names if name.endswith(f"/licenses/{card}")]
        assert "Training data" in text and "License of the images" in text


def test_the_wheel_alone_trains_and_predicts(wheel, tmp_path, scenes_root):
    installed, work = tmp_path / "installed", tmp_path / "work"
    command = [*PIP, "install", "--quiet", "--no-deps", "--no-index", "--target", installed, wheel]
    subprocess.run(command, check=True)
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", TRAIN, str(installed), str(scenes_root)]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert Path(result["library"]).is_relative_to(installed) and result["shape"] == [64, 64]
    assert "cluster" in result["scores"] and len(list((work / "runs").glob("*/metrics.json"))) == 1
