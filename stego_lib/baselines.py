"""What STEGO is compared with: k-means on raw features and on raw colors, a linear probe on raw features, fixed heads."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.random_projection import GaussianRandomProjection
from torch import Tensor

from .experiment import Experiment
from .features.store import Features
from .model import Stego, build_model
from .probes import SAMPLES, fit_cluster_probe, kmeans, multinomial_regression, sample_cells
from .runtime.errors import StegoError
from .runtime.progress import stage


@dataclass(frozen=True)
class LinearScorer:
    """Scores of n clusters or classes that are linear in the input: weight (n, C) and bias (n,).

    Nearest center is the largest of `2 f.c - |c|^2`, so k-means is one of these too. Being linear, scores may be
    upsampled in place of the features: the result is the same and costs n channels, not C.
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, maps: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, n, h, w)."""
        return F.conv2d(maps, self.weight[:, :, None, None], self.bias)


def kmeans_on_features(store: Features, n_clusters: int, seed: int) -> LinearScorer:
    """k-means on the L2-normalized features of the training images."""
    unit = F.normalize(_sampled_features(store, seed)[0], dim=1)
    with stage("baseline: k-means on features"):
        return _kmeans(unit, n_clusters, seed)


def kmeans_on_components(store: Features, dim: int, n_clusters: int, seed: int) -> LinearScorer:
    """k-means on the first `dim` principal components of the same: a code of that width without the correspondence loss.

    Features with fewer channels than `dim` keep all their components.
    """
    unit = F.normalize(_sampled_features(store, seed)[0], dim=1).numpy()
    with stage("baseline: k-means on principal components"):
        fitted = PCA(min(dim, *unit.shape), random_state=seed).fit(unit)
        of_components = _kmeans(torch.from_numpy(fitted.transform(unit)), n_clusters, seed)
    weight = of_components.weight @ torch.from_numpy(fitted.components_)
    return LinearScorer(weight, of_components.bias - weight @ torch.from_numpy(fitted.mean_))


def kmeans_on_colors(store: Features, n_clusters: int, seed: int) -> LinearScorer:
    """k-means on the colors, in [0, 1], of single pixels of the training images."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(store), size=256)
    pixels = store.image_rows(torch.from_numpy(rows)).permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    points = torch.from_numpy(pixels[rng.integers(len(pixels), size=SAMPLES)] / np.float32(255))
    with stage("baseline: k-means on colors"):
        return _kmeans(points, n_clusters, seed)


def linear_on_features(store: Features, seed: int) -> LinearScorer:
    """Multinomial regression on L2-normalized features, WITH the training labels: how much the features know."""
    features, labels = _sampled_features(store, seed)
    assert labels is not None, "asked of stores with labels alone"
    unit = F.normalize(features, dim=1)
    with stage("baseline: linear probe on features"):
        return LinearScorer(*multinomial_regression(unit, labels, store.n_classes))


FIXED_HEADS = {
    "pca": "linear",
    "random projection": "linear",
    "untrained head": "nonlinear",
    "features": "none",
}
"""Heads that no loss has shaped -> the kind of segmentation head that holds them."""


@torch.no_grad()
def fixed_head(kind: str, store: Features, experiment: Experiment) -> Stego:
    """A model whose head is fixed, with clusters fitted to its codes by k-means: STEGO without the correspondence loss.

    kind: "pca", the experiment's code_dim first principal components of the features of random grid cells, their mean taken
    off; "random projection", that many Gaussian directions; "untrained head", the experiment's own head as it
    begins; "features", the features themselves. The experiment's head must be of the kind in `FIXED_HEADS`. Everything
    after the head is as for a trained one, so that scores differ by nothing but the head. Raises StegoError for an unknown or
    unfitting kind, and for more principal components than features have channels.
    """
    if FIXED_HEADS.get(kind) != experiment.head:
        raise StegoError(
            f"fixed head {kind!r} on an experiment with head={experiment.head!r}; fixed heads and what they need: {FIXED_HEADS}"
        )
    channels, dim = store.shape[1], experiment.code_dim
    if kind == "pca" and dim > channels:
        raise StegoError(f"{dim} principal components of features with {channels} channels; code_dim must not be above")
    model = build_model(experiment, channels, store.n_classes)
    if experiment.subtract_mean:
        model.feature_mean.copy_(store.mean.view(1, -1, 1, 1))
    if FIXED_HEADS[kind] == "linear":
        features = _sampled_features(store, experiment.seed)[0].numpy()
        if kind == "pca":
            fitted = PCA(dim, random_state=experiment.seed).fit(features)
            model.feature_mean.copy_(torch.from_numpy(fitted.mean_).view(1, -1, 1, 1))
        else:
            fitted = GaussianRandomProjection(dim, random_state=experiment.seed).fit(features[:1])
        model.head.linear.weight.copy_(torch.from_numpy(fitted.components_)[:, :, None, None])
        model.head.linear.bias.zero_()
    fit_cluster_probe(model, store, experiment.seed)
    return model


def _kmeans(points: Tensor, n_clusters: int, seed: int) -> LinearScorer:
    centers = kmeans(points, n_clusters, seed)
    return LinearScorer(2 * centers, -centers.square().sum(1))


def _sampled_features(store: Features, seed: int) -> tuple[Tensor, Tensor | None]:
    """Features at the very cells that the probes are fitted at, (M, C), and their labels, see `probes.sample_cells`."""
    return sample_cells(store, seed, store.rows, store.shape[1], SAMPLES)
