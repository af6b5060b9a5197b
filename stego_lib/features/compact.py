"""A compact store: features on a few principal components, 8 bits a number."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.files import atomic, locked
from ..utils.notices import notice
from ..utils.progress import progress, say
from .arrays import read_rows
from .extraction import ensure
from .online import OnlineFeatures
from .source import Shapes, Source
from .store import GPU_SHARE

ERROR = 0.004
"""Mean error of a feature correspondence up to which components are left out. With it, cluster mIoU changed by
0.1 or less on scenes and CamVid (three seeds, chapter on speed)."""
MOST = 3
"""At least one component in so many channels is left out, so a compact store takes at most a sixth of a full one's features."""
SAMPLE, CELLS = 256, 160
"""Images, and grid cells of each, that the components are fitted to."""
LEVELS = 127
"""Largest 8-bit number, with a sign."""


@dataclass(frozen=True)
class Components:
    """Principal components: features are about mean + code @ basis. mean (C,), basis (P, C), error: that of a correspondence."""

    mean: Tensor
    basis: Tensor
    error: float

    def encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """float (B, C, h, w) -> codes, int8 (B, P, h, w), and the size of their unit in each map, float32 (B, P)."""
        codes = torch.einsum("pc,bchw->bphw", self.basis.to(features), features - self.mean.to(features)[:, None, None])
        unit = codes.abs().amax((2, 3)).clamp(min=torch.finfo(codes.dtype).tiny) / LEVELS
        return (codes / unit[..., None, None]).round().to(torch.int8), unit

    def decode(self, codes: Tensor, unit: Tensor) -> Tensor:
        """The way back, float32 (B, C, h, w) in channels-last order."""
        scaled = self.basis.to(unit) * unit[:, :, None]  # (B, P, C): scales the few weights in place of the many codes
        found = torch.baddbmm(self.mean.to(unit), codes.flatten(2).float().transpose(1, 2), scaled)
        return found.unflatten(1, codes.shape[2:]).movedim(-1, 1)


