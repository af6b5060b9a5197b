"""Nearest neighbors of images (paper, section 3.3: the kNN partner)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .utils.errors import StegoError
from .utils.progress import progress


def nearest_neighbors(
    global_features: Tensor, k: int, chunk: int = 4096, device: torch.device | str | None = None
) -> Tensor:
    """The `k` nearest neighbors of each image by cosine similarity, nearest first, without the image itself.

    Compares all pairs, in blocks of `chunk` x `chunk` images; time grows with N squared.

    Parameters
    ----------
    global_features
        (N, C), features averaged over positions.
    k
        Number of neighbors, less than N.
    chunk
        Images per block.
    device
        Device of the computation; that of the features by default.

    Returns
    -------
    Tensor
        int64 (N, k), on the device of the features.

    Examples
    --------
    >>> nearest_neighbors(torch.rand(100, 384), 7).shape
    torch.Size([100, 7])
    """
    count = len(global_features)
    if k < 1 or k >= count:
        raise StegoError(f"neighbors={k} is impossible for {count} images. Choose from 1 to {count - 1}.")
    blocks = F.normalize(global_features.float(), dim=1).split(chunk)
    device = device or global_features.device
    neighbors = [_nearest(blocks, number, k, device) for number in progress(range(len(blocks)), "nearest neighbors")]
    return torch.cat(neighbors).to(global_features.device)


def _nearest(blocks: tuple[Tensor, ...], number: int, k: int, device: torch.device | str) -> Tensor:
    """Neighbors of the images of one block, int64 (n, k)."""
    rows, first = blocks[number].to(device), 0
    best, index = rows.new_empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.int64, device=device)
    for other, block in enumerate(blocks):
        similar = rows @ block.to(device).T
        if other == number:
            similar.fill_diagonal_(-torch.inf)
        values, columns = similar.topk(min(k, len(block)), dim=1)
        best, index = torch.cat([best, values], 1), torch.cat([index, columns + first], 1)
        best, kept = best.topk(min(k, best.shape[1]), dim=1)
        index = index.gather(1, kept)
        first += len(block)
    return index
