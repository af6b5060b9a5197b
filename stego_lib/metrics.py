"""Confusion matrix, Hungarian matching of clusters to classes, accuracy and IoU."""

from typing import Any, TypeAlias

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Counts: TypeAlias = Tensor | np.ndarray


def confusion(pred: Counts, label: Counts, n_pred: int, n_classes: int, *, published: bool = False) -> Tensor:
    """Counts pixels: int64 (n_pred, n_classes), [p, c] = pixels of class c that were given cluster p.

    pred, label: integers of the same shape. Pixels whose label is not in [0, n_classes) are ignored.
    A prediction outside [0, n_pred) raises ValueError at a pixel that counts. `published=True` repeats a defect of the
    published code instead: pixels given one of the extra clusters (>= n_classes) are dropped.
    """
    pred, label = torch.as_tensor(pred).long().reshape(-1), torch.as_tensor(label).long().reshape(-1)
    if pred.shape != label.shape:
        raise ValueError(f"prediction and label differ in size: {len(pred)} and {len(label)} pixels")
    counted = (label >= 0) & (label < n_classes)
    if published:
        counted &= (pred >= 0) & (pred < n_classes)
    pred, label = pred[counted], label[counted]
    if len(pred) and not (int(pred.min()) >= 0 and int(pred.max()) < n_pred):
        raise ValueError(f"predictions reach from {int(pred.min())} to {int(pred.max())}, not 0 to {n_pred - 1}")
    return torch.bincount(pred * n_classes + label, minlength=n_pred * n_classes).reshape(n_pred, n_classes)


def match(confusion: Counts) -> Tensor:
    """Matches clusters to classes one to one so that the most pixels agree (Hungarian method; paper, section 4).

    confusion: (n_pred, n_classes). Returns int64 (n_pred,): the class of each cluster, -1 for a cluster without one.
    """
    counts = np.asarray(confusion)
    clusters, classes = linear_sum_assignment(counts, maximize=True)
    matching = torch.full((len(counts),), -1, dtype=torch.int64)
    matching[torch.from_numpy(clusters)] = torch.from_numpy(classes)
    return matching


def majority(confusion: Counts) -> Tensor:
    """Gives each cluster the class that most of its pixels have, however many clusters get the same one: int64 (n_pred,).

    The score of this matching rises with the number of clusters, whatever they hold (a cluster a pixel scores 100), so it
    serves to show that and nothing else here. confusion: (n_pred, n_classes); an empty cluster gets -1.
    """
    counts = torch.as_tensor(confusion)
    return torch.where(counts.sum(1) > 0, counts.argmax(1), -1)


def published_map(matching: Counts) -> Tensor:
    """The published code's `map_clusters`, which is `match`'s result but for a defect: int64 (n_pred,).

    Each cluster without a class gets its -1 one place too late, unless it comes last, and pushes the others off their places.
    """
    matching = torch.as_tensor(matching)
    found = matching[matching >= 0].tolist()
    for cluster in torch.nonzero(matching < 0).flatten().tolist():
        found.insert(cluster + 1, -1)  # past the end it is the end
    return torch.tensor(found)


def identity(n_classes: int) -> Tensor:
    """The matching of a probe that was trained with labels: prediction c is class c."""
    return torch.arange(n_classes)


def assigned(confusion: Counts, matching: Counts) -> Tensor:
    """The confusion matrix with clusters gathered by class: int64 (n_classes + 1, n_classes).

    Row c holds what was given class c, the last row what was given a cluster without a class.
    """
    counts, matching = torch.as_tensor(confusion).long(), torch.as_tensor(matching).long()
    n_classes = counts.shape[1]
    gathered = torch.zeros(n_classes + 1, n_classes, dtype=torch.int64)
    return gathered.index_add(0, torch.where(matching < 0, n_classes, matching), counts)


def scores(confusion: Counts, matching: Counts, *, published: bool = False) -> dict[str, Any]:
    """Accuracy, mean IoU and IoU of each class, in percent.

    confusion: (n_pred, n_classes); matching: (n_pred,) class of each cluster or -1. Pixels in clusters without a class
    count as errors. A class that is neither in the labels nor predicted has IoU NaN and is left out of the mean;
    with no labeled pixel at all every score is NaN. `published=True` repeats a defect of the published code: with
    extra clusters, "no class" joins the mean as one more class of IoU 0 as soon as it has a pixel.
    Returns {"accuracy": float, "miou": float, "iou": [float, one a class]}.
    """
    gathered = assigned(confusion, matching).double()
    hit, given, there = gathered.diagonal(), gathered.sum(1), gathered.sum(0)
    iou = 100 * hit / (given[:-1] + there - hit)
    counted = iou
    if published and len(torch.as_tensor(matching)) > len(there) and given[-1] > 0:
        counted = torch.cat([iou, iou.new_zeros(1)])
    return {
        "accuracy": float(100 * hit.sum() / gathered.sum()),
        "miou": float(counted.nanmean()),
        "iou": iou.tolist(),
    }
