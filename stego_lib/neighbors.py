"""Nearest neighbours of whole pictures (paper, section 3.3: the kNN partner)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import StegoError


def nearest_neighbors(global_features: Tensor, k: int, chunk: int = 4096) -> Tensor:
    """The `k` pictures most like each picture by cosine, the most like first, the picture itself left out.

    global_features: (N, C), one row a picture (its features averaged over positions). Returns int64 (N, k).
    Exact; at most `chunk` x N similarities are in memory at a time.
    Raises StegoError when there are fewer than k + 1 pictures.
    """
    count = len(global_features)
    if k < 1 or k >= count:
        raise StegoError(
            f"{k} neighbours were asked for, but there are {count} pictures: neighbors must be 1 to {count - 1}"
        )
    unit = F.normalize(global_features.float(), dim=1)
    found = []
    for rows in torch.arange(count, device=unit.device).split(chunk):
        similar = unit[rows] @ unit.T
        similar[torch.arange(len(rows), device=unit.device), rows] = -torch.inf
        found.append(similar.topk(k, dim=1).indices)
    return torch.cat(found)


def shared_content(shares: Tensor, partners: Tensor) -> Tensor:
    """How much of what each picture shows its partners show too, in [0, 1]: float32 (N, k). It needs labels.

    shares: (N, n_classes), the part of each picture's pixels in each class; partners: int64 (N, k). The value is
    the sum over classes of the smaller of both parts: 1 for the same shares, 0 for no class in common.
    """
    return torch.minimum(shares[:, None], shares[partners]).sum(2)
