"""Probes fitted to the trained codes, and what they predict at every pixel.

Their gradients never reach the head, so nothing is lost by fitting them after training.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from .features import Features
from .loss import interpolation, upsample
from .model import ALPHA, Stego
from .utils.progress import progress, stage

SAMPLES = 40_000
"""Points that clusters are fitted on."""
RESTARTS = 10
"""Starts of k-means; the one with the smallest inertia, its own objective, is kept."""
BLOCK = 256
"""Pixels per side of the blocks in which `most_similar` works."""


@torch.no_grad()
def fit_probes(model: Stego, store: Features, seed: int, *, clusters: bool = True, linear: bool = True) -> None:
    """Fits the cluster probe, and with labels the linear probe, to codes of random grid cells; or one of both.

    The cluster probe gets the centers of k-means on L2-normalized codes, without labels; the linear probe gets multinomial
    regression on the labels at the centers of the cells.
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
def sample_codes(model: Stego, store: Features, seed: int) -> tuple[Tensor, Tensor | None]:
    """Codes of random grid cells, float32 (M, K), and the labels at their centers, see `sample_cells`."""
    model.eval()
    device = model.feature_mean.device
    return sample_cells(store, seed, lambda rows: model(store.rows(rows, device)), model.head.code_dim, SAMPLES)


