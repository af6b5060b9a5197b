"""Base class of the successors' trainers, and functions that several of them use."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batches import Draw
from ..experiment import Experiment
from ..training import Trainer
from ..utils import devices
from ..utils.errors import StegoError
from ..utils.files import atomic, fingerprint


class Successor(Trainer):
    """A `Trainer` that minimizes a loss on images without partners."""

    # Clusters are only fitted after the last step, so weights of earlier steps cannot be evaluated.
    clusters_fitted_last = False
    # Attributes that a checkpoint holds: modules, tensors and numbers.
    stored: tuple[str, ...] = ()
    # Columns of log.csv in addition to "step" and "loss".
    logged: tuple[str, ...] = ()

    def columns(self) -> list[str]:
        return ["loss", *self.logged]

    @classmethod
    def check(cls, experiment: Experiment) -> None:
        """Raises StegoError for unsupported options."""
        unsupported = [] if experiment.probes == "after" else [f"probes={experiment.probes!r}"]
        unsupported += experiment.official.loss_weights
        if cls.clusters_fitted_last and experiment.official.keep_every:
            unsupported.append("keep_every")
        if unsupported:
            raise StegoError(
                f"method={experiment.method!r} does not support {', '.join(unsupported)}. "
                "Use probes='after' without the other options."
            )

    def state(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.stored}
        return {name: value.state_dict() if isinstance(value, nn.Module) else value for name, value in values.items()}

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            present = getattr(self, name, None)
            if isinstance(present, nn.Module):
                present.load_state_dict(value)
            elif isinstance(present, nn.Parameter):  # of the optimizer
                present.data.copy_(value)
            else:
                setattr(self, name, value.to(self.device) if isinstance(value, Tensor) else value)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.feature_mean.device

    def draw(self, number: int) -> tuple[Tensor, Tensor, torch.Generator]:
        """Images of a step, int64 (B,), their centered features (B, C, h, w), and a generator for other draws."""
        draw = Draw(self.neighbors, self.experiment, number)
        self.model.head.dropout.generator = torch.Generator(self.device).manual_seed(draw.seed)
        if number + 1 < self.experiment.steps:
            self.features.prefetch(Draw(self.neighbors, self.experiment, number + 1).rows)
        self.model.train()
        return draw.rows, self.model.centered(self.features.rows(draw.rows, self.device)), draw.generator

    def update(self, loss: Tensor, parts: Mapping[str, Tensor | float], clip: float | None = None) -> dict[str, float]:
        """One optimizer step; `clip` limits the gradient's norm. Returns the loss and its parts."""
        self.optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], clip)
        self.optimizer.step()
        return {"loss": float(loss.detach())} | {name: float(value) for name, value in parts.items()}

    def cached(self, compute: Callable[[], np.ndarray], name: str, *settings: object) -> np.ndarray:
        """Calls `compute()` for one row per training image, and caches the result in the folder of features.

        The cache depends on images, backbone and settings. All processes compute, because they may share features.
        """
        features, experiment = self.features, self.experiment
        images = features.fingerprints["images"], features.image_size, experiment.crop, experiment.official.published
        sources = images, features.kind, self.run.backbone.fingerprint(), settings
        key = devices.once(lambda: fingerprint(*sources))
        path = self.run.folder.parent / "features" / f"{name}-{key}.npy"
        if not devices.once(path.exists):
            values = compute()
            if devices.first():
                with atomic(path) as temporary, open(temporary, "wb") as file:
                    np.save(file, values)
            devices.wait()
        return np.load(path, mmap_mode="r")


def unit_patches(maps: Tensor) -> Tensor:
    """Normalized patches of maps: (B, C, h, w) -> (B h w, C), in the order image, row, column."""
    return F.normalize(maps.permute(0, 2, 3, 1).flatten(0, 2), dim=1)


def random_cells(maps: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random cells of each map (B, C, h, w), int64 (B, count), as row-major indices; all if there are fewer."""
    images, cells = len(maps), maps[0, 0].numel()
    drawn = [torch.randperm(cells, generator=generator)[:count] for _ in range(images)]
    return torch.stack(drawn).to(maps.device)


def at_cells(maps: Tensor, cells: Tensor) -> Tensor:
    """Values of maps (B, C, h, w) at cells (B, P): (B, C, P, 1)."""
    return maps.flatten(2).gather(2, cells[:, None].expand(-1, maps.shape[1], -1))[..., None]


@torch.no_grad()
def update_ema(average: nn.Module, student: nn.Module, decay: float) -> None:
    """Updates a moving average in place: average <- decay average + (1 - decay) student."""
    for e, s in zip(average.parameters(), student.parameters(), strict=True):
        e.lerp_(s, 1 - decay)


def weighted_info_nce(logits: Tensor, weights: Tensor, allowed: Tensor) -> Tensor:
    """Weighted mean of log sum_k exp(l_ik) - l_ij over pairs, k over the allowed pairs of anchor i; 0 without weights.

    logits, weights and bool allowed are (anchors, patches).
    """
    tiny = torch.finfo(logits.dtype).tiny  # keeps the logarithm finite for anchors without pairs
    spread = (logits.exp() * allowed).sum(1, keepdim=True).clamp(min=tiny).log()
    return (weights * (spread - logits)).sum() / weights.sum().clamp(min=1)
