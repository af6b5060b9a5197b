"""Baselines: k-means on raw features, principal components and colors, and a linear probe on raw features."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor

from .probes import SAMPLES, kmeans, multinomial_regression, sample_cells
from .utils.progress import stage

if TYPE_CHECKING:
    from .features import Features


@dataclass(frozen=True)
class LinearScorer:
    """Linear scores of n clusters or classes: weight (n, C) and bias (n,).

    The nearest center of k-means has the largest score `2 f.c - |c|^2`. Upsampling linear scores equals upsampling
    features, with n instead of C channels.
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, maps: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, n, h, w)."""
        return F.conv2d(maps, self.weight[:, :, None, None], self.bias)


def kmeans_on_features(store: "Features", n_clusters: int, seed: int) -> LinearScorer:
    """k-means on L2-normalized features of the training images."""
    unit = F.normalize(sample_features(store, seed)[0], dim=1)
    with stage("baseline: k-means on features"):
        return _kmeans(unit, n_clusters, seed)


def kmeans_on_components(store: "Features", dim: int, n_clusters: int, seed: int) -> LinearScorer:
    """k-means on the first `dim` principal components of L2-normalized features, or on all if there are fewer."""
    unit = F.normalize(sample_features(store, seed)[0], dim=1).numpy()
    with stage("baseline: k-means on principal components"):
        fitted = PCA(min(dim, *unit.shape), random_state=seed).fit(unit)
        reduced = _kmeans(torch.from_numpy(fitted.transform(unit)), n_clusters, seed)
    weight = reduced.weight @ torch.from_numpy(fitted.components_)
    return LinearScorer(weight, reduced.bias - weight @ torch.from_numpy(fitted.mean_))


def kmeans_on_colors(store: "Features", n_clusters: int, seed: int) -> LinearScorer:
    """k-means on the colors, in [0, 1], of random pixels in training images."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(store), size=256)
    pixels = store.image_rows(torch.from_numpy(rows)).permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    points = torch.from_numpy(pixels[rng.integers(len(pixels), size=SAMPLES)] / np.float32(255))
    with stage("baseline: k-means on colors"):
        return _kmeans(points, n_clusters, seed)


def linear_on_features(store: "Features", seed: int) -> LinearScorer:
    """Multinomial regression on L2-normalized features WITH training labels."""
    features, labels = sample_features(store, seed)
    assert labels is not None, "needs a store with labels"
    unit = F.normalize(features, dim=1)
    with stage("baseline: linear probe on features"):
        return LinearScorer(*multinomial_regression(unit, labels, store.n_classes))


def _kmeans(points: Tensor, n_clusters: int, seed: int) -> LinearScorer:
    centers = kmeans(points, n_clusters, seed)
    return LinearScorer(2 * centers, -centers.square().sum(1))


def sample_features(store: "Features", seed: int) -> tuple[Tensor, Tensor | None]:
    """Features (M, C) and labels of random grid cells, see `probes.sample_cells`."""
    return sample_cells(store, seed, store.rows, store.shape[1], SAMPLES)
