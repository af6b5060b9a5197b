"""k-means as everything here uses it."""

import torch
from sklearn.cluster import KMeans
from torch import Tensor

SAMPLES = 40_000
"""Points that clusters are fitted on."""
RESTARTS = 10
"""Starts of k-means; the one with the smallest distortion is kept (its own objective, no labels)."""


def kmeans(points: Tensor, n_clusters: int, seed: int) -> Tensor:
    """Cluster centres (n_clusters, C), float32, of points (M, C)."""
    fitted = KMeans(n_clusters, n_init=RESTARTS, random_state=seed).fit(points.cpu().numpy())
    return torch.from_numpy(fitted.cluster_centers_).float()
