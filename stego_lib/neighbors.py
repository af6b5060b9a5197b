"""Nearest neighbors of whole images (paper, section 3.3: the kNN partner)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .runtime.errors import StegoError
from .runtime.progress import progress


def nearest_neighbors(global_features: Tensor, k: int, chunk: int = 4096) -> Tensor:
    """The `k` images most like each image by cosine, the most like first, the image itself left out.

    global_features: (N, C), one row an image (its features averaged over positions), on any device. Returns int64
    (N, k) on that device. Exact: every pair is compared, a square of `chunk` x `chunk` images at a time, and each row
    keeps its best `k` so far. Beside the features and the result, memory holds one float32 copy of the features and
    about two such squares: 4 N C + 8 chunk (chunk + 4 k) bytes, 1.1 GB for 600,000 images of 384 channels. The time
    grows with N squared. Raises StegoError when there are fewer than k + 1 images.
    """
    count = len(global_features)
    if k < 1 or k >= count:
        raise StegoError(
            f"{k} neighbors were asked for, but there are {count} images: neighbors must be 1 to {count - 1}"
        )
    unit = F.normalize(global_features.float(), dim=1)
    return torch.cat([_nearest(unit, start, k, chunk) for start in progress(range(0, count, chunk), "nearest neighbors")])


def _nearest(unit: Tensor, start: int, k: int, chunk: int) -> Tensor:
    """The neighbors of the rows from `start` to `start + chunk`: int64 (at most chunk, k)."""
    rows = unit[start : start + chunk]
    best, index = rows.new_empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
    for first in range(0, len(unit), chunk):
        similar = rows @ unit[first : first + chunk].T
        if first == start:
            similar.fill_diagonal_(-torch.inf)
        values, columns = similar.topk(min(k, similar.shape[1]), dim=1)
        best, index = torch.cat([best, values], 1), torch.cat([index, columns + first], 1)
        best, kept = best.topk(min(k, best.shape[1]), dim=1)
        index = index.gather(1, kept)
    return index


def shared_content(shares: Tensor, partners: Tensor) -> Tensor:
    """How much of what each image shows its partners show too, in [0, 1]: float32 (N, k). It needs labels.

    shares: (N, n_classes), the part of each image's pixels in each class; partners: int64 (N, k). The value is
    the sum over classes of the smaller of both parts: 1 for the same shares, 0 for no class in common.
    """
    return torch.minimum(shares[:, None], shares[partners]).sum(2)
