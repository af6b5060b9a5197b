"""Ways of pre-training against each other: the same images and time for each."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from stego_lib.utils.paths import user_path

from .loop import pretrain
from .recipe import PretrainRecipe

PILOT = 6
"""Steps that are timed to tell how many fit into the time; the first is left out."""
Stages: TypeAlias = Sequence[tuple[PretrainRecipe, float]]
"""Recipes that follow each other, each with its share of the time; a stage begins with the weights of the one before."""


def equal_time(
    images: Tensor,
    ways: Mapping[str, Stages],
    seconds: float,
    folder: str | Path,
    **options: Any,
) -> dict[str, list[list[dict[str, float]]]]:
    """Trains in each of several ways for about `seconds` (of processor time on a CPU): name -> the log of each stage.

    The numbers of steps are replaced by as many as fit; warm-up and last phase are shortened with them. A watch looks four
    times a stage. State is kept below `folder`; called again it resumes, with the numbers of steps found at first. options: for
    `pretrain`.
    """
    logs: dict[str, list[list[dict[str, float]]]] = {}
    for name, stages in ways.items():
        start, logs[name] = None, []
        for number, (recipe, share) in enumerate(stages):
            place = user_path(folder) / name / f"stage-{number}"
            pilot = replace(recipe, steps=PILOT, full_size_steps=0)
            timed = pretrain(images, pilot, place / "pilot", **(options | {"watch": None}))[1]
            step = (timed[-1]["seconds"] - timed[0]["seconds"]) / (PILOT - 1)
            steps = max(1, round(share * seconds / step))
            looks = {"save_every": 10, "watch_every": max(1, steps // 4)} | options
            network, log = pretrain(images, recipe.varied(recipe.seed, steps), place, start=start, **looks)
            start = network.state_dict()
            logs[name].append(log)
    return logs
