"""What several test files need: where things are, golden arrays, a tiny backbone, an experiment that takes no time."""

import io
import json
import os
import warnings
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from stego_lib import Experiment, training
from stego_lib.experiment import Official
from stego_lib.utils.notices import Notice

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
GOLDEN = Path(__file__).resolve().parent / "golden"

TIMM_ARGUMENTS = dict(
    architecture="vit_tiny_patch16_224", patch_size=8, img_size=32, depth=2, embed_dim=32, num_heads=2, num_classes=0,
    global_pool="token", dynamic_img_size=True,
)  # fmt: skip
"""The smallest network of the kind that the package comes with: 32 channels, patches of 8 pixels."""
BASELINES = {"kmeans_features", "kmeans_pca", "kmeans_colors", "linear_features"}
"""What a run record with labels holds beside the scores of STEGO."""


def golden(name: str) -> dict[str, np.ndarray]:
    """All arrays of tests/golden/NAME.npz."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def golden_tensors(name: str) -> dict[str, torch.Tensor]:
    """The same as tensors."""
    return {key: torch.from_numpy(np.asarray(value)) for key, value in golden(name).items()}


def assert_gradient(gradient: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-4 of the largest absolute value expected."""
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def write_backbone(path: Path, seed: int = 0, metadata: dict[str, str] | None = None) -> Path:
    """A backbone file with random weights, large enough that features differ from place to place."""
    arguments = dict(TIMM_ARGUMENTS)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vit = timm.create_model(arguments.pop("architecture"), **arguments)
        weights = {key: value + 0.1 * torch.randn_like(value) for key, value in vit.state_dict().items()}
    save_file(weights, path, {"timm": json.dumps(TIMM_ARGUMENTS)} if metadata is None else metadata)
    return path


def run_cells(name: str, **parameters: object) -> str:
    """Runs the code of notebooks/NAME.ipynb in this process, which saves the start of a kernel; what it prints."""
    variables, printed = {}, io.StringIO()
    figures = matplotlib.rc_context({"backend": "agg", "figure.max_open_warning": 0})
    with figures, warnings.catch_warnings(action="ignore", category=Notice), redirect_stdout(printed):
        for cell in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells:
            if cell.cell_type == "code" and cell.id != "colab":
                exec(compile(cell.source, f"{name}, cell {cell.id}", "exec"), variables)
            if "parameters" in cell.metadata.get("tags", []):
                assert parameters.keys() <= variables.keys()
                variables |= {key: os.fspath(v) if isinstance(v, Path) else v for key, v in parameters.items()}
        matplotlib.pyplot.close("all")
    return printed.getvalue()


def broken_off(experiment: Experiment, runs_dir: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Trains until it is interrupted behind step `after`, with a checkpoint every second step."""
    trainer = training.trainer_of(experiment)
    step = trainer.step

    def breaks(self: training.Trainer, number: int) -> dict[str, float]:
        if number == after:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(training, "SAVE_EVERY", 2)
        patch.setattr(trainer, "step", breaks)
        with pytest.raises(KeyboardInterrupt):
            training.train(experiment, runs_dir=runs_dir)


def tiny_experiment(root: Path, backbone: Path, **changes: object) -> Experiment:
    """Scenes of 64 pixels on the tiny backbone, on the CPU in float32 so that results repeat bit for bit.

    Options of the authors' code are given by their own names.
    """
    values: dict = dict(
        data_root=str(root), backbone=str(backbone), train_size=64, eval_size=64, code_dim=8, steps=7,
        batch_size=4, points=3, neighbors=2, negatives=2, shifts=("p70", 0.1, "p80"),
        device="cpu", precision="float32", crf=False,
    )  # fmt: skip
    options = {field.name for field in fields(Official)}
    official = {key: changes.pop(key) for key in list(changes) if key in options}
    if official:
        changes["official"] = official
    return Experiment.from_dict(values | changes)
