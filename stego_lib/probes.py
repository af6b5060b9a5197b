"""Probes fitted to the trained codes.

Their gradients never reach the head, so nothing is lost by fitting them after training.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from .model import Stego
from .utils.progress import progress, stage

if TYPE_CHECKING:
    from .features import Features

# Points that the probes are fitted to.
SAMPLES = 40_000
# Starts of k-means; the result with the smallest inertia is kept.
RESTARTS = 10


@torch.no_grad()
def fit_probes(model: Stego, store: "Features", seed: int, *, clusters: bool = True, linear: bool = True) -> None:
    """Fits the cluster probe, and with labels the linear probe, to codes of random grid cells; or one of both.

    The cluster probe gets the centers of k-means on L2-normalized codes, without labels; the linear probe gets
    multinomial regression on the labels at the centers of the cells.
    """
    codes, labels = sample_codes(model, store, seed)
    if clusters:
        centers = model.cluster_probe.clusters
        with stage("fitting the cluster probe (k-means)"):
            centers.copy_(kmeans(F.normalize(codes, dim=1), len(centers), seed))
    if linear and labels is not None:
        classifier = model.linear_probe.classifier
        with stage("fitting the linear probe (multinomial regression)"):
            weight, bias = multinomial_regression(codes, labels, classifier.out_channels)
        classifier.weight.copy_(weight[:, :, None, None])
        classifier.bias.copy_(bias)


@torch.no_grad()
def sample_codes(model: Stego, store: "Features", seed: int) -> tuple[Tensor, Tensor | None]:
    """Codes of random grid cells, float32 (M, K), and the labels at their centers, see `sample_cells`."""
    model.eval()
    device = model.feature_mean.device
    return sample_cells(store, seed, lambda rows: model(store.rows(rows, device)), model.head.code_dim, SAMPLES)


def sample_cells(
    store: "Features", seed: int, maps: Callable[[Tensor], Tensor], channels: int, count: int
) -> tuple[Tensor, Tensor | None]:
    """Samples maps at random grid cells of each image; the cells depend on the seed alone.

    So probes and baselines see the same cells of the same images.

    Parameters
    ----------
    store
        Gives the number of images, the grid and the labels.
    seed
        Seed of the cells.
    maps
        Rows of the store, int64 (B,) -> maps (B, channels, h, w).
    channels
        Channels of the maps.
    count
        Cells in all, about; from `count` images if there are more.

    Returns
    -------
    tuple
        float32 (M, channels), and the labels at the centers of the cells, int64 (M,) with -1 = ignored, or None without
        labels.
    """
    images, _, height, width = store.shape
    generator = torch.Generator().manual_seed(seed)
    cells = max(1, min(height * width, count // images))
    chosen_rows = torch.randperm(images, generator=generator)[:count]
    # Allocated once: small tensors that stay between large ones that go would fragment the memory.
    samples = torch.empty(len(chosen_rows), cells, channels)
    labels = torch.empty(len(chosen_rows), cells, dtype=torch.int64) if store.has_labels else None
    for positions in progress(torch.arange(len(chosen_rows)).split(32), "sampling grid cells"):
        rows = chosen_rows[positions]
        values = maps(rows).flatten(2).transpose(1, 2)
        chosen = torch.stack([torch.randperm(height * width, generator=generator)[:cells] for _ in rows])
        samples[positions] = values.gather(1, chosen.to(values.device)[..., None].expand(-1, -1, channels)).cpu()
        if labels is not None:
            labels[positions] = labels_at(store.label_rows(rows), chosen, (height, width))
    return samples.flatten(0, 1), None if labels is None else labels.flatten()


def labels_at(labels: Tensor, cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """Labels (B, H, W) at the centers of grid cells, int64 (n,) or (B, n) in row-major order -> (B, n)."""
    (height, width), (rows, columns) = labels.shape[1:], grid
    y = cells // columns * height // rows + height // rows // 2
    x = cells % columns * width // columns + width // columns // 2
    return labels[torch.arange(len(labels))[:, None], y, x]


def multinomial_regression(
    points: Tensor, labels: Tensor, n_classes: int, C: float = 1.0, like: Tensor | None = None, balanced: bool = False
) -> tuple[Tensor, Tensor]:
    """Weight (n_classes, C) and bias (n_classes,) of multinomial logistic regression on points (M, C) and labels (M,).

    Labels below zero are left out; a class that does not occur is never predicted. Channels are standardized for the
    fit, which otherwise takes several times as many iterations. It stops at a gradient of 1e-4: at 1e-2 the probe
    measures the optimizer rather than the points (8 mIoU lower on CamVid's features). C: of scikit-learn, the
    weight of the summed loss against half the squared weights. like: points (N, C) to standardize by, where M is small.
    balanced: all classes have the same weight in sum.
    """
    known = labels >= 0
    points, labels = points[known].numpy(), labels[known].numpy()
    weight, bias = torch.zeros(n_classes, points.shape[1]), torch.full((n_classes,), -1e4)
    if len(np.unique(labels)) < 2:  # nothing to tell apart, and scikit-learn refuses it
        bias[labels[:1]] = 0
        return weight, bias
    scaler = StandardScaler().fit(points if like is None else like.numpy())
    fitted = LogisticRegression(C=C, tol=1e-4, max_iter=2000, class_weight="balanced" if balanced else None).fit(
        scaler.transform(points), labels
    )
    coefficients = fitted.coef_ / scaler.scale_
    offsets = fitted.intercept_ - coefficients @ scaler.mean_
    if len(fitted.classes_) == 2:  # scikit-learn keeps one row for two classes
        # A sigmoid of one logit is the softmax of two logits with that difference.
        coefficients, offsets = (np.concatenate([-one / 2, one / 2]) for one in (coefficients, offsets))
    weight[fitted.classes_] = torch.from_numpy(coefficients).float()
    bias[fitted.classes_] = torch.from_numpy(offsets).float()
    return weight, bias


def kmeans(points: Tensor, n_clusters: int, seed: int) -> Tensor:
    """k-means on points (M, C): cluster centers, float32 (n_clusters, C)."""
    fitted = KMeans(n_clusters, n_init=RESTARTS, random_state=seed).fit(points.cpu().numpy())
    return torch.from_numpy(fitted.cluster_centers_).float()
