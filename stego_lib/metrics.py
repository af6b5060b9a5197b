"""Confusion matrix, Hungarian matching of clusters to classes, accuracy and IoU."""

from typing import Any, TypeAlias

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Counts: TypeAlias = Tensor | np.ndarray


def confusion(pred: Counts, label: Counts, n_pred: int, n_classes: int, *, published: bool = False) -> Tensor:
    """Confusion matrix, int64 (n_pred, n_classes): [p, c] counts the pixels of class c with prediction p.

    Parameters
    ----------
    pred, label
        Integers of one shape. Pixels whose label is not in [0, n_classes) are ignored.
    n_pred, n_classes
        Numbers of clusters and classes.
    published
        Repeat a defect of the published code: pixels in extra clusters (>= n_classes) are dropped.

    Raises
    ------
    ValueError
        For a counted prediction outside [0, n_pred), and for other shapes.

    Examples
    --------
    >>> confusion(torch.tensor([0, 1, 1]), torch.tensor([0, 0, -1]), 2, 2)
    tensor([[1, 0],
            [1, 0]])
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
    """Hungarian matching of clusters to classes that maximizes accuracy (paper, section 4).

    confusion: (n_pred, n_classes). Returns the class of each cluster, int64 (n_pred,), -1 for a cluster without one.
    """
    counts = np.asarray(confusion)
    clusters, classes = linear_sum_assignment(counts, maximize=True)
    matching = torch.full((len(counts),), -1, dtype=torch.int64)
    matching[torch.from_numpy(clusters)] = torch.from_numpy(classes)
    return matching


def majority(confusion: Counts) -> Tensor:
    """The most frequent class of each cluster, int64 (n_pred,), -1 for an empty one. confusion: (n_pred, n_classes).

    Its score rises with the number of clusters, whatever they hold (one cluster per pixel scores 100); the chapter on
    evaluation uses it to show that.
    """
    counts = torch.as_tensor(confusion)
    return torch.where(counts.sum(1) > 0, counts.argmax(1), -1)


def published_map(matching: Counts) -> Tensor:
    """The published code's `map_clusters`, int64 (n_pred,): the result of `match` with a defect.

    The -1 of a cluster without a class is inserted one position too late, unless it comes last, and shifts all that
    follow.
    """
    matching = torch.as_tensor(matching)
    found = matching[matching >= 0].tolist()
    for cluster in torch.nonzero(matching < 0).flatten().tolist():
        found.insert(cluster + 1, -1)  # past the end it is the end
    return torch.tensor(found)


def identity(n_classes: int) -> Tensor:
    """The matching of a probe trained with labels: prediction c is class c."""
    return torch.arange(n_classes)


def assigned(confusion: Counts, matching: Counts) -> Tensor:
    """The confusion matrix after matching, int64 (n_classes + 1, n_classes); last row: clusters without a class."""
    counts, matching = torch.as_tensor(confusion).long(), torch.as_tensor(matching).long()
    n_classes = counts.shape[1]
    gathered = torch.zeros(n_classes + 1, n_classes, dtype=torch.int64)
    return gathered.index_add(0, torch.where(matching < 0, n_classes, matching), counts)


def scores(confusion: Counts, matching: Counts, *, published: bool = False) -> dict[str, Any]:
    """Accuracy, mean IoU and IoU of each class, in percent.

    Parameters
    ----------
    confusion
        (n_pred, n_classes).
    matching
        Class of each cluster or -1, (n_pred,). Pixels in clusters without a class count as errors.
    published
        Repeat a defect of the published code: with extra clusters, "no class" joins the mean as a class of IoU 0 as
        soon as it has a pixel.

    Returns
    -------
    dict
        "accuracy", "miou" and "iou" (a list). A class that is neither labeled nor predicted has IoU NaN and is left out
        of the mean; without labeled pixels every score is NaN.

    Examples
    --------
    >>> table = confusion(pred, label, n_pred=27, n_classes=27)
    >>> scores(table, match(table))["miou"]
    """
    gathered = assigned(confusion, matching).double()
    hit, predicted, labeled = gathered.diagonal(), gathered.sum(1), gathered.sum(0)
    iou = 100 * hit / (predicted[:-1] + labeled - hit)
    counted = iou
    if published and len(torch.as_tensor(matching)) > len(labeled) and predicted[-1] > 0:
        counted = torch.cat([iou, iou.new_zeros(1)])
    return {
        "accuracy": float(100 * hit.sum() / gathered.sum()),
        "miou": float(counted.nanmean()),
        "iou": iou.tolist(),
    }
