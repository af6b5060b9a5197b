"""Learning curves as small JSON files."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stego_lib.utils.files import read_json, write_json

from .recipe import PretrainRecipe

POINTS = 80
"""Number of stored losses of a run, each the mean over an equal part of its steps."""


def write_curve(
    path: str | Path, log: list[dict[str, float]], recipe: PretrainRecipe, about: str, untrained: dict[str, float]
) -> None:
    """Writes recipe, losses and measurements. untrained: measurements before the first step."""
    stretches = np.array_split(np.arange(len(log)), min(POINTS, len(log)))
    losses = [
        {
            "seconds": round(log[part[-1]]["seconds"], 1),
            "loss": round(float(np.mean([log[i]["loss"] for i in part])), 4),
        }
        for part in stretches
    ]
    looks = [(-1, 0.0, untrained)] + [(line["step"], line["seconds"], line) for line in log]
    measured = [
        {"step": step + 1, "seconds": round(seconds, 1)} | {key: round(look[key], 2) for key in untrained}
        for step, seconds, look in looks
        if set(untrained) <= set(look)
    ]
    content: dict[str, Any] = {"about": about, "recipe": asdict(recipe), "losses": losses, "measured": measured}
    write_json(path, content)


def read_curve(path: str | Path) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Reads a file of `write_curve`: losses and measurements by minutes of training, and the other content."""
    content = read_json(path)
    tables = [pd.DataFrame(content.pop(name)) for name in ("losses", "measured")]
    losses, measured = (table.assign(minutes=table.pop("seconds") / 60).set_index("minutes") for table in tables)
    return losses, measured, content
