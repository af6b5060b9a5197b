"""Fits probes to the codes after training, which is possible because their gradients do not reach the head."""

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

# Number of grid cells for fitting probes.
SAMPLES = 40_000
# Number of initializations of k-means; the result with the smallest inertia is kept.
RESTARTS = 10


@torch.no_grad()
def fit_probes(model: Stego, store: "Features", seed: int, *, clusters: bool = True, linear: bool = True) -> None:
    """Fits the cluster probe, and with labels the linear probe, to codes of random grid cells.

    The cluster probe is k-means on L2-normalized codes, without labels. The linear probe is multinomial regression on
    the labels at the centers of the cells. clusters, linear: which probes to fit.
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
        classifier.load_state_dict({"weight": weight[:, :, None, None], "bias": bias})


@torch.no_grad()
def sample_codes(model: Stego, store: "Features", seed: int) -> tuple[Tensor, Tensor | None]:
    """Codes of random grid cells, float32 (M, K), and their labels, see `sample_cells`."""
    model.eval()
    device = model.feature_mean.device
    return sample_cells(store, seed, lambda rows: model(store.rows(rows, device)), model.head.code_dim, SAMPLES)


def sample_cells(
    store: "Features", seed: int, maps: Callable[[Tensor], Tensor], channels: int, count: int
) -> tuple[Tensor, Tensor | None]:
    """Samples maps at random grid cells: float32 (M, channels), and labels, int64 (M,) with -1 = ignored, or None.

    The same seed gives the same cells for probes and baselines. maps: function from rows of the store, int64 (B,), to
    maps (B, channels, h, w); count: approximate number of cells, and maximum number of images.
    """
    images, _, height, width = store.shape
    generator = torch.Generator().manual_seed(seed)
    cells = max(1, min(height * width, count // images))
    chosen_rows = torch.randperm(images, generator=generator)[:count]
    # Allocated once, because many small tensors would fragment the memory.
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
    """Labels (B, H, W) at the centers of grid cells, row-major indices int64 (n,) or (B, n): (B, n)."""
    (height, width), (rows, columns) = labels.shape[1:], grid
    y = cells // columns * height // rows + height // rows // 2
    x = cells % columns * width // columns + width // columns // 2
    return labels[torch.arange(len(labels))[:, None], y, x]


def multinomial_regression(
    points: Tensor, labels: Tensor, n_classes: int, C: float = 1.0, like: Tensor | None = None, balance: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression on points (M, C) and labels (M,): weight (n_classes, C) and bias (n_classes,).

    Negative labels are ignored; a class that does not occur is never predicted. Standardized channels need several
    times fewer iterations. The fit stops at a gradient of 1e-4; at 1e-2 it is not converged (8 mIoU lower on CamVid's
    features). C: inverse regularization, as in scikit-learn. like: points (N, C) that define the standardization, if M
    is small. balance: a class with n labels has the total weight n ** (1 - balance), up to a common factor: 0 for equal
    weights of all labels, 1 for equal weights of all classes.
    """
    known = labels >= 0
    cells, ids = points[known].numpy(), labels[known].numpy()
    weight, bias = torch.zeros(n_classes, cells.shape[1]), torch.full((n_classes,), -1e4)
    if len(np.unique(ids)) < 2:  # scikit-learn needs two classes
        bias[ids[:1]] = 0
        return weight, bias
    scaler = StandardScaler().fit(cells if like is None else like.numpy())
    weights = np.bincount(ids)[ids] ** -float(balance)
    fitted = LogisticRegression(C=C, tol=1e-4, max_iter=2000).fit(
        scaler.transform(cells), ids, sample_weight=weights / weights.mean()
    )
    coefficients = fitted.coef_ / scaler.scale_
    offsets = fitted.intercept_ - coefficients @ scaler.mean_
    if len(fitted.classes_) == 2:  # scikit-learn returns one logit, the difference of two
        coefficients, offsets = (np.concatenate([-row / 2, row / 2]) for row in (coefficients, offsets))
    weight[fitted.classes_] = torch.from_numpy(coefficients).float()
    bias[fitted.classes_] = torch.from_numpy(offsets).float()
    return weight, bias


def kmeans(points: Tensor, n_clusters: int, seed: int) -> Tensor:
    """Cluster centers of k-means on points (M, C): float32 (n_clusters, C)."""
    fitted = KMeans(n_clusters, n_init=RESTARTS, random_state=seed).fit(points.cpu().numpy())
    return torch.from_numpy(fitted.cluster_centers_).float()
