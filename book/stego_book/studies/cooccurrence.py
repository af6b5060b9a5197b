"""Precision and recall of predicting from correspondences which positions share a label (paper, section 3.1).

Labels are used only as ground truth.
"""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from sklearn.metrics import average_precision_score, precision_recall_curve
from torch import Tensor, nn

from stego_lib import Backbone, crf
from stego_lib.backbone import weights_id
from stego_lib.probes import labels_at
from stego_lib.utils.errors import StegoError
from stego_lib.utils.files import read_json, write_json


class Pairs(NamedTuple):
    """M pairs of grid cells, int64 (M,), and whether both have the same label, bool (M,).

    The index of a cell is image * (h * w) + row * w + column.
    """

    left: Tensor
    right: Tensor
    same: Tensor


class Curve(NamedTuple):
    """Precision and recall at decreasing thresholds, and the average precision."""

    recall: np.ndarray
    precision: np.ndarray
    average_precision: float


def untrained(backbone: Backbone, seed: int = 0) -> Backbone:
    """A copy of a backbone with random weights."""
    network = copy.deepcopy(backbone)
    network.name = f"{backbone.name} (random weights, seed {seed})"
    with torch.random.fork_rng([backbone.device] if backbone.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for weights in network.vit.parameters():  # class token and positions; layers are reset below
            nn.init.trunc_normal_(weights, std=0.02)
        for layer in network.vit.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    network.weights_id = weights_id(network.vit)
    return network


def cell_labels(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Label at the center of each grid cell: int64 (N, H, W) -> (N, h, w)."""
    return labels_at(labels, torch.arange(grid[0] * grid[1]), grid).unflatten(1, grid)


def draw_pairs(labels: Tensor, count: int, *, across: bool, seed: int = 0) -> Pairs:
    """`count` random pairs of labeled cells: within an image (two different cells) or across two images.

    labels: int64 (N, h, w), below 0 = ignored. Images and cells are equally likely.
    """
    images, cells = len(labels), labels[0].numel()
    flat = labels.flatten()
    usable = (labels.flatten(1) >= 0).sum(1)
    if (usable > 0).sum() < 2 if across else not (usable > 1).any():
        raise StegoError(f"there are no two labeled cells {'in different images' if across else 'in one image'}.")
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    while len(left) < count:  # pairs with an ignored cell are drawn again
        first = torch.randint(images, (count,), generator=generator)
        step = torch.randint(1, max(images, 2), (count,), generator=generator)
        second = (first + step) % images if across else first
        a = first * cells + torch.randint(cells, (count,), generator=generator)
        b = second * cells + torch.randint(cells, (count,), generator=generator)
        kept = (flat[a] >= 0) & (flat[b] >= 0) & (a != b)
        left, right = torch.cat([left, a[kept]])[:count], torch.cat([right, b[kept]])[:count]
    return Pairs(left, right, flat[left] == flat[right])


def pair_correspondence(maps: Tensor, pairs: Pairs) -> Tensor:
    """Cosine of the two cells of each pair: maps (N, C, h, w) -> (M,). Works on features, codes or colors."""
    unit = F.normalize(maps, dim=1, eps=1e-10).movedim(1, -1).flatten(0, 2)
    chunks = zip(pairs.left.split(65536), pairs.right.split(65536), strict=True)
    return torch.cat([(unit[a] * unit[b]).sum(1) for a, b in chunks])


def pair_kernel(images: Tensor, grid: tuple[int, int], pairs: Pairs) -> Tensor:
    """Logarithm of the kernel of `crf.dense_crf` for each pair: how near they are in position and color, (M,).

    images: uint8 (N, 3, H, W); a cell's color is the mean of its pixels. The logarithm keeps the order of pairs whose
    kernel is too small for a float. Across images, positions are relative to each image.
    """
    colors = F.adaptive_avg_pool2d(images.double(), grid).movedim(1, -1).flatten(0, 2)
    height, width = images.shape[2] / grid[0], images.shape[3] / grid[1]
    place = torch.cartesian_prod(torch.arange(grid[0]) * height, torch.arange(grid[1]) * width).double()
    places = place.repeat(len(images), 1)
    distance = (places[pairs.left] - places[pairs.right]).square().sum(1)
    contrast = (colors[pairs.left] - colors[pairs.right]).square().sum(1)
    near, alike = crf.SMOOTHNESS, crf.APPEARANCE
    smooth = np.log(near["compat"]) - distance / (2 * near["sxy"] ** 2)
    appearance = np.log(alike["compat"]) - distance / (2 * alike["sxy"] ** 2) - contrast / (2 * alike["srgb"] ** 2)
    return torch.logaddexp(smooth, appearance)


def precision_recall(score: Tensor, same: Tensor) -> Curve:
    """Precision-recall curve of predicting `same` (M,) from `score` (M,), where larger means more likely the same.

    Average precision is the sum of precision times the increase of recall.
    """
    if not same.any():
        raise StegoError("none of the pairs has the same label, so recall is not defined.")
    truth, values = same.numpy(), score.double().numpy()
    precision, recall, _ = precision_recall_curve(truth, values)
    return Curve(recall[::-1].copy(), precision[::-1].copy(), float(average_precision_score(truth, values)))


def write_curves(
    path: str | Path, curves: dict[str, dict[str, Curve]], chance: dict[str, float], about: str, points: int = 101
) -> None:
    """Writes curves as a small JSON file, sampled at `points` evenly spaced recalls, with the exact average precision.

    curves: kind of pairs -> predictor -> curve; chance: kind of pairs -> fraction of same pairs; about: description.
    """
    recall = np.linspace(0, 1, points)
    thinned: dict[str, dict[str, Any]] = {kind: {} for kind in curves}
    for kind, predictors in curves.items():
        for name, curve in predictors.items():
            first = np.minimum(np.searchsorted(curve.recall, recall), len(curve.recall) - 1)  # that is as far
            precision = curve.precision[first].round(4).tolist()
            thinned[kind][name] = {"precision": precision, "average_precision": curve.average_precision}
    write_json(path, {"about": about, "chance": chance, "recall": recall.round(4).tolist(), "curves": thinned})


def read_curves(path: str | Path) -> tuple[dict[str, dict[str, Curve]], dict[str, float], str]:
    """Reads a file of `write_curves`: curves, chance, about."""
    content = read_json(path)
    recall = np.array(content["recall"])
    curves = {
        title: {name: Curve(recall, np.array(c["precision"]), c["average_precision"]) for name, c in panel.items()}
        for title, panel in content["curves"].items()
    }
    return curves, content["chance"], content["about"]


def frequent_labels(labels: Tensor, count: int | None = None) -> list[int]:
    """At most `count` labels of an image, (h, w) or (H, W), most frequent first, without ignored ones."""
    known, sizes = labels[labels >= 0].unique(return_counts=True)
    return known[sizes.argsort(descending=True, stable=True)][:count].tolist()


def query_points(labels: Tensor, count: int) -> list[tuple[int, int]]:
    """(row, column) of the most interior cell of each of the `count` most frequent labels (h, w) of an image."""
    points = []
    for label in frequent_labels(labels, count):
        depth = distance_transform_edt(np.pad((labels == label).numpy(), 1))[1:-1, 1:-1]
        row, column = np.unravel_index(depth.argmax(), depth.shape)
        points.append((int(row), int(column)))
    return points
