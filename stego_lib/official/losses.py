"""Loss terms of the published code that the paper does not use: pure functions, off by default.

Two published options have no counterpart here: salience masks, whose mask files were not released, and the repulsion
term, of which the published code holds a weight alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..loss import sample

CRF_SIDE = 56
"""Pixels per side at which the CRF-inspired loss compares colors and codes."""
CRF_POINTS = 1000
"""Pixels of each image between which it is computed."""


def reconstruction_loss(feats: Tensor, rebuilt: Tensor) -> Tensor:
    """Negative mean cosine similarity of the frozen features and their reconstruction from the code, both (B, C, h, w)."""
    return -F.cosine_similarity(feats, rebuilt, dim=1, eps=1e-10).mean()


def crf_loss(
    guidance: Tensor,
    codes: Tensor,
    points: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.15,
    gamma: float = 0.05,
    w1: float = 10.0,
    w2: float = 3.0,
    shift: float = 0.0,
) -> Tensor:
    """Negative product of code similarity and CRF affinity for every pair of points, (B, n, n).

    guidance: colors (B, 3, H, W); codes: (B, K, H, W) of unit length; points: int64 (2, n), rows and columns, the same
    for each image. With d the squared distance in pixels and g that in color, the affinity is
    w1 exp(-d / 2 alpha - g / 2 beta) + w2 exp(-d / 2 gamma) - shift: the two kernels of a dense CRF.
    """
    rows, columns = points
    distance = (points[:, :, None] - points[:, None]).square().sum(0)
    colors, codes = guidance[:, :, rows, columns], codes[:, :, rows, columns]
    contrast = (colors[:, :, :, None] - colors[:, :, None]).square().sum(1)
    affinity = w1 * torch.exp(-distance / (2 * alpha) - contrast / (2 * beta)) + w2 * torch.exp(-distance / (2 * gamma))
    return -torch.einsum("bka,bkc->bac", codes, codes) * (affinity - shift)


def image_crf_loss(images: Tensor, code: Tensor, points: Tensor) -> Tensor:
    """Mean of `crf_loss` after both maps are resized to CRF_SIDE x CRF_SIDE pixels.

    images: normalized colors (B, 3, H, W); code: (B, K, h, w); points: int64 (2, n) in [0, CRF_SIDE).
    """
    colors, codes = (F.interpolate(maps, (CRF_SIDE, CRF_SIDE), mode="bilinear") for maps in (images, code))
    return crf_loss(colors, F.normalize(codes, dim=1, eps=1e-10), points).mean()


def random_pixels(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Rows and columns of random pixels of a square: int64 (2, count)."""
    return torch.randint(side, (2, count), generator=generator)


def alignment_loss(code: Tensor, code_view: Tensor, coords: Tensor, *, published: bool = False) -> Tensor:
    """Negative mean cosine similarity of the codes of an augmented view and the image's codes at the same positions.

    code, code_view: (B, K, h, w) of images and of their views; coords: (B, h, w, 2), where each cell of the view lies in
    the image, as `loss.sample` takes it. `published` repeats a defect: the lookup swaps the axes, so that a cell of the
    view is compared with the mirrored cell across the diagonal (square grids alone; ValueError for others).
    """
    if published and code.shape[2] != code.shape[3]:
        raise ValueError(
            f"the published alignment needs square grids, not {tuple(code.shape[2:])}; use published=False"
        )
    there = sample(code, coords)
    there = there if published else there.transpose(2, 3)
    return -F.cosine_similarity(there, code_view, dim=1, eps=1e-10).mean()
