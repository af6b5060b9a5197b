"""Pre-training recipes against each other: the same images and time for each."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..runtime.paths import user_path
from .loop import pretrain
from .recipe import PretrainRecipe

PILOT = 6
"""Steps that are timed to tell how many fit into the time; the first is left out."""


def equal_time(
    images: Tensor,
    recipes: Mapping[str, PretrainRecipe],
    seconds: float,
    folder: str | Path,
    **options: Any,
) -> dict[str, list[dict[str, float]]]:
    """Trains by each recipe for about `seconds` (of processor time on a CPU): name -> its log.

    The number of steps is replaced by as many as fit; warm-up and last phase are shortened with it. A watch looks four
    times. State is kept below `folder`; called again it resumes, with the number of steps found at first. options: for
    `pretrain`.
    """
    logs: dict[str, list[dict[str, float]]] = {}
    for name, recipe in recipes.items():
        pilot = replace(recipe, steps=PILOT, full_size_steps=0)
        timed = pretrain(images, pilot, user_path(folder) / name / "pilot", **(options | {"watch": None}))[1]
        steps = max(1, round(seconds * (PILOT - 1) / (timed[-1]["seconds"] - timed[0]["seconds"])))
        looks = {"save_every": 10, "watch_every": max(1, steps // 4)}
        logs[name] = pretrain(images, recipe.varied(recipe.seed, steps), user_path(folder) / name, **(looks | options))[1]
    return logs
