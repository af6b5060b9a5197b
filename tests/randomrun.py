"""A finished run with random weights, for tests of what is done with a run."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stego_lib import Experiment
from stego_lib.backbone import Backbone
from stego_lib.datasets import Classes
from stego_lib.model import build_model
from stego_lib.run import Run


def random_run(root: Path, matching: list[int] | None = None, **changes: object) -> Run:
    """Three classes; matching: class of each cluster, as `evaluate` writes it; changes: of the experiment."""
    torch.manual_seed(0)
    values = dict(steps=1, data_root=str(root), device="cpu", precision="float32") | changes
    experiment = Experiment.preset("scenes", **values)
    classes = Classes(("a", "b", "c"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    backbone = Backbone.of(experiment)
    run = Run(root / "run", experiment, classes, build_model(experiment, backbone.dim, 3).eval(), backbone)
    run.step = 1
    run.folder.mkdir()
    if matching:
        (run.folder / "metrics.json").write_text(json.dumps({"step": 1, "matching": matching}))
    return run


def tomatoes(folder: Path, names: str = "abc") -> Path:
    """Images of 64 x 96 pixels, red on the left and green on the right, with noise: a.png, b.png, ..."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for name in names:
        pixels = np.array([(220, 30, 20), (20, 200, 60)]).repeat(48, 0) + rng.integers(0, 20, (64, 96, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png")
    return folder


def written(run: Run) -> Run:
    """The run, with the files that `load_run` reads."""
    run.save_experiment()
    run.save(torch.optim.Adam(run.model.parameters()), {})
    return run
