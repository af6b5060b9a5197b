"""A compact store: principal components of the features in 8 bits."""

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.files import atomic
from ..utils.notices import notice
from ..utils.progress import progress, say
from .online import OnlineFeatures
from .store import Arrays, Store

# Largest mean error of a feature correspondence. It changed cluster mIoU by at most 0.1 on scenes and CamVid (three
# seeds, chapter on speed).
MAX_ERROR = 0.004
# Largest share of the components that is kept. A third needs a sixth of the bytes of the full features.
MAX_SHARE = 1 / 3
# Number of images, and of grid cells in each, for fitting the components.
SAMPLE, CELLS = 256, 160
# Number of cells whose pairs measure the error.
COMPARED = 2000


@dataclass(frozen=True)
class Components:
    """Mean (C,) and principal components (P, C): features are approximately mean + code @ basis.

    error: mean error of a correspondence.
    """

    mean: Tensor
    basis: Tensor
    error: float = 0.0

    def encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, C, h, w) -> codes, int8 (B, P, h, w), and the quantization step of each map, float32 (B, P)."""
        codes = torch.einsum("pc,bchw->bphw", self.basis.to(features), features - self.mean.to(features)[:, None, None])
        unit = codes.abs().amax((2, 3)).clamp(min=torch.finfo(codes.dtype).tiny) / 127
        return (codes / unit[..., None, None]).round().to(torch.int8), unit

    def decode(self, codes: Tensor, unit: Tensor) -> Tensor:
        """Codes and quantization steps -> features, float32 (B, C, h, w) in channels-last order."""
        scaled = self.basis.to(unit) * unit[:, :, None]  # (B, P, C), smaller than the codes
        features = torch.baddbmm(self.mean.to(unit), codes.flatten(2).float().transpose(1, 2), scaled)
        return features.unflatten(1, codes.shape[2:]).movedim(-1, 1)


def fit_components(sample: Tensor) -> Components:
    """The fewest components, up to `MAX_SHARE`, with a mean error of correspondences of at most `MAX_ERROR`.

    sample: features (B, C, h, w) of some images.
    """
    cells = torch.randperm(sample[0, 0].numel(), generator=torch.Generator().manual_seed(0))[:CELLS]
    maps = sample.flatten(2)[:, :, cells, None]
    points = maps.movedim(1, -1).flatten(0, 2).double()
    mean, step = points.mean(0), max(1, len(points) // COMPARED)
    basis = torch.linalg.eigh((points - mean).T @ (points - mean)).eigenvectors.flip(1).T.float()

    def measure(count: int) -> Components:
        components = Components(mean.float(), basis[:count])
        decoded = components.decode(*components.encode(maps))
        return replace(components, error=correspondence_error(maps[:, :, ::step], decoded[:, :, ::step]))

    most = max(1, int(len(basis) * MAX_SHARE))
    # The error decreases with the number of components.
    return measure(1 + bisect_left(range(1, most), True, key=lambda count: measure(count).error <= MAX_ERROR))


def correspondence_error(features: Tensor, others: Tensor) -> float:
    """Mean absolute difference of the cosines of all pairs of cells, between two versions of features (B, C, h, w)."""
    units = [F.normalize(maps.movedim(1, -1).flatten(0, 2), dim=1) for maps in (features, others)]
    return float((units[0] @ units[0].T - units[1] @ units[1].T).abs().mean())


class CompactFeatures(OnlineFeatures):
    """Features from a compact store. Images and label maps are read from their files, in threads."""

    kind = "compact"
    resident = ("features", "units")

    @cached_property
    def store(self) -> Store:  # type: ignore[override]
        store = Store(self.source, self.root, "compact", MAX_ERROR, MAX_SHARE, SAMPLE, CELLS)
        path = store.folder / "components.npz"
        if not path.exists():
            self._fit(path)
        with np.load(path) as file:
            mean, basis = (torch.from_numpy(file[name]) for name in ("mean", "basis"))
            self.components = Components(mean, basis, float(file["error"]))
        count = len(self.components.basis)
        arrays: Arrays = {"features": (np.int8, (count, *self.shape[2:])), "units": (np.float32, (count,))}
        store.complete(arrays, lambda features, _: dict(zip(arrays, self.components.encode(features), strict=True)))
        return store

    def _fit(self, path: Path) -> None:
        """Fits the components of the store to some images."""
        rows = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:SAMPLE].sort().values
        batches = progress(rows.split(16), f"principal components of {self.name}")
        fitted = fit_components(torch.cat([super(CompactFeatures, self).rows(batch) for batch in batches]))
        error = f"mean error of a correspondence {fitted.error:.4f}"
        say(f"compact features of {self.name}: {len(fitted.basis)} of {self.shape[1]} components, {error}")
        if fitted.error > MAX_ERROR:
            notice(f"compact features of {self.name} are inexact ({error}). Use feature_store='full'.")
        if not path.exists():  # another process may have written it
            with atomic(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, mean=fitted.mean, basis=fitted.basis, error=fitted.error)

    def rows(self, index: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Decoded features of the images `index`, float32 (B, C, h, w), on `device`."""
        store = self.store  # first, because it opens the components
        return self.components.decode(*(store.read(name, index, device) for name in ("features", "units")))

    def prefetch(self, index: Tensor) -> None:
        """Does nothing, because features are stored."""

    def share(self) -> None:
        """Does nothing, because features are stored."""
