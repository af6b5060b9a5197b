"""What the trainers of the successors share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batches import Draw
from ..experiment import SUCCESSORS, Experiment, recipe_of
from ..official import optional_weights
from ..training import Trainer
from ..utils import devices
from ..utils.errors import StegoError
from ..utils.files import atomic, fingerprint
from ..utils.notices import notice


class Successor(Trainer):
    """A `Trainer` that sees images without partners, and updates by one loss."""

    unused: tuple[str, ...] = (
        "weights",
        "shifts",
        "centering",
        "zero_clamp",
        "stabilize",
        "points",
        "neighbors",
        "negatives",
    )
    """Settings of STEGO's loss that the method does not have."""

    @classmethod
    def refuse(cls, experiment: Experiment) -> None:
        """StegoError for probes that are trained beside the head, and for optional terms, which successors do not have.

        A notice names what differs from the recipe and makes no difference here.
        """
        if experiment.probes != "after":
            raise StegoError(f"method={experiment.method!r} fits its probes after training: probes='after'")
        if optional := optional_weights(experiment):
            raise StegoError(
                f"{', '.join(optional)}: terms of STEGO's loss, which method={experiment.method!r} does not have"
            )
        recipe = recipe_of(experiment.dataset, experiment.backbone).but(**SUCCESSORS[experiment.method])
        if idle := [key for key in cls.unused if getattr(experiment, key) != getattr(recipe, key)]:
            notice(f"method={experiment.method!r} has no use for {', '.join(idle)}: they change nothing")

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.feature_mean.device

    def draw(self, number: int) -> tuple[Tensor, Tensor, torch.Generator]:
        """Images of a step, int64 (B,), their centered features (B, C, h, w), and the generator of its other random choices."""
        draw = Draw(self.neighbors, self.experiment, number)
        torch.manual_seed(draw.seed)  # dropout uses the global generator
        if number + 1 < self.experiment.steps:
            self.features.prefetch(Draw(self.neighbors, self.experiment, number + 1).rows)
        self.model.train()
        return draw.rows, self.model.centered(self.features.rows(draw.rows, self.device)), draw.generator

    def update(self, loss: Tensor, parts: dict[str, Tensor], most: float | None = None) -> dict[str, float]:
        """One step of the optimizer. Returns the loss and its parts. most: the gradient's norm is clipped to it."""
        self.optimizer.zero_grad()
        loss.backward()
        if most is not None:
            torch.nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], most)
        self.optimizer.step()
        return {name: float(value) for name, value in {"loss": loss.detach(), **parts}.items()}

    def own_rows(self, rows: Tensor) -> Tensor:
        """Features (B, C, h, w), computed here where none are stored: several processes that compute them together would wait."""
        if self.features.kind != "online":
            return self.features.rows(rows, self.device)
        return self.run.backbone(self.features.image_rows(rows)).half().float()

    def beside_features(self, compute: Callable[[], np.ndarray], what: str, *settings: object) -> np.ndarray:
        """What `compute` makes of every training image, once: kept in a file beside the features, which is read by row.

        The file's name is `what` and a fingerprint of images, backbone and settings.
        """
        root, experiment = self.run.folder.parent / "features", self.experiment
        images, backbone = self.features.fingerprints["images"], self.run.backbone.fingerprint()
        key = fingerprint(images, backbone, experiment.train_size, experiment.official.published, *settings)

        def file() -> Path:
            path = root / f"{what}-{key}.npy"
            if not path.exists():
                with atomic(path) as temporary, open(temporary, "wb") as file:
                    np.save(file, compute())
            return path

        return np.load(devices.once(file), mmap_mode="r")


def random_cells(maps: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random positions of each image of maps (B, C, h, w), in row-major order, int64 (B, count); all if there are fewer."""
    images, positions = len(maps), maps[0, 0].numel()
    drawn = [torch.randperm(positions, generator=generator)[:count] for _ in range(images)]
    return torch.stack(drawn).to(maps.device)


def at_cells(maps: Tensor, cells: Tensor) -> Tensor:
    """Maps (B, C, h, w) at positions (B, P): (B, C, P, 1)."""
    return maps.flatten(2).gather(2, cells[:, None].expand(-1, maps.shape[1], -1))[..., None]


def states(**modules: Any) -> dict[str, Any]:
    """State of each module, by name, as a checkpoint keeps it."""
    return {name: module.state_dict() for name, module in modules.items()}
