"""A compact store: principal components of the features in 8 bits."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.files import atomic
from ..utils.notices import notice
from ..utils.progress import progress, say
from .online import OnlineFeatures
from .store import Arrays, Source, Store

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
    (images, channels), cells = sample.shape[:2], min(sample[0, 0].numel(), CELLS)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(sample[0, 0].numel(), generator=generator)[:cells] for _ in range(images)])
    maps = sample.flatten(2).gather(2, chosen[:, None].expand(-1, channels, -1)).unsqueeze(3)  # (B, C, cells, 1)
    points = maps.movedim(1, -1).flatten(0, 2).double()
    mean = points.mean(0)
    basis = torch.linalg.eigh((points - mean).T @ (points - mean)).eigenvectors.flip(1).T.float()
    step = max(1, images * cells // COMPARED)

    def measure(count: int) -> Components:
        components = Components(mean.float(), basis[:count])
        decoded = components.decode(*components.encode(maps))
        error = correspondence_error(maps[:, :, ::step], decoded[:, :, ::step])
        return Components(components.mean, components.basis, error)

    low, high = 1, max(1, int(channels * MAX_SHARE))
    while low < high:  # bisection; the error decreases with the number of components
        middle = (low + high) // 2
        low, high = (low, middle) if measure(middle).error <= MAX_ERROR else (middle + 1, high)
    return measure(low)


def correspondence_error(features: Tensor, others: Tensor) -> float:
    """Mean absolute difference of the cosines of all pairs of cells, between two versions of features (B, C, h, w)."""
    units = [F.normalize(maps.movedim(1, -1).flatten(0, 2), dim=1) for maps in (features, others)]
    return float((units[0] @ units[0].T - units[1] @ units[1].T).abs().mean())


class CompactFeatures(OnlineFeatures):
    """Features from a compact store. Images and label maps are read from their files, in threads."""

    kind = "compact"

    def __init__(self, source: Source, root: Path):
        super().__init__(source, root)
        self.store  # noqa: B018

    def _open(self) -> Store:
        store = Store(self.source, self._root, "compact", MAX_ERROR, MAX_SHARE, SAMPLE, CELLS)
        self.components = self._components(store.folder / "components.npz")
        count = len(self.components.basis)
        arrays: Arrays = {"features": (np.int8, (count, *self.shape[2:])), "units": (np.float32, (count,))}
        store.complete(arrays, lambda features, _: dict(zip(arrays, self.components.encode(features), strict=True)))
        return store

    def _components(self, path: Path) -> Components:
        """Reads the components of the store, or fits them."""
        if not path.exists():
            for shard in path.parent.glob("shard-*"):  # cannot be decoded without their components
                shutil.rmtree(shard)
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
        with np.load(path) as file:
            return Components(torch.from_numpy(file["mean"]), torch.from_numpy(file["basis"]), float(file["error"]))

    def rows(self, index: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Decoded features of the images `index`, float32 (B, C, h, w), on `device`."""
        return self.components.decode(*(self.store.read(name, index, device) for name in ("features", "units")))

    def prefetch(self, index: Tensor) -> None:
        """Does nothing, because features are stored."""

    def shared(self) -> "CompactFeatures":
        return self

    def keep_on(self, device: torch.device, free: int | None = None) -> bool:
        return self.store.keep_on(device, ("features", "units"), free)
