"""Approximate nearest neighbors by faiss, for more images than pairs can be compared."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .features.pooled import Rows
from .neighbors import nearest_neighbors, unit_rows
from .utils.notices import notice
from .utils.progress import progress, stage

EXACT = 600_000
"""Images up to which every pair is compared: about an hour on two cores (chapter on speed)."""
COMPONENTS = 64
"""Principal components that the index holds of a feature, a byte each."""
PROBED = 64
"""Cells of the index that are searched."""
CANDIDATES = 4
"""For each neighbor, so many images that the index finds are compared by their cosines."""
BLOCK, SEARCHED = 4096, 1024
"""Images that are read, and that are searched where 7 neighbors are asked for, at once; what the latter find is read, too."""


def find_nearest(features: Rows, k: int) -> Tensor:
    """`nearest_neighbors` of up to `EXACT` images, and `approximate_neighbors` of more where faiss is installed.

    A notice says which, if there are more.
    """
    count = len(features)
    if count > EXACT:
        hours = (count / EXACT) ** 2
        if _faiss():
            notice(
                f"the neighbors of {count:,} images are approximate (faiss): exact ones would take {hours:.0f} times as long as those of {EXACT:,}, about an hour on two cores"
            )
            return approximate_neighbors(features, k)
        notice(
            f"all pairs of {count:,} images are compared, {hours:.0f} times as many as of {EXACT:,}, which take about an hour on two cores: pip install 'stego_lib[neighbors]' finds approximate ones, of a million images in a few minutes"
        )
    return nearest_neighbors(features, k)


def approximate_neighbors(features: Rows, k: int) -> Tensor:
    """The `k` nearest neighbors by cosine among those that an index finds, nearest first: int64 (N, k).

    The index (inverted lists, Jégou et al. 2011) holds `COMPONENTS` bytes an image; what it finds is put in order by the exact
    cosines of the features, which are read a block at a time. The result is the same on every call. k is below N.
    """
    faiss = _faiss()
    count, channels = len(features), features[:1].shape[1]
    cells = max(1, min(round(4 * count**0.5), count // 40))
    index = faiss.index_factory(channels, f"PCAR{min(COMPONENTS, channels)},IVF{cells},SQ8")
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: 40 * cells].sort().values
    sample = torch.empty(len(chosen), channels)  # filled in parts: a copy of it would be the largest thing in memory
    for part, rows in zip(sample.split(BLOCK), chosen.split(BLOCK), strict=True):
        part.copy_(F.normalize(features[rows].float(), dim=1))
    with stage("neighbors: training the index"):
        index.train(sample.numpy())
    del sample
    for start in progress(range(0, count, BLOCK), "neighbors: filling the index"):
        index.add(unit_rows(features, start, BLOCK).numpy())
    inverted = faiss.extract_index_ivf(index)
    found = torch.empty(count, k, dtype=torch.int64)
    searched = max(1, 8 * SEARCHED // (k + 1))
    for start in progress(range(0, count, searched), "neighbors: searching"):
        rows = unit_rows(features, start, searched)
        own = torch.arange(start, start + len(rows))[:, None]
        inverted.nprobe = min(PROBED, cells)
        candidates = torch.from_numpy(index.search(rows.numpy(), min(count, CANDIDATES * k + 1))[1])
        short = ((candidates >= 0) & (candidates != own)).sum(1) < k
        if short.any():  # the cells that were searched held too few
            inverted.nprobe = cells
            candidates[short] = torch.from_numpy(index.search(rows[short].numpy(), candidates.shape[1])[1])
        there, place = candidates.clamp(min=0).unique(return_inverse=True)
        cosines = torch.einsum("nc,nmc->nm", rows, F.normalize(features[there].float(), dim=1)[place])
        cosines[(candidates < 0) | (candidates == own)] = -torch.inf
        found[start : start + len(rows)] = candidates.gather(1, cosines.topk(k).indices)
    return found


def _faiss() -> Any:
    """faiss, or None where it is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss
