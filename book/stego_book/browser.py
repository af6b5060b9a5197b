"""Collects the files of the page "Try it": a run as ONNX, onnxruntime-web from npm, scripts and samples.

`make book` calls it. Without npm the page is skipped.
"""

import json
import shutil
import subprocess
from pathlib import Path

from stego_lib import Experiment, Run, train
from stego_lib.backbone import EMBEDDED_FOR_PHOTOGRAPHS
from stego_lib.export import export_onnx

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "book" / "try"
PHOTOGRAPHS = ROOT / "data" / "photographs"
RUNTIME = ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
"""Files of the package onnxruntime-web."""
SAMPLES = ("food_0000055.jpg", "food_0000104.jpg", "food_0000282.jpg")
GRID = ("similarity", "features", "code")
"""Outputs of the ONNX graph; the page upsamples the first."""


def fetch_runtime(folder: Path) -> str | None:
    """Installs package-lock.json into folder/node_modules. Returns the reason if this fails, else None."""
    if shutil.which("npm") is None:
        return "npm is not installed"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(SCRIPTS / name, folder / name)
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return (
        None
        if done.returncode == 0
        else f"npm could not fetch onnxruntime-web: {(done.stderr.strip() or 'no reason given').splitlines()[0]}"
    )


def demonstration() -> Run:
    """The run of segment_your_images.ipynb with the embedded backbone; trains it if necessary."""
    values = dict(data_root=str(PHOTOGRAPHS), backbone=EMBEDDED_FOR_PHOTOGRAPHS, n_classes=6, steps=100)
    return train(Experiment.preset("folder", **values), resume=True)


def write_files(run: Run, runtime: Path, target: Path) -> None:
    """Writes all files that the page loads to `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for path in (
        SCRIPTS / "page.js",
        SCRIPTS / "worker.js",
        *(runtime / "node_modules" / "onnxruntime-web" / "dist" / name for name in RUNTIME),
    ):
        shutil.copyfile(path, target / path.name)
    for number, name in enumerate(SAMPLES, start=1):
        shutil.copyfile(PHOTOGRAPHS / name, target / f"sample-{number}.jpg")
    about = export_onnx(run, target / "stego.onnx", precision="int8", outputs=GRID)
    kept = {key: about[key] for key in ("names", "colors", "ids")}
    (target / "stego.json").write_text(json.dumps(kept), encoding="utf-8")
