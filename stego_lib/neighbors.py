"""Nearest neighbors of images (paper, section 3.3: the kNN partner)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .features.pooled import Rows
from .utils.errors import StegoError
from .utils.progress import progress


def nearest_neighbors(global_features: Rows, k: int, chunk: int = 4096) -> Tensor:
    """The `k` nearest neighbors of each image by cosine, nearest first, without the image itself.

    Exact: every pair is compared, in blocks of `chunk` x `chunk` images. Beside features and result, memory holds about two
    blocks: 8 chunk (chunk + C + 4 k) bytes, 0.2 GB. Time grows with N squared; `optional.approximate` serves more images.

    Parameters
    ----------
    global_features
        (N, C), features of each image averaged over positions, on any device.
    k
        Neighbors of each image.
    chunk
        Images per block.

    Returns
    -------
    Tensor
        int64 (N, k), on the same device.

    Raises
    ------
    StegoError
        For fewer than k + 1 images.

    Examples
    --------
    >>> nearest_neighbors(torch.rand(100, 384), 7).shape
    torch.Size([100, 7])
    """
    count = len(global_features)
    if k < 1 or k >= count:
        raise StegoError(
            f"{k} neighbors were asked for, but there are {count} images: neighbors must be 1 to {count - 1}"
        )
    return torch.cat(
        [_nearest(global_features, start, k, chunk) for start in progress(range(0, count, chunk), "nearest neighbors")]
    )


def _nearest(features: Rows, start: int, k: int, chunk: int) -> Tensor:
    """Neighbors of the rows from `start` to `start + chunk`, int64 (at most chunk, k)."""
    rows = unit_rows(features, start, chunk)
    best, index = rows.new_empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
    for first in range(0, len(features), chunk):
        similar = rows @ unit_rows(features, first, chunk).T
        if first == start:
            similar.fill_diagonal_(-torch.inf)
        values, columns = similar.topk(min(k, similar.shape[1]), dim=1)
        best, index = torch.cat([best, values], 1), torch.cat([index, columns + first], 1)
        best, kept = best.topk(min(k, best.shape[1]), dim=1)
        index = index.gather(1, kept)
    return index


def unit_rows(features: Rows, start: int, count: int) -> Tensor:
    """Features of at most `count` images from `start` on, each divided by its length: float32 (n, C)."""
    return F.normalize(features[start : start + count].float(), dim=1)


def shared_content(shares: Tensor, partners: Tensor) -> Tensor:
    """Content that each image shares with its partners, in [0, 1]: float32 (N, k). Needs labels.

    The sum over classes of the smaller of both shares of pixels: 1 for equal shares, 0 for no class in common.
    shares: (N, n_classes). partners: int64 (N, k).
    """
    return torch.minimum(shares[:, None], shares[partners]).sum(2)
