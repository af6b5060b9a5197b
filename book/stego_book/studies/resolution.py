"""Scores and time of label maps of one run at several resolutions, with and without CRF."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from stego_lib import Run
from stego_lib.datasets.base import SegmentationDataset
from stego_lib.metrics import border_counts, border_f, confusion, match, own_assigned, scores
from stego_lib.utils.progress import progress

from .results import markdown

# Options of `Run.predict` for CamVid's 360 x 480 pixels: downsampled, full size and upsampled; whole and in tiles.
CAMVID: tuple[dict[str, Any], ...] = (
    dict(size=160, refine="none"),
    dict(size=160, refine="crf"),
    dict(size=240, refine="none"),
    dict(size=240, refine="crf"),
    dict(size=360, refine="none"),
    dict(size=480, refine="none"),
    dict(size=480, refine="crf"),
    dict(tile=240, refine="none"),
    dict(tile=120, refine="none"),
    dict(size=720, tile=360, refine="none"),
)
# Columns of `measure` -> their names in tables.
NAMES = {"miou": "mIoU", "own_miou": "own mIoU", "border_f": "border F", "seconds": "seconds per image"}


def measure(
    run: Run,
    dataset: SegmentationDataset,
    options: Sequence[dict[str, Any]] = CAMVID,
    images: Iterable[int] | None = None,
) -> pd.DataFrame:
    """One row per option: size (working size), tile, refine, images, scores, seconds.

    Labels are compared at the full image resolution. Scores are accuracy, miou, own_miou and border_f in percent;
    clusters are matched to classes separately for each row. seconds: mean CPU time of `Run.predict` per image.

    dataset: a labeled split. options: "size", "tile" and "refine" of `Run.predict` for each row. images: indices, all
    by default.

    >>> measure(run, open_dataset("camvid", "data", "val"), images=range(0, 101, 5))
    """
    numbers, n_classes = list(range(len(dataset)) if images is None else images), len(dataset.classes)
    rows, own_size = [], min(dataset.image(numbers[0]).shape[1:])
    for option in options:
        pairs, seconds = [], 0.0
        for number in progress(numbers, ", ".join(f"{key}={value}" for key, value in option.items())):
            image, label = dataset[number]
            assert label is not None
            start = time.process_time()
            predicted = torch.from_numpy(run.predict(image, **option))
            seconds += time.process_time() - start
            pairs.append((predicted, label))
        place = {"size": option.get("size", own_size), "tile": option.get("tile"), "refine": option["refine"]}
        row = score_clusters(pairs, len(run.segments), n_classes) | {"seconds": round(seconds / len(numbers), 2)}
        rows.append(place | {"images": len(numbers)} | row)
    return pd.DataFrame(rows).astype({"tile": "Int64"})


def score_clusters(pairs: Iterable[tuple[Tensor, Tensor]], n_clusters: int, n_classes: int) -> dict[str, float]:
    """Scores of predicted clusters and labels of several images, each (H, W), in percent.

    Returns accuracy, miou, own_miou and border_f. Clusters are matched to the classes over all images.
    """
    table, borders = torch.zeros(n_clusters, n_classes, dtype=torch.int64), torch.zeros(4)
    own = torch.zeros(n_classes + 1, n_classes, dtype=torch.int64)
    for predicted, label in pairs:
        counts = confusion(predicted, label, n_clusters, n_classes)
        table, own = table + counts, own + own_assigned(counts)
        borders = borders + border_counts(predicted[None], label[None], n_classes)
    matched, by_itself = scores(table, match(table)), scores(own, torch.tensor([*range(n_classes), -1]))
    values = {"accuracy": matched["accuracy"], "miou": matched["miou"], "own_miou": by_itself["miou"]}
    return {key: round(value, 2) for key, value in (values | {"border_f": border_f(borders)}).items()}


def read(path: Path) -> pd.DataFrame:
    """A stored result of `measure`."""
    return pd.read_csv(path, dtype={"tile": "Int64"})


def table(measured: pd.DataFrame) -> str:
    """`measure` as a Markdown table."""
    return markdown(measured.rename(columns=NAMES).map(lambda value: "" if pd.isna(value) else str(value)))
