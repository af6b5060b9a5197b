"""Segments of chosen images by every method, and which images are the best and the worst of a split."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .. import crf
from ..datasets import SegmentationDataset
from ..evaluation import BATCH, fit_kmeans, open_scored, refined_scores
from ..probes import probe_scores
from ..run import Run
from ..runtime.progress import progress

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
        The run record of this split, which holds the matching of each method. Where it holds no scores (no labels), k-means
        is left out, because nothing says which of its clusters is which of STEGO's.
    rows
        Numbers of the images.

    Returns
    -------
    dict
        Rows for `plots.grids.image_grid`: "image", uint8 (H, W, 3); "label", where there are labels, int64 (H, W) with -1 =
        ignored; and the methods of `ROWS`, ids into `Run.segments`.
    """
    scored, chosen = open_scored(run, dataset), torch.as_tensor(list(rows))
    matched = bool(record["scores"])
    run.model.eval()
    found, logits = refined_scores(run, scored, chosen, fit_kmeans(run) if matched else None)
    images = [image.permute(1, 2, 0).contiguous().numpy() for image in scored.plain.image_rows(chosen)]
    table: dict[str, list[np.ndarray]] = {"image": images}
    if dataset.has_labels:
        table["label"] = [label.numpy() for label in scored.plain.label_rows(chosen)]
    for method, name in ROWS.items():
        plain = method.removesuffix("_crf")
        if plain not in found or (matched and method not in record["scores"]):
            continue
        if method == plain:
            clusters = [one.argmax(0).cpu().numpy() for one in found[plain]]
        elif run.experiment.crf and crf.available():
            maps = [one.softmax(0).cpu().numpy() for one in logits[plain]]
            clusters = [crf.refined_labels(image, [one])[0] for image, one in zip(images, maps, strict=True)]
        else:
            continue
        ids = np.array(record["scores"][method]["matching"] if matched else range(run.model.n_clusters))
        spare = ids < 0
        ids[spare] = len(run.classes) + np.arange(spare.sum())
        table[name] = [ids[one] for one in clusters]
    return table


@torch.inference_mode()
def image_accuracies(run: Run, dataset: SegmentationDataset, record: dict[str, Any]) -> torch.Tensor:
    """Accuracy of STEGO's cluster probe on each image of a split, in percent, (N,); NaN where every pixel is ignored."""
    scored = open_scored(run, dataset)
    classes = torch.tensor(record["scores"]["cluster"]["matching"])
    run.model.eval()
    found = []
    for rows in progress(torch.arange(len(dataset)).split(BATCH), "accuracy of each image"):
        labels = scored.plain.label_rows(rows)
        clusters = probe_scores(run.model, scored.codes(run.model, rows), labels.shape[1:])["cluster"].argmax(1).cpu()
        known = labels >= 0
        hits = (classes[clusters] == labels) & known
        found.append(100 * hits.sum((1, 2)) / known.sum((1, 2)))
    return torch.cat(found)


def best_and_worst(accuracies: torch.Tensor, count: int = 3) -> list[int]:
    """Numbers of the `count` images with the highest accuracy, best first, then of those with the lowest, worst last.

    No image is in both; images without labeled pixels are in neither.
    """
    known = [i for i, value in enumerate(accuracies.tolist()) if value == value]
    order = sorted(known, key=lambda i: -accuracies[i])
    count = min(count, len(order) // 2) or len(order)
    return [*order[:count], *order[count:][-count:]]
