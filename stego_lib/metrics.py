"""Confusion matrix, Hungarian matching of clusters to classes, accuracy, IoU, and F-score of borders."""

from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Counts: TypeAlias = Tensor | np.ndarray

# Maximum distance in pixels between matching predicted and true borders.
BORDER_TOLERANCE = 3


def confusion(pred: Counts, label: Counts, n_pred: int, n_classes: int, *, published: bool = False) -> Tensor:
    """Confusion matrix, int64 (n_pred, n_classes): [p, c] is the number of pixels of class c with prediction p.

    Parameters
    ----------
    pred, label
        Integers of equal shape. Pixels with labels outside [0, n_classes) are ignored.
    n_pred, n_classes
        Numbers of clusters and classes.
    published
        Reproduce a defect of the published code: drop pixels in extra clusters (>= n_classes).

    Raises
    ------
    ValueError
        For predictions outside [0, n_pred) and for different shapes.

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
        raise ValueError(f"predictions are {int(pred.min())} to {int(pred.max())}, not in [0, {n_pred})")
    return torch.bincount(pred * n_classes + label, minlength=n_pred * n_classes).reshape(n_pred, n_classes)


def match(confusion: Counts) -> Tensor:
    """Hungarian matching of clusters to classes that maximizes accuracy (paper, section 4).

    confusion: (n_pred, n_classes). Returns the class of each cluster, int64 (n_pred,), -1 for unmatched clusters.
    """
    counts = np.asarray(confusion)
    clusters, classes = linear_sum_assignment(counts, maximize=True)
    matching = torch.full((len(counts),), -1, dtype=torch.int64)
    matching[torch.from_numpy(clusters)] = torch.from_numpy(classes)
    return matching


def majority(confusion: Counts) -> Tensor:
    """The most frequent class of each cluster, int64 (n_pred,), -1 if empty. confusion: (n_pred, n_classes).

    Its score increases with the number of clusters (one cluster per pixel scores 100), see the chapter on evaluation.
    """
    counts = torch.as_tensor(confusion)
    return torch.where(counts.sum(1) > 0, counts.argmax(1), -1)


def published_map(matching: Counts) -> Tensor:
    """`map_clusters` of the published code: the result of `match` with a defect, int64 (n_pred,).

    The -1 of an unmatched cluster is inserted one position too late, unless it is the last.
    """
    matching = torch.as_tensor(matching)
    classes = matching[matching >= 0].tolist()
    for cluster in torch.nonzero(matching < 0).flatten().tolist():
        classes.insert(cluster + 1, -1)
    return torch.tensor(classes)


def identity(n_classes: int) -> Tensor:
    """The matching of a probe that predicts classes."""
    return torch.arange(n_classes)


def assigned(confusion: Counts, matching: Counts) -> Tensor:
    """The confusion matrix after matching, int64 (n_classes + 1, n_classes); the last row is unmatched clusters."""
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
        Class of each cluster or -1, (n_pred,). Pixels in unmatched clusters count as errors.
    published
        Reproduce a defect of the published code: if extra clusters have pixels, the mean IoU includes "no class" with
        IoU 0.

    Returns
    -------
    dict
        "accuracy", "miou" and "iou" (a list). The IoU of a class that is neither labeled nor predicted is NaN and not
        part of the mean; without labeled pixels every score is NaN.

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


def own_assigned(confusion: Counts) -> Tensor:
    """`assigned` for the matching of a single image; clusters without a correct pixel are unmatched.

    The sum over a split, scored with `identity`, gives `own_miou`, the mIoU if clusters are matched for each image. If
    it is much higher than the mIoU, segments are right but their names are not.
    """
    counts, matching = torch.as_tensor(confusion), match(confusion)
    agreeing = counts.gather(1, matching.clamp(min=0)[:, None])[:, 0]
    return assigned(counts, matching.masked_fill(agreeing == 0, -1))


def border_counts(pred: Counts, label: Counts, n_classes: int) -> Tensor:
    """Counts for `border_f`, int64 (4,), which can be summed: predicted border pixels, those within `BORDER_TOLERANCE`
    of a true one, true border pixels, those within `BORDER_TOLERANCE` of a predicted one.

    A border pixel has a left, right, upper or lower neighbor with another id. Pixels with labels outside [0, n_classes)
    are ignored, also as neighbors. pred, label: integers (B, H, W), which need not be matched.
    """
    pred, label = torch.as_tensor(pred).long(), torch.as_tensor(label).long()
    counted = (label >= 0) & (label < n_classes)
    predicted, true = (_borders(ids, counted) for ids in (pred, label))
    steps = torch.arange(-BORDER_TOLERANCE, BORDER_TOLERANCE + 1)
    disk = (steps**2 + steps[:, None] ** 2 <= BORDER_TOLERANCE**2).float()[None, None]

    def near(borders: Tensor) -> Tensor:
        return F.conv2d(borders[:, None].float(), disk, padding=BORDER_TOLERANCE)[:, 0] > 0.5

    pairs = (predicted, predicted & near(true), true, true & near(predicted))
    return torch.stack([pixels.sum() for pixels in pairs])


def _borders(ids: Tensor, counted: Tensor) -> Tensor:
    """Pixels with a neighbor of another id, both counted, bool (B, H, W)."""
    borders = torch.zeros_like(counted)
    for axis in (1, 2):
        before = (slice(None),) * axis
        first, second = (*before, slice(None, -1)), (*before, slice(1, None))
        change = (ids[first] != ids[second]) & counted[first] & counted[second]
        borders[first] |= change
        borders[second] |= change
    return borders


def border_f(counts: Counts) -> float:
    """F-score of borders in percent, from the sum of `border_counts` over a split; NaN without borders.

    The harmonic mean of precision (share of predicted border pixels near a true one) and recall (share of true border
    pixels near a predicted one).
    """
    predicted, correct, true, detected = (float(count) for count in counts)
    if predicted + true == 0:
        return float("nan")
    precision, recall = correct / max(predicted, 1), detected / max(true, 1)
    return 100 * 2 * precision * recall / max(precision + recall, 1e-12)
