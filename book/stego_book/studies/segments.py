"""Segments of selected images by every method; the best and worst images of a split."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from stego_lib.datasets.base import SegmentationDataset
from stego_lib.datasets.transforms import resize_image, resize_label
from stego_lib.evaluation import BATCH, fit_kmeans, open_views, score_rows
from stego_lib.predict import label_maps, probe_scores, refined_label_maps
from stego_lib.run import Run
from stego_lib.utils.errors import StegoError
from stego_lib.utils.files import read_json
from stego_lib.utils.paths import user_path
from stego_lib.utils.progress import progress

from .results import NAMES

# Method in a run record -> row name in figures.
ROWS = {
    "kmeans_features": "k-means",
    "kmeans_features_crf": "k-means + CRF",
    "cluster": "STEGO",
    "cluster_crf": "STEGO + CRF",
}


@torch.inference_mode()
def segments(
    run: Run, dataset: SegmentationDataset, record: dict[str, Any], rows: Sequence[int]
) -> dict[str, list[np.ndarray]]:
    """Images of a split with the segments of k-means on the features and of STEGO, each with and without CRF.

    record: record of this split with the matching of each method. Without labels k-means is omitted, because its
    clusters cannot be matched with STEGO's. rows: indices of the images. Returns rows for `plots.grids.image_grid`:
    "image", "label" (with labels), and `ROWS` with ids into `Run.unnamed_segments`.
    """
    views, chosen = open_views(run, dataset), torch.as_tensor(list(rows))
    matched = bool(record["scores"])
    run.model.eval()
    by_method = score_rows(run, views, chosen, {"kmeans_features": fit_kmeans(run)} if matched else {})
    images = views.plain.image_rows(chosen)
    table: dict[str, list[np.ndarray]] = {"image": [image.permute(1, 2, 0).numpy() for image in images]}
    if dataset.has_labels:
        table["label"] = [label.numpy() for label in views.plain.label_rows(chosen)]
    for method, name in ROWS.items():
        plain, refined = method.removesuffix("_crf"), method.endswith("_crf")
        if plain not in by_method or (refined and not run.experiment.crf):
            continue
        scores = by_method[plain]
        if refined:
            clusters = [refined_label_maps(image, [scores.image(i)])[0] for i, image in enumerate(images)]
        else:
            clusters = list(label_maps(scores, views.plain.image_size))
        ids = np.array(record["scores"][method]["matching"] if matched else range(run.model.n_clusters))
        spare = ids < 0
        ids[spare] = len(run.classes) + np.arange(spare.sum())
        table[name.replace("STEGO", NAMES[run.experiment.method])] = [ids[label.numpy()] for label in clusters]
    return table


@torch.inference_mode()
def image_accuracies(run: Run, dataset: SegmentationDataset, record: dict[str, Any]) -> torch.Tensor:
    """Accuracy of STEGO's cluster probe on each image of a split, in percent, (N,); NaN without labeled pixels."""
    views = open_views(run, dataset)
    classes = torch.tensor(record["scores"]["cluster"]["matching"])
    run.model.eval()
    accuracies = []
    for rows in progress(torch.arange(len(dataset)).split(BATCH), "accuracy of each image"):
        labels = views.plain.label_rows(rows)
        scores = probe_scores(run.model, run.model.mean_code(*views.rows(rows)))["cluster"]
        clusters = label_maps(scores, views.plain.image_size).long()
        known = labels >= 0
        hits = (classes[clusters] == labels) & known
        accuracies.append(100 * hits.sum((1, 2)) / known.sum((1, 2)))
    return torch.cat(accuracies)


def best_and_worst(accuracies: torch.Tensor, count: int = 3) -> list[int]:
    """Indices of the `count` images with the highest accuracy, best first, then of those with the lowest, worst last.

    Chosen images are at least a twentieth of the split apart, because neighboring video frames are nearly equal. Images
    without labeled pixels are skipped.
    """
    known = [i for i, value in enumerate(accuracies.tolist()) if value == value]
    rising = sorted(known, key=lambda i: accuracies[i])
    best = _apart(sorted(known, key=lambda i: -accuracies[i]), count, len(accuracies) // 20, [])
    return best + _apart(rising, count, len(accuracies) // 20, best)[::-1]


def _apart(order: list[int], count: int, distance: int, others: list[int]) -> list[int]:
    """The first `count` numbers in `order` with a distance of more than `distance` to each other and to `others`."""
    chosen: list[int] = []
    for i in order:
        if len(chosen) < count and all(abs(i - other) > distance for other in [*others, *chosen]):
            chosen.append(i)
    return chosen


def read_maps(
    folder: str | Path, dataset: SegmentationDataset | None = None
) -> tuple[dict[str, list[np.ndarray]], list[str]]:
    """Reads the label maps METHOD/NAME.png of a folder, and the image names from images.json.

    dataset: the split, if available; its images and labels are added as first rows, at the size of the maps.
    """
    folder = user_path(folder)
    names: list[str] = read_json(folder / "images.json")
    table: dict[str, list[np.ndarray]] = {}
    for method, row in ROWS.items():
        for path in (folder / method / f"{name}.png" for name in names):
            if path.exists():
                with Image.open(path) as stored:
                    table.setdefault(row, []).append(np.asarray(stored).astype(np.int64))
    if dataset is None:
        return table, names
    if strange := [name for name in names if name not in dataset.names]:
        raise StegoError(f"{folder}: {dataset.name} {dataset.split} has no image {strange[0]!r}.")
    above: dict[str, list[np.ndarray]] = {"image": [], "label": []}
    for name, ids in zip(names, next(iter(table.values())), strict=True):
        image, label = dataset[dataset.names.index(name)]
        above["image"].append(resize_image(image, ids.shape).permute(1, 2, 0).numpy())
        if label is not None:
            above["label"].append(resize_label(label, ids.shape).numpy())
    return {key: cells for key, cells in (above | table).items() if cells}, names
