"""Objectives against each other: the same network, pictures and time for each."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .loop import pretrain
from .recipe import Objective, PretrainRecipe

PILOT = 6
"""Steps that are timed to tell how many fit into the time; the first is left out."""


def equal_time(
    pictures: Tensor,
    recipe: PretrainRecipe,
    objectives: Iterable[Objective],
    seconds: float,
    folder: str | Path,
    **options: Any,
) -> dict[str, list[dict[str, float]]]:
    """Trains with each objective for about `seconds` (of processor time on a CPU): objective -> its log.

    recipe: the rest, the same for all but for the number of steps, to which warm-up and last phase are fitted. A watch
    looks four times. State is kept below `folder`; called again it goes on, with the number of steps found at first.
    options: for `pretrain`.
    """
    logs: dict[str, list[dict[str, float]]] = {}
    for name in objectives:
        own = replace(recipe, objective=name)
        pilot = replace(own, steps=PILOT, full_size_steps=0)
        timed = pretrain(pictures, pilot, Path(folder) / name / "pilot", **(options | {"watch": None}))[1]
        steps = max(1, round(seconds * (PILOT - 1) / (timed[-1]["seconds"] - timed[0]["seconds"])))
        looks = {"save_every": 10, "watch_every": max(1, steps // 4)}
        logs[name] = pretrain(pictures, own.varied(recipe.seed, steps), Path(folder) / name, **(looks | options))[1]
    return logs
