"""Other ways to cluster codes than k-means, and how far two clusterings agree. Each way gives one direction a cluster."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import AgglomerativeClustering, KMeans, kmeans_plusplus
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from torch import Tensor

from stego_lib.probes import RESTARTS, kmeans
from stego_lib.utils.errors import StegoError

SMALL = 100
"""Small clusters that are merged."""
MIXED_DIM = 16
"""Principal components that a Gaussian mixture sees."""
ROUNDS = 100
"""Rounds of spherical k-means at most."""


def cluster(points: Tensor, n_clusters: int, seed: int, way: str = "k-means") -> Tensor:
    """Clusters unit codes (M, C), without labels: unit directions (n_clusters, C), float32; a code's is the nearest one.

    way: one of `WAYS`. What a way finds is reduced to the mean direction of each cluster, which a cluster probe can hold.
    The same seed gives the same clusters. Raises StegoError for an unknown way, and for more clusters than points.
    """
    if way not in WAYS:
        raise StegoError(f"unknown way to cluster {way!r}; ways: {', '.join(WAYS)}")
    if not 1 <= n_clusters <= len(points):
        raise StegoError(f"{n_clusters} clusters of {len(points)} codes: there must be 1 to as many as codes")
    return F.normalize(WAYS[way](points.cpu().float(), n_clusters, seed), dim=1)


def assign(points: Tensor, directions: Tensor) -> Tensor:
    """The cluster of each code, int64 (M,): the direction with the largest cosine."""
    return (points @ F.normalize(directions, dim=1).T).argmax(1)


def agreement(points: Tensor, one: Tensor, other: Tensor) -> float:
    """Adjusted Rand index of two sets of directions on the same codes: 1 = the same clusters, 0 = as by chance. No labels."""
    return float(adjusted_rand_score(assign(points, one).numpy(), assign(points, other).numpy()))


def spherical_kmeans(points: Tensor, n_clusters: int, seed: int) -> Tensor:
    """k-means whose centers have length one too; the best of `RESTARTS` starts by its own objective, the mean cosine."""
    best, found = -2.0, points[:n_clusters]
    for start in range(RESTARTS):
        chosen, _ = kmeans_plusplus(points.numpy(), n_clusters, random_state=seed * RESTARTS + start)
        centers, before = torch.from_numpy(chosen), None
        for _ in range(ROUNDS):
            cosine, own = (points @ centers.T).max(1)
            if before is not None and torch.equal(own, before):
                break
            before = own
            sums = torch.zeros_like(centers).index_add_(0, own, points)
            empty = sums.norm(dim=1) == 0
            centers = torch.where(empty[:, None], centers, F.normalize(sums, dim=1))
        if (score := cosine.mean().item()) > best:
            best, found = score, centers
    return found


def gaussian_mixture(points: Tensor, n_clusters: int, seed: int) -> Tensor:
    """A mixture of Gaussians with full covariances, on the first `MIXED_DIM` principal components; the best of three starts."""
    values = points.numpy()
    reduced = PCA(min(MIXED_DIM, *values.shape), random_state=seed).fit_transform(values)
    labels = GaussianMixture(n_clusters, n_init=3, random_state=seed, reg_covar=1e-4, max_iter=60).fit_predict(reduced)
    return _means(points, labels, n_clusters)


def merged_clusters(points: Tensor, n_clusters: int, seed: int) -> Tensor:
    """`SMALL` clusters of k-means, merged by Ward's method until `n_clusters` are left."""
    small = KMeans(max(n_clusters, min(SMALL, len(points) // 2)), n_init=1, random_state=seed).fit(points.numpy())
    labels = AgglomerativeClustering(n_clusters, linkage="ward").fit_predict(small.cluster_centers_)
    return _means(points, labels[small.labels_], n_clusters)


def consensus(points: Tensor, n_clusters: int, seed: int) -> Tensor:
    """k-means of how `RESTARTS` k-means of one start each label every point: points that are often together stay together."""
    values = points.numpy()
    runs = [
        KMeans(n_clusters, n_init=1, random_state=seed * RESTARTS + start).fit_predict(values)
        for start in range(RESTARTS)
    ]
    votes = np.concatenate([np.eye(n_clusters, dtype=np.float32)[labels] for labels in runs], axis=1)
    return _means(points, KMeans(n_clusters, n_init=RESTARTS, random_state=seed).fit_predict(votes), n_clusters)


def _means(points: Tensor, labels: np.ndarray, n_clusters: int) -> Tensor:
    """Mean of the points of each label, (n_clusters, C); zero where a label has none, which nothing is nearest to."""
    own = torch.from_numpy(labels).long()
    return torch.zeros(n_clusters, points.shape[1]).index_add_(0, own, points)


WAYS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "k-means": kmeans,
    "spherical k-means": spherical_kmeans,
    "Gaussian mixture": gaussian_mixture,
    "merging": merged_clusters,
    "consensus": consensus,
}
"""Ways to cluster by name; "k-means" is what `probes="after"` uses."""
