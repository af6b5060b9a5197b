"""What both probes say of every pixel, from codes on the grid."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone import interpolation, upsample
from .model import ALPHA, Stego


def probe_scores(model: Stego, code: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """Scores (B, n, H, W) of "cluster" and "linear", from codes (B, K, h, w): the highest is a pixel's cluster or class.

    The published code upsamples the code and probes then. Both scores are linear in the code, and upsampling is too, so they
    are formed on the grid and upsampled instead: the same values, with n channels in place of K to bring to full size.
    The cluster scores are cosines times the length of the upsampled code.
    """
    return {
        "cluster": upsample(model.cluster_probe.similarity(code), size),
        "linear": upsample(model.linear_probe(code), size),
    }


def probe_maps(model: Stego, code: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """Log-probabilities (B, n, H, W) of both probes, as if codes (B, K, h, w) had been upsampled first and probed then."""
    return {name: logits.log_softmax(1) for name, logits in crf_logits(model, code, size).items()}


def crf_logits(model: Stego, code: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """The log-probabilities of `probe_maps` up to a constant at each pixel, which is all that the CRF needs."""
    scores = probe_scores(model, code, size)
    return {"cluster": ALPHA * scores["cluster"] / upsampled_length(code, size), "linear": scores["linear"]}


def upsampled_length(code: Tensor, size: tuple[int, int]) -> Tensor:
    """Length of the upsampled code at every pixel, (B, 1, H, W), at most a small part of it being upsampled.

    Between two codes a and b, at the fraction t, `|(1 - t) a + t b|^2 = (1 - t) |a|^2 + t |b|^2 - t (1 - t) |a - b|^2`.
    So the codes are widened alone, and the lengths of their rows and of the steps between rows give the rest.
    """
    height, width = size
    wide = upsample(code, (code.shape[2], width))
    squares = wide.square().sum(1, keepdim=True)
    steps = F.pad((wide[:, :, 1:] - wide[:, :, :-1]).square().sum(1, keepdim=True), (0, 0, 0, 1))
    rows = torch.arange(height, dtype=code.dtype, device=code.device)
    place = ((rows + 0.5) * code.shape[2] / height - 0.5).clamp(min=0)  # as `upsample` places them
    first = place.long().clamp(max=code.shape[2] - 1)
    t = (place - first).clamp(max=1)[:, None]
    squared = upsample(squares, size) - t * (1 - t) * steps[:, :, first]
    return squared.clamp(min=0).sqrt().clamp(min=1e-12)


BLOCK = 256
"""Pixels a side of the blocks in which `most_similar` works."""


def most_similar(maps: Tensor, size: tuple[int, int], ids: np.ndarray) -> np.ndarray:
    """Labels every pixel by the map that is largest there, once the maps are brought to full size.

    The same as `ids[upsample(maps[None], size)[0].argmax(0)]`, block by block, so that beside the result a few megabytes are
    enough for an image of any size. Upsampling mixes a block's own cells, so a map that nowhere in them reaches
    what another has everywhere is left out; where cells are large, few are in question.

    Parameters
    ----------
    maps
        Similarities on the grid, (n, h, w).
    size
        Height and width of the image in pixels.
    ids
        What each map is called, uint8 (n,).

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
    """Of some pixels' weights of all cells, (pixels, cells), those that are not zero, and which cells these are."""
    cells = torch.nonzero(weights.any(0)).flatten()
    used = slice(int(cells[0]), int(cells[-1]) + 1)
    return weights[:, used], used
