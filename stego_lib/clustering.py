"""k-means as everything here uses it, and the cluster probe fitted by it."""

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor

from .batches import seeded
from .features import FeatureStore
from .model import Stego

SAMPLES = 40_000
"""Points that clusters are fitted on."""
RESTARTS = 10
"""Starts of k-means; the one with the smallest distortion is kept (its own objective, no labels)."""


def kmeans(points: Tensor, n_clusters: int, seed: int) -> Tensor:
    """Cluster centres (n_clusters, C), float32, of points (M, C)."""
    fitted = KMeans(n_clusters, n_init=RESTARTS, random_state=seed).fit(points.cpu().numpy())
    return torch.from_numpy(fitted.cluster_centers_).float()


@torch.no_grad()
def refit_clusters(model: Stego, store: FeatureStore, seed: int) -> None:
    """Replaces the cluster probe's clusters by k-means on the L2-normalised codes of random grid cells, without labels."""
    model.eval()
    count, _, height, width = store.features.shape
    generator, codes = seeded(seed, "clusters", 0), []
    cells = max(1, min(height * width, SAMPLES // count))
    for rows in torch.randperm(count, generator=generator)[:SAMPLES].split(32):
        code = F.normalize(model(store.rows(rows).to(model.feature_mean.device)), dim=1).flatten(2).transpose(1, 2)
        codes.append(code[:, torch.randperm(height * width, generator=generator)[:cells]].flatten(0, 1).cpu())
    clusters = model.cluster_probe.clusters
    clusters.copy_(kmeans(torch.cat(codes), len(clusters), seed))
