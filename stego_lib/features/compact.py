"""A compact store: features on a few principal components, 8 bits a number."""

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

# Mean error of a feature correspondence up to which components are left out. With it, cluster mIoU changed by 0.1 or
# less on scenes and CamVid (three seeds, chapter on speed).
ERROR = 0.004
# At most a third of the components is kept, so that codes take at most a sixth of the features' bytes.
MAX_SHARE = 1 / 3
# Images, and grid cells of each, that the components are fitted to.
SAMPLE, CELLS = 256, 160
# Cells whose pairs are compared to measure the error.
COMPARED = 2000


@dataclass(frozen=True)
class Components:
    """Principal components, mean (C,) and basis (P, C): features are about mean + code @ basis.

    error: mean error of a correspondence.
    """

    mean: Tensor
    basis: Tensor
    error: float = 0.0

    def encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, C, h, w) -> codes, int8 (B, P, h, w), and the unit of each map of codes, float32 (B, P)."""
        codes = torch.einsum("pc,bchw->bphw", self.basis.to(features), features - self.mean.to(features)[:, None, None])
        unit = codes.abs().amax((2, 3)).clamp(min=torch.finfo(codes.dtype).tiny) / 127
        return (codes / unit[..., None, None]).round().to(torch.int8), unit

    def decode(self, codes: Tensor, unit: Tensor) -> Tensor:
        """Codes and units -> features, float32 (B, C, h, w) in channels-last order."""
        scaled = self.basis.to(unit) * unit[:, :, None]  # (B, P, C): scales the few weights in place of the many codes
        features = torch.baddbmm(self.mean.to(unit), codes.flatten(2).float().transpose(1, 2), scaled)
        return features.unflatten(1, codes.shape[2:]).movedim(-1, 1)


def fit_components(sample: Tensor) -> Components:
    """The fewest components that keep the mean error of correspondences at `ERROR`, but at most `MAX_SHARE` of them.

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
    while low < high:  # the error falls with every component
        middle = (low + high) // 2
        low, high = (low, middle) if measure(middle).error <= ERROR else (middle + 1, high)
    return measure(low)


def correspondence_error(features: Tensor, others: Tensor) -> float:
    """Mean absolute difference of the cosines of all pairs of cells of two sets of features (B, C, h, w)."""
    units = [F.normalize(maps.movedim(1, -1).flatten(0, 2), dim=1) for maps in (features, others)]
    return float((units[0] @ units[0].T - units[1] @ units[1].T).abs().mean())


class CompactFeatures(OnlineFeatures):
    """Features from a compact store; images and label maps are read from their files, in threads."""

    kind = "compact"

    def __init__(self, source: Source, root: Path, verify: bool = False):
        super().__init__(source, root, verify)
        self.store  # noqa: B018

    def _open(self) -> Store:
        store = Store(self.source, self._root, "compact", ERROR, MAX_SHARE, SAMPLE, CELLS)
        self.components = self._components(store.folder / "components.npz")
        count = len(self.components.basis)
        arrays: Arrays = {"features": (np.int8, (count, *self.shape[2:])), "units": (np.float32, (count,))}
        store.complete(
            arrays, lambda features, _: dict(zip(arrays, self.components.encode(features), strict=True)), self._verify
        )
        return store

    def _components(self, path: Path) -> Components:
        """The store's components, fitted now unless they are stored."""
        if not path.exists():
            for shard in path.parent.glob("shard-*"):  # of components that are lost
                shutil.rmtree(shard)
            rows = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:SAMPLE].sort().values
            bar = progress(rows.split(16), f"principal components of {self.name}")
            fitted = fit_components(torch.cat([super(CompactFeatures, self).rows(some) for some in bar]))
            error = f"mean error of a correspondence {fitted.error:.4f}"
            say(f"compact features of {self.name}: {len(fitted.basis)} of {self.shape[1]} components, {error}")
            if fitted.error > ERROR:
                notice(f"features of {self.name} need more components, {error}; feature_store='full' keeps all")
            if not path.exists():  # else another process was faster
                with atomic(path) as temporary, open(temporary, "wb") as file:
                    np.savez(file, mean=fitted.mean, basis=fitted.basis, error=fitted.error)
        with np.load(path) as file:
            return Components(torch.from_numpy(file["mean"]), torch.from_numpy(file["basis"]), float(file["error"]))

    def rows(self, index: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Features of the images `index`, float32 (B, C, h, w), on `device`, as the components give them."""
        return self.components.decode(*(self.store.read(name, index, device) for name in ("features", "units")))

    def prefetch(self, index: Tensor) -> None:
        """Stored rows need no preparation."""

    def shared(self) -> "CompactFeatures":
        return self

    def keep_on(self, device: torch.device, free: int | None = None) -> bool:
        return self.store.keep_on(device, ("features", "units"), free)
