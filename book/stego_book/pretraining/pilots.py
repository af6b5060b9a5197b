"""Cheaper steps against today's recipe for photographs: what is compared, on what, and how it is watched."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from stego_lib.datasets.base import SegmentationDataset
from stego_lib.utils.notices import notice

from .comparison import Stages
from .curves import read_curve
from .images import labeled_sample, mixture, read_photographs
from .recipe import PHOTOS, PHOTOS_SHARES
from .watching import watcher

FOLDERS = ("photos", "photos_more")
"""Where photographs lie beside CamVid."""
HELD_OUT = 60
"""Labeled training frames that are neither learned from nor seen; they measure progress."""
FITTED = 2.5
"""For each of them, so many of the frames that are learned from fit the probes, with their labels."""
EVERY = 10
"""One token in so many fits the probes."""


@dataclass(frozen=True)
class Streets:
    """Images to learn from, with chances as `pretrain` takes them, and a watch on frames that are held out."""

    images: Tensor
    """uint8 (N, 3, H, W)."""
    chances: Tensor
    watch: Callable[[nn.Module, int], dict[str, float]]


def read_streets(
    dataset: SegmentationDataset, root: Path, held_out: int = HELD_OUT, folders: Sequence[str] = FOLDERS
) -> Streets:
    """CamVid's training frames but for some, and the photographs in those of `folders` that are in `root`, the first at least.

    The frames that are held out are the last of each drive, so that none lies between two that are learned from. Validation and test
    images are not opened.
    """
    learned, held = hold_out(dataset, held_out)
    frames = read_photographs(dataset.images[0].parent)[learned]
    names = [folders[0], *(name for name in folders[1:] if (root / name).is_dir())]
    if missing := [str(root / name) for name in folders if name not in names]:
        notice(f"{', '.join(missing)} is not there: fewer photographs than the recipe's are learned from")
    images, chances = mixture([frames, torch.cat([read_photographs(root / name) for name in names])], PHOTOS_SHARES)
    fitted = learned[:: max(1, len(learned) // round(FITTED * len(held)))]
    drives = [_drive(dataset.images[row]) for row in fitted + held]
    pairs = labeled_sample(dataset, fitted + held)
    watch = watcher(*pairs, len(dataset.classes), batch=8, every=EVERY, fitted=len(fitted), drives=drives)
    return Streets(images, chances, watch)


def hold_out(dataset: SegmentationDataset, count: int = HELD_OUT) -> tuple[list[int], list[int]]:
    """Rows to learn from, and rows held out: the last frames of each drive, in all about `count` and a third at most.

    A drive is what the file names before the first underscore say, such as 0016E5.
    """
    drives: dict[str, list[int]] = {}
    for row, path in enumerate(dataset.images):
        drives.setdefault(_drive(path), []).append(row)
    share = min(count / len(dataset), 1 / 3)
    held = [row for rows in drives.values() for row in rows[len(rows) - round(share * len(rows)) :]] or [
        len(dataset) - 1
    ]
    return [row for row in range(len(dataset)) if row not in set(held)], held


def _drive(path: Path) -> str:
    return path.stem.split("_")[0]


def pilot_ways(seed: int) -> dict[str, Stages]:
    """The ways that are compared on equal time. "half size": images at half their size, a quarter of the tokens for the same view,
    sampled (one pixel of four), where `STREETS` averages them."""
    today = replace(PHOTOS, seed=seed)
    half = replace(today, crop=40, batch_size=64, points=16, zoom=(0.167, 0.35))
    mae = replace(
        today, objective="mae", depth=6, crop=160, batch_size=16, zoom=(0.667, 1.4), color_mixing=(0.1, 0.1, 0.05, 0.05)
    )
    six = replace(today, depth=6)
    return {
        "six blocks": [(six, 1.0)],
        "twelve blocks": [(today, 1.0)],
        "six blocks, half size first": [(replace(half, depth=6), 0.7), (six, 0.3)],
        "twelve blocks, half size first": [(half, 0.7), (today, 0.3)],
        "six blocks, MAE first": [(mae, 0.5), (six, 0.5)],
    }


def pilot_table(folder: Path) -> pd.DataFrame:
    """One row for each way on record in `folder`: seeds, steps of each stage, and what the watch measured at the start and at the end,
    in percent, mean over seeds (and smallest to largest at the end).

    The files are NAME-seedN-stageM.json, written by `write_curve`.
    """
    runs: dict[str, dict[int, list[pd.DataFrame]]] = {}
    for path in sorted(folder.glob("*-seed*-stage*.json")):
        name, seed, _ = re.fullmatch(r"(.+)-seed(\d+)-stage(\d+)", path.stem).groups()  # type: ignore[union-attr]
        runs.setdefault(name, {}).setdefault(int(seed), []).append(read_curve(path)[1])
    rows = {}
    for name, seeds in runs.items():
        row: dict[str, object] = {
            "seeds": len(seeds),
            "steps": " + ".join(str(int(stage["step"].iloc[-1])) for stage in next(iter(seeds.values()))),
        }
        for key, title in {"kmeans_miou": "k-means", "linear_miou": "linear probe"}.items():
            begins, ends = ([stages[part][key].iloc[part] for stages in seeds.values()] for part in (0, -1))
            row[f"{title}, start"] = f"{sum(begins) / len(begins):.1f}"
            row[f"{title}, end"] = f"{sum(ends) / len(ends):.1f} ({min(ends):.1f} to {max(ends):.1f})"
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("way")
