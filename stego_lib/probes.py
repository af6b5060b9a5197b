"""Probes fitted after the head, on its codes: their gradients never reach it, so nothing is lost by waiting."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from .batches import seeded
from .clustering import SAMPLES, kmeans
from .features import Features
from .model import Stego


@torch.no_grad()
def fit_probes(model: Stego, store: Features, seed: int) -> None:
    """Fits the cluster probe, and the linear probe where the store has labels, to codes of random grid cells.

    The cluster probe gets the centres of k-means on L2-normalised codes, without labels; the linear probe, which only
    measures, multinomial regression on the labels at the cells' centres.
    """
    codes, labels = sample_codes(model, store, seed)
    _set_clusters(model, codes, seed)
    if labels is not None:
        classifier = model.linear_probe.classifier
        weight, bias = multinomial_regression(codes, labels, classifier.out_channels)
        classifier.weight.copy_(weight[:, :, None, None])
        classifier.bias.copy_(bias)


@torch.no_grad()
def fit_cluster_probe(model: Stego, store: Features, seed: int) -> None:
    """The cluster probe alone."""
    _set_clusters(model, sample_codes(model, store, seed)[0], seed)


def _set_clusters(model: Stego, codes: Tensor, seed: int) -> None:
    clusters = model.cluster_probe.clusters
    clusters.copy_(kmeans(F.normalize(codes, dim=1), len(clusters), seed))


@torch.no_grad()
def sample_codes(model: Stego, store: Features, seed: int) -> tuple[Tensor, Tensor | None]:
    """Codes of random grid cells, float32 (M, K), and the labels at the cells' centres, int64 (M,), -1 = ignored.

    About `SAMPLES` cells, from all pictures if they are fewer than that. Without labels in the store the second is None.
    """
    model.eval()
    count, _, height, width = store.shape
    generator = seeded(seed, "clusters", 0)
    cells = max(1, min(height * width, SAMPLES // count))
    asked = torch.randperm(count, generator=generator)[:SAMPLES]
    # Room is taken once: small pieces that stay between large ones that go would make the process grow with every batch.
    codes = torch.empty(len(asked), cells, model.head.code_dim)
    labels = torch.empty(len(asked), cells, dtype=torch.int64) if store.has_labels else None
    for places in torch.arange(len(asked)).split(32):
        rows = asked[places]
        code = model(store.rows(rows, model.feature_mean.device)).flatten(2).transpose(1, 2)
        chosen = torch.randperm(height * width, generator=generator)[:cells]
        codes[places] = code[:, chosen].cpu()
        if labels is not None:
            labels[places] = labels_at(store.label_rows(rows), chosen, (height, width))
    return codes.flatten(0, 1), None if labels is None else labels.flatten()


def labels_at(labels: Tensor, cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """The labels at the centres of grid cells: labels (B, H, W), cells int64 (n,) counted row by row -> (B, n)."""
    (height, width), (rows, columns) = labels.shape[1:], grid
    y = cells // columns * height // rows + height // rows // 2
    x = cells % columns * width // columns + width // columns // 2
    return labels[:, y, x]


def multinomial_regression(points: Tensor, labels: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """Weight (n_classes, C) and bias (n_classes,) of multinomial logistic regression on points (M, C) and labels (M,).

    Labels below zero are left out; a class that does not occur is never chosen. Each channel is brought to mean 0 and standard
    deviation 1 for the fit, without which it takes several times as many iterations, and ends where the mean loss has
    no slope above 1e-4: broken off earlier, the probe tells of the optimiser and not of the points (at 1e-2 it is 8 mIoU
    lower on CamVid's features).
    """
    known = labels >= 0
    points, labels = points[known].numpy(), labels[known].numpy()
    weight, bias = torch.zeros(n_classes, points.shape[1]), torch.full((n_classes,), -1e4)
    if len(np.unique(labels)) < 2:  # nothing to tell apart, and scikit-learn refuses it
        bias[labels[:1]] = 0
        return weight, bias
    scaler = StandardScaler().fit(points)
    fitted = LogisticRegression(tol=1e-4, max_iter=2000).fit(scaler.transform(points), labels)
    coefficients = fitted.coef_ / scaler.scale_
    offsets = fitted.intercept_ - coefficients @ scaler.mean_
    if len(fitted.classes_) == 2:  # scikit-learn keeps one row for two classes
        coefficients, offsets = np.concatenate([-coefficients, coefficients]), np.concatenate([-offsets, offsets])
    weight[fitted.classes_] = torch.from_numpy(coefficients).float()
    bias[fitted.classes_] = torch.from_numpy(offsets).float()
    return weight, bias
