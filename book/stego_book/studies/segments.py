"""Segments of chosen images by every method, and which images are the best and the worst of a split."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from stego_lib.datasets import Classes, SegmentationDataset
from stego_lib.datasets.transforms import resize_image, resize_label
from stego_lib.evaluation import BATCH, fit_kmeans, open_views, score_rows
from stego_lib.predict import label_maps, probe_scores, refined_label_maps
from stego_lib.run import Run
from stego_lib.utils.errors import StegoError
from stego_lib.utils.files import atomic, read_json, write_json
from stego_lib.utils.paths import user_path
from stego_lib.utils.progress import progress

from .results import NAMES

ROWS = {
    "kmeans_features": "k-means",
    "kmeans_features_crf": "k-means + CRF",
    "cluster": "STEGO",
    "cluster_crf": "STEGO + CRF",
}
"""Method in a run record -> the name of its row in a figure."""


@torch.inference_mode()
def segments(
    run: Run, dataset: SegmentationDataset, record: dict[str, Any], rows: Sequence[int]
) -> dict[str, list[np.ndarray]]:
    """Images of a split with their segments by k-means on the features and by STEGO, each with and without CRF.

    Parameters
    ----------
    run
        The run.
    dataset
        The split.
    record
        The run record of this split, which holds the matching of each method. Where it holds no scores (no labels),
        k-means is left out, because nothing says which of its clusters is which of STEGO's.
    rows
        Numbers of the images.

    Returns
    -------
    dict
        Rows for `plots.grids.image_grid`: "image", uint8 (H, W, 3); "label", where there are labels, int64 (H, W) with
        -1 = ignored; and the methods of `ROWS`, ids into `Run.unnamed_segments`.
    """
    views, chosen = open_views(run, dataset), torch.as_tensor(list(rows))
    matched = bool(record["scores"])
    run.model.eval()
    by_method = score_rows(run.model, views, chosen, {"kmeans_features": fit_kmeans(run)} if matched else {})
    images = views.plain.image_rows(chosen)
    table: dict[str, list[np.ndarray]] = {"image": [image.permute(1, 2, 0).numpy() for image in images]}
    if dataset.has_labels:
        table["label"] = [label.numpy() for label in views.plain.label_rows(chosen)]
    for method, name in ROWS.items():
        plain = method.removesuffix("_crf")
        if plain not in by_method or (matched and method not in record["scores"]):
            continue
        if method == plain:
            clusters = label_maps(by_method[plain], views.plain.image_size)
        elif run.experiment.crf:
            scores = by_method[plain]
            clusters = [refined_label_maps(image, [scores.image(i)])[0] for i, image in enumerate(images)]
        else:
            continue
        ids = np.array(record["scores"][method]["matching"] if matched else range(run.model.n_clusters))
        spare = ids < 0
        ids[spare] = len(run.classes) + np.arange(spare.sum())
        table[name.replace("STEGO", NAMES[run.experiment.method])] = [
            ids[clusters_of_image.numpy()] for clusters_of_image in clusters
        ]
    return table


@torch.inference_mode()
def image_accuracies(run: Run, dataset: SegmentationDataset, record: dict[str, Any]) -> torch.Tensor:
    """Accuracy of STEGO's cluster probe on each image of a split, in percent, (N,); NaN without labeled pixels."""
    views = open_views(run, dataset)
    classes = torch.tensor(record["scores"]["cluster"]["matching"])
    run.model.eval()
    found = []
    for rows in progress(torch.arange(len(dataset)).split(BATCH), "accuracy of each image"):
        labels = views.plain.label_rows(rows)
        scores = probe_scores(run.model, views.codes(run.model, rows))["cluster"]
        clusters = label_maps(scores, views.plain.image_size).long()
        known = labels >= 0
        hits = (classes[clusters] == labels) & known
        found.append(100 * hits.sum((1, 2)) / known.sum((1, 2)))
    return torch.cat(found)


def best_and_worst(accuracies: torch.Tensor, count: int = 3) -> list[int]:
    """Numbers of the `count` images with the highest accuracy, best first, then of those with the lowest, worst last.

    Of images that lie closer to each other in the split than a twentieth of its length (frames of a video show nearly
    the same), the first to be chosen is taken. Images without labeled pixels are left out.
    """
    known = [i for i, value in enumerate(accuracies.tolist()) if value == value]
    apart = len(accuracies) // 20
    chosen: list[int] = []
    for order in (sorted(known, key=lambda i: -accuracies[i]), sorted(known, key=lambda i: accuracies[i])):
        taken: list[int] = []
        for i in order:
            if len(taken) < count and all(abs(i - other) > apart for other in [*chosen, *taken]):
                taken.append(i)
        chosen += taken if not chosen else taken[::-1]
    return chosen


def write_maps(folder: str | Path, table: dict[str, list[np.ndarray]], names: Sequence[str], classes: Classes) -> None:
    """Writes the methods' label maps of `segments` as palette PNGs, folder/METHOD/NAME.png, and their order,
    images.json.

    Images and labels are left out.
    """
    write_json(user_path(folder) / "images.json", list(names))
    for method, name in ROWS.items():
        for stem, ids in zip(names, table.get(name, []), strict=False):
            image = Image.fromarray(ids.astype(np.uint8), "P")
            image.putpalette(np.array(classes.colors, np.uint8).flatten().tolist())
            path = user_path(folder) / method / f"{stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as temporary:
                image.save(temporary, "PNG", optimize=True)


def read_maps(
    folder: str | Path, dataset: SegmentationDataset | None = None
) -> tuple[dict[str, list[np.ndarray]], list[str]]:
    """What `write_maps` wrote, and the names of the images.

    dataset: the split, if it is at hand: images and labels then stand above the maps, at the size of the maps.
    StegoError for a name that the split does not have.
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
        raise StegoError(
            f"{folder}: {strange[0]} is called like no image of {dataset.name} {dataset.split}; name its dataset"
        )
    above: dict[str, list[np.ndarray]] = {"image": [], "label": []}
    for name, ids in zip(names, next(iter(table.values())), strict=True):
        image, label = dataset[dataset.names.index(name)]
        above["image"].append(resize_image(image, ids.shape).permute(1, 2, 0).numpy())
        if label is not None:
            above["label"].append(resize_label(label, ids.shape).numpy())
    return {key: cells for key, cells in (above | table).items() if cells}, names