def sample_cells(
    store: Features, seed: int, maps: Callable[[Tensor], Tensor], channels: int, count: int
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
        float32 (M, channels), and the labels at the centers of the cells, int64 (M,) with -1 = ignored, or None without labels.
    """
    images, _, height, width = store.shape
    generator = torch.Generator().manual_seed(seed)
    cells = max(1, min(height * width, count // images))
    asked = torch.randperm(images, generator=generator)[:count]
    # Allocated once: small tensors that stay between large ones that go would fragment the memory.
    found = torch.empty(len(asked), cells, channels)
    labels = torch.empty(len(asked), cells, dtype=torch.int64) if store.has_labels else None
    for positions in progress(torch.arange(len(asked)).split(32), "sampling grid cells"):
        rows = asked[positions]
        values = maps(rows).flatten(2).transpose(1, 2)
        chosen = torch.stack([torch.randperm(height * width, generator=generator)[:cells] for _ in rows])
        found[positions] = values.gather(1, chosen.to(values.device)[..., None].expand(-1, -1, channels)).cpu()
        if labels is not None:
            labels[positions] = labels_at(store.label_rows(rows), chosen, (height, width))
    return found.flatten(0, 1), None if labels is None else labels.flatten()


def labels_at(labels: Tensor, cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """Labels (B, H, W) at the centers of grid cells, int64 (n,) or (B, n) in row-major order -> (B, n)."""
    (height, width), (rows, columns) = labels.shape[1:], grid
    y = cells // columns * height // rows + height // rows // 2
    x = cells % columns * width // columns + width // columns // 2
    return labels[torch.arange(len(labels))[:, None], y, x]


def multinomial_regression(points: Tensor, labels: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """Weight (n_classes, C) and bias (n_classes,) of multinomial logistic regression on points (M, C) and labels (M,).

    Labels below zero are left out; a class that does not occur is never predicted. Channels are standardized for the fit,
    which otherwise takes several times as many iterations. It stops at a gradient of 1e-4: at 1e-2 the probe measures the
    optimizer rather than the points (8 mIoU lower on CamVid's features).
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
        # A sigmoid of one logit is the softmax of two logits with that difference.
        coefficients, offsets = (np.concatenate([-one / 2, one / 2]) for one in (coefficients, offsets))
    weight[fitted.classes_] = torch.from_numpy(coefficients).float()
    bias[fitted.classes_] = torch.from_numpy(offsets).float()
    return weight, bias


def kmeans(points: Tensor, n_clusters: int, seed: int) -> Tensor:
    """k-means on points (M, C): cluster centers, float32 (n_clusters, C)."""
    fitted = KMeans(n_clusters, n_init=RESTARTS, random_state=seed).fit(points.cpu().numpy())
    return torch.from_numpy(fitted.cluster_centers_).float()


def probe_scores(model: Stego, code: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """Scores (B, n, H, W) of "cluster" and "linear" from codes (B, K, h, w); the largest is a pixel's cluster or class.

    The published code upsamples the code before it probes. Scores and upsampling are linear, so here scores on the grid are
    upsampled: the same values, with n channels in place of K. Cluster scores are cosines times the length of the upsampled
    code.
    """
    return {
        "cluster": upsample(model.cluster_probe.similarity(code), size),
        "linear": upsample(model.linear_probe(code), size),
    }


def probe_maps(model: Stego, code: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """Log-probabilities (B, n, H, W) of both probes on upsampled codes, from codes (B, K, h, w)."""
    return {name: logits.log_softmax(1) for name, logits in crf_logits(model, code, size).items()}


def crf_logits(model: Stego, code: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """The log-probabilities of `probe_maps` up to a constant at each pixel, for the CRF."""
    scores = probe_scores(model, code, size)
    return {"cluster": ALPHA * scores["cluster"] / upsampled_length(code, size), "linear": scores["linear"]}


def upsampled_length(code: Tensor, size: tuple[int, int]) -> Tensor:
    """Length of the upsampled code at every pixel, (B, 1, H, W), without upsampling it in both directions.

    Between codes a and b, at the fraction t, `|(1 - t) a + t b|^2 = (1 - t) |a|^2 + t |b|^2 - t (1 - t) |a - b|^2`: the codes
    are upsampled along their rows, and the lengths of rows and of steps between rows give the rest.
    """
    height, width = size
    wide = upsample(code, (code.shape[2], width))
    squares = wide.square().sum(1, keepdim=True)
    steps = F.pad((wide[:, :, 1:] - wide[:, :, :-1]).square().sum(1, keepdim=True), (0, 0, 0, 1))
    rows = torch.arange(height, dtype=code.dtype, device=code.device)
    position = ((rows + 0.5) * code.shape[2] / height - 0.5).clamp(min=0)  # as in `upsample`
    first = position.long().clamp(max=code.shape[2] - 1)
    t = (position - first).clamp(max=1)[:, None]
    squared = upsample(squares, size) - t * (1 - t) * steps[:, :, first]
    return squared.clamp(min=0).sqrt().clamp(min=1e-12)


def most_similar(maps: Tensor, size: tuple[int, int], ids: np.ndarray) -> np.ndarray:
    """The map that is largest at each pixel after upsampling: `ids[upsample(maps[None], size)[0].argmax(0)]`.

    Computed block by block, so a few megabytes are enough for an image of any size. A map whose largest value among the cells
    of a block is below another's smallest cannot win there, and is skipped.

    Parameters
    ----------
    maps
        Similarities on the grid, (n, h, w).
    size
        Height and width of the image in pixels.
    ids
        The id of each map, uint8 (n,).

    Returns
    -------
    numpy.ndarray
        uint8 (H, W).
    """
    maps = maps.float().cpu()
    found = np.empty(size, np.uint8)
    rows, columns = (interpolation(cells, pixels) for cells, pixels in zip(maps.shape[-2:], size, strict=True))
    for top in range(0, size[0], BLOCK):
        vertical, of_rows = _used(rows[top : top + BLOCK])
        for left in range(0, size[1], BLOCK):
            horizontal, of_columns = _used(columns[left : left + BLOCK])
            cells = maps[:, of_rows, of_columns]
            chosen = torch.nonzero(cells.amax((1, 2)) >= cells.amin((1, 2)).max()).flatten()
            block = (vertical @ (cells[chosen] @ horizontal.T)).max(0).indices  # twice as fast as argmax
            found[top : top + BLOCK, left : left + BLOCK] = ids[chosen[block].numpy()]
    return found


def _used(weights: Tensor) -> tuple[Tensor, slice]:
    """Of the weights of all cells in some pixels, (pixels, cells), those of cells with a weight, and which cells these are."""
    cells = torch.nonzero(weights.any(0)).flatten()
    used = slice(int(cells[0]), int(cells[-1]) + 1)
    return weights[:, used], used
