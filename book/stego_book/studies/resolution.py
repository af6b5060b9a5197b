"""Scores and time of label maps of one run at several resolutions, with and without CRF."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from stego_lib import Run
from stego_lib.datasets.base import SegmentationDataset
from stego_lib.metrics import border_counts, border_f, confusion, match, own_assigned, scores
from stego_lib.utils.progress import progress

# Options of `Run.predict` for CamVid's 360 x 480 pixels: shrunk, as they are, and enlarged; whole and in tiles.
CAMVID: tuple[dict[str, Any], ...] = (
    dict(size=160),
    dict(size=240),
    dict(size=360),
    dict(size=480),
    dict(tile=240),
    dict(size=720, tile=360),
)
# Options that say how borders are refined.
REFINEMENTS = ("none", "crf")


def measure(
    run: Run,
    dataset: SegmentationDataset,
    options: Sequence[dict[str, Any]] = CAMVID,
    images: Iterable[int] | None = None,
) -> pd.DataFrame:
    """One row per options and refinement: size, tile, refine, images, accuracy, miou, own_miou, border_f, seconds.

    Labels are compared at the images' own resolution, so that rows can be compared. Clusters are matched to classes
    anew for each row. seconds: mean processor time of `Run.predict` per image.

    Parameters
    ----------
    run
        The run.
    dataset
        A labeled split.
    options
        "size" and "tile" of `Run.predict`, one dictionary per row.
    images
        Numbers of the images, all by default.

    Examples
    --------
    >>> measure(run, open_dataset("camvid", "data", "val"), images=range(0, 101, 5))
    """
    numbers, n_classes = list(range(len(dataset)) if images is None else images), len(dataset.classes)
    rows = []
    for setting in [dict(option, refine=refine) for option in options for refine in REFINEMENTS]:
        table = torch.zeros(len(run.segments), n_classes, dtype=torch.int64)
        own, borders, seconds = torch.zeros(n_classes + 1, n_classes, dtype=torch.int64), torch.zeros(4), 0.0
        for number in progress(numbers, ", ".join(f"{key}={value}" for key, value in setting.items())):
            image, label = dataset[number]
            start = time.process_time()
            predicted = run.predict(image, **setting)
            seconds += time.process_time() - start
            counts = confusion(predicted, label, len(table), n_classes)
            table, own = table + counts, own + own_assigned(counts)
            borders = borders + border_counts(predicted[None], label[None], n_classes)
        score = {key: scores(table, match(table))[key] for key in ("accuracy", "miou")}
        score |= {"own_miou": scores(own, torch.tensor([*range(n_classes), -1]))["miou"], "border_f": border_f(borders)}
        values = {key: round(value, 2) for key, value in score.items()}
        place = {"size": setting.get("size"), "tile": setting.get("tile"), "refine": setting["refine"]}
        rows.append(place | {"images": len(numbers)} | values | {"seconds": round(seconds / len(numbers), 3)})
    return pd.DataFrame(rows).astype({"size": "Int64", "tile": "Int64"})


def read(path: Path) -> pd.DataFrame:
    """A stored result of `measure`."""
    return pd.read_csv(path, dtype={"size": "Int64", "tile": "Int64"})