def fit_components(sample: Tensor) -> Components:
    """As few components as keep the mean error of the correspondences of a sample below `ERROR`, at most C / `MOST`.

    sample: features (B, C, h, w) of some images. The error is that of encoded and decoded features, measured on pairs of cells
    of all images.
    """
    channels, generator = sample.shape[1], torch.Generator().manual_seed(0)
    cells = min(sample[0, 0].numel(), CELLS)
    chosen = torch.stack([torch.randperm(sample[0, 0].numel(), generator=generator)[:cells] for _ in sample])
    maps = sample.flatten(2).gather(2, chosen[:, None].expand(-1, channels, -1)).unsqueeze(3)  # (B, C, cells, 1)
    points = maps.movedim(1, -1).flatten(0, 2).double()
    mean = points.mean(0)
    basis = torch.linalg.eigh((points - mean).T @ (points - mean)).eigenvectors.flip(1).T.float()
    every = max(1, len(maps) * cells // 2000)  # about 2000 cells are compared, so 2 million pairs

    def measured(parts: int) -> Components:
        found = Components(mean.float(), basis[:parts], 0.0)
        decoded = found.decode(*found.encode(maps))
        return replace(found, error=correspondence_error(maps[:, :, ::every], decoded[:, :, ::every]))

    low, high = 1, max(1, channels // MOST)
    while low < high:  # the error falls with every component
        middle = (low + high) // 2
        low, high = (low, middle) if measured(middle).error <= ERROR else (middle + 1, high)
    return measured(low)


def correspondence_error(features: Tensor, others: Tensor) -> float:
    """Mean absolute difference of the cosines of all pairs of cells, of features (B, C, h, w) and of what stands for them."""
    tables = [(unit := F.normalize(maps.movedim(1, -1).flatten(0, 2), dim=1)) @ unit.T for maps in (features, others)]
    return float((tables[0] - tables[1]).abs().mean())


@dataclass(frozen=True, eq=False)
class CompactSource(Source):
    """A `Source` of components. Images and label maps are not stored: they are read from their files."""

    components: Components = None  # type: ignore[assignment]  # fields of a base class with defaults stand before it

    @classmethod
    def of(cls, source: Source, root: Path) -> "CompactSource":
        """With components fitted to the source's own images, once: they are kept below `root`."""
        own = {name: getattr(source, name) for name in ("dataset", "backbone", "size", "mirror", "published")}
        path = _components_file(source, root)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(
            path.with_suffix(".lock"), f"another process fits the components of {source}; waiting for it", wait=True
        ):
            if not path.exists():
                found = fit_components(_sample(source))
                with atomic(path) as temporary, open(temporary, "wb") as file:
                    np.savez(file, mean=found.mean, basis=found.basis, error=found.error)
        with np.load(path) as file:
            components = Components(
                torch.from_numpy(file["mean"]), torch.from_numpy(file["basis"]), float(file["error"])
            )
        return cls(**own, components=components)

    def folder(self, root: Path) -> Path:
        """Where the store lies below `root`, whether it exists or not."""
        return root / f"{self.dataset.name}-{self.dataset.split}-compact-{self.fingerprint(root)}"

    @property
    def shapes(self) -> Shapes:
        """Type and shape of each array: features (codes), units and pooled."""
        full = super().shapes
        _, (count, _, *grid) = full["features"]
        parts = len(self.components.basis)
        return {
            "features": (np.int8, (count, parts, *grid)),
            "units": (np.float32, (count, parts)),
            "pooled": full["pooled"],
        }

    def stored(self, features: Tensor) -> dict[str, Tensor]:
        """What the store keeps of features (B, C, h, w), by name of its array."""
        codes, units = self.components.encode(features)
        return {"features": codes, "units": units}

    def fingerprint(self, root: str | Path, *more: object) -> str:
        """That of `Source`, and of the components."""
        return super().fingerprint(root, "compact", self.components.mean, self.components.basis, *more)


def _components_file(source: Source, root: Path) -> Path:
    return root / ".components" / f"{source.fingerprint(root, ERROR, MOST, SAMPLE, CELLS)}.npz"


def compact_exists(source: Source, root: Path) -> bool:
    """Whether there is a compact store of `source` below `root`; nothing is computed."""
    return _components_file(source, root).exists() and CompactSource.of(source, root).folder(root).exists()


def _sample(source: Source) -> Tensor:
    """Features of random images, (B, C, h, w)."""
    rows = torch.randperm(len(source.dataset), generator=torch.Generator().manual_seed(0))[:SAMPLE].sort().values
    found = []
    for some in progress(rows.split(16), f"fitting the components of {source}"):
        found.append(source.features(torch.stack([source.image(row) for row in some.tolist()]), some.tolist()).cpu())
    return torch.cat(found)


class CompactFeatures(OnlineFeatures):
    """Features from a compact store; images and label maps are read from their files, in threads."""

    kind: Literal["full", "compact", "online"] = "compact"

    def __init__(self, source: Source, root: Path):
        super().__init__(source, root)
        compact = CompactSource.of(source, root)
        self.components = compact.components
        folder = compact.folder(root)
        parts, channels = self.components.basis.shape
        if not folder.exists():
            error = f"mean error of a correspondence {self.components.error:.4f}"
            say(f"compact features of {source}: {parts} of {channels} components in 8 bits, {error}")
            if self.components.error > ERROR:
                notice(
                    f"the features of {source} need more than {parts} components: {error}; feature_store='store' has none"
                )
        self.folder = ensure(compact, folder, compact.shapes)
        self._resident: tuple[Tensor, Tensor] | None = None

    @property
    def pooled_folder(self) -> Path:  # type: ignore[override]
        """The store's own: features were averaged before they were compressed."""
        return self.folder

    def rows(self, index: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Features of the images `index`, float32 (B, C, h, w), on `device`, as the components give them."""
        if self._resident is not None and self._resident[0].device == torch.device(device):
            return self.components.decode(*(array[index.to(device)] for array in self._resident))
        codes, units = (self._read(name, index).to(device) for name in ("features", "units"))
        return self.components.decode(codes, units)

    def prefetch(self, index: Tensor) -> None:
        """Rows are read when they are asked for, images and labels when they are: few steps need them."""

    def keep_on(self, device: torch.device, free: int | None = None) -> bool:
        """Copies the codes to a GPU with room for them; says whether it did. free: as in `FeatureStore.keep_on`."""
        if free is None:
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        if (self.folder / "features.npy").stat().st_size > GPU_SHARE * free:
            return False
        everything = torch.arange(len(self))
        try:
            self._resident = self._read("features", everything).to(device), self._read("units", everything).to(device)
        except torch.OutOfMemoryError:  # others use the GPU too
            return False
        return True

    def _read(self, name: str, index: Tensor) -> Tensor:
        return torch.from_numpy(read_rows(self.folder / f"{name}.npy", index.tolist()))
