"""Features averaged over the positions of each image, read in parts: of ten million images they take 15 GB."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .arrays import read_rows

if TYPE_CHECKING:
    from .store import Features

PART = 65_536
"""Images whose pooled features are in memory at once."""


class Rows(Protocol):
    """Features of N images, float (N, C): a tensor, or what reads a part of them from a file when it is asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice | Tensor, /) -> Tensor: ...


class Pooled:
    """The pooled features of all images minus `mean`, (C,), as `Rows`."""

    def __init__(self, features: "Features", mean: Tensor):
        self.features, self.mean = features, mean

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return self.features.pooled_rows(rows) - self.mean


def read_pooled(folder: Path, rows: slice | Tensor) -> Tensor:
    """Rows of the pooled features in the folder of a store, float32 (n, C)."""
    return torch.from_numpy(read_rows(folder / "pooled.npy", rows if isinstance(rows, slice) else rows.tolist()))
