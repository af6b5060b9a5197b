"""What DINO and iBOT share: a student that learns what its own moving average, the teacher, says of another view.

Without a label and without negatives nothing would keep all answers from becoming one. Two things do: the teacher's
distributions are sharp (a low temperature), and centered (what it says on average is subtracted). Caron et al. 2021.
"""

import copy
import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .recipe import Distillation, PretrainRecipe


class Head(nn.Module):
    """Three layers, then the cosine with each of K prototypes: (..., C) -> (..., K). Thrown away afterwards."""

    def __init__(self, width: int, settings: Distillation):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, settings.hidden), nn.GELU(),
            nn.Linear(settings.hidden, settings.hidden), nn.GELU(),
            nn.Linear(settings.hidden, settings.bottleneck),
        )  # fmt: skip
        self.prototypes = nn.Parameter(torch.randn(settings.prototypes, settings.bottleneck))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(F.normalize(self.layers(tokens).float(), dim=-1), F.normalize(self.prototypes, dim=-1))


class Centered(nn.Module):
    """The teacher's scores (..., K) as distributions: the running mean of the scores off, then softmax at its temperature."""

    def __init__(self, settings: Distillation):
        super().__init__()
        self.temperature, self.momentum = settings.teacher_temperature, settings.center_momentum
        self.register_buffer("center", torch.zeros(settings.prototypes))

    def forward(self, scores: Tensor) -> Tensor:
        """Distributions (..., K); the running mean then takes these scores in, for the next time."""
        found = F.softmax((scores.float() - self.center) / self.temperature, dim=-1)
        self.center.lerp_(scores.float().flatten(0, -2).mean(0), 1 - self.momentum)
        return found


def disagreement(targets: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the student's `scores` (..., K) at its temperature, against distributions (..., K): (...)."""
    return -(targets * F.log_softmax(scores.float() / temperature, dim=-1)).sum(-1)


class SelfDistillation(nn.Module):
    """Student and teacher, each a network and a head. Subclasses say what the loss is.

    The teacher begins as a copy, gets no gradient, and follows the student by `after_step`. Its network is the one that
    is kept (it is the better one all along).
    """

    def __init__(self, vit: VisionTransformer, recipe: PretrainRecipe):
        super().__init__()
        self.recipe, self.settings = recipe, recipe.distillation
        self.student = nn.ModuleDict({"vit": vit, "head": Head(vit.embed_dim, self.settings)})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.centered = Centered(self.settings)

    @property
    def network(self) -> VisionTransformer:
        """What is kept of it all."""
        return self.teacher["vit"]

    @torch.no_grad()
    def after_step(self, done: float) -> None:
        """Moves the teacher towards the student; `done` is the share of the steps taken, in [0, 1]."""
        towards = (1 - self.settings.momentum) * 0.5 * (1 + math.cos(math.pi * done))
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.lerp_(fast, towards)
