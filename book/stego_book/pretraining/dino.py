"""DINO (Caron et al. 2021): the student says of any crop what the teacher says of another, larger one."""

import torch
from torch import Tensor

from .crops import large_and_small_views
from .distillation import SelfDistillation, disagreement
from .network import all_tokens


class Dino(SelfDistillation):
    """Self-distillation of the class token with small crops, which ask the student to see the whole in a part."""

    def forward(self, images: Tensor, crop: int, generator: torch.Generator) -> Tensor:
        """The loss on random crops of `crop` pixels of float images (B, 3, H, W) in [0, 1]."""
        large, small = large_and_small_views(
            images, crop, self.settings.small_crop, self.settings.small_crops, self.recipe, generator
        )
        with torch.no_grad():
            targets = self.centered(self._scores("teacher", large))
        scores = [*self._scores("student", large), *self._scores("student", small)]
        return across_views(targets, scores, self.settings.student_temperature)

    def _scores(self, who: str, views: Tensor) -> Tensor:
        """What student or teacher says of views (V, B, 3, side, side) by its class token: (V, B, K)."""
        if not len(views):
            return views.new_empty(0)
        part = getattr(self, who)
        return part["head"](all_tokens(part["vit"], views.flatten(0, 1))[:, 0]).unflatten(0, views.shape[:2])


def across_views(targets: Tensor, scores: list[Tensor], temperature: float) -> Tensor:
    """Mean disagreement over all pairs of a teacher's view and another view of the student's.

    targets: distributions (V, B, K) of the teacher's views; scores: (B, K) each, the student's, of the same V views first.
    """
    losses = [
        disagreement(target, score, temperature).mean()
        for i, target in enumerate(targets)
        for j, score in enumerate(scores)
        if i != j
    ]
    return torch.stack(losses).mean()
