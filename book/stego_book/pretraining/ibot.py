"""iBOT (Zhou et al. 2022): the student tells of patches hidden from it what the teacher, who sees them, says of them."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .crops import large_and_small_views
from .dino import across_views
from .distillation import Centered, SelfDistillation, disagreement
from .network import all_tokens, hidden_patches
from .recipe import PretrainRecipe


class Ibot(SelfDistillation):
    """The class token as in DINO, without small crops, and the hidden patches beside it; one head serves both.

    Which patches are hidden is drawn patch by patch; the published code hides rectangles.
    """

    def __init__(self, vit: VisionTransformer, recipe: PretrainRecipe):
        super().__init__(vit, recipe)
        self.unseen = nn.Parameter(torch.zeros(vit.embed_dim))
        self.centered_patches = Centered(self.settings)

    def forward(self, images: Tensor, crop: int, generator: torch.Generator) -> Tensor:
        """The loss on random crops of `crop` pixels of float images (B, 3, H, W) in [0, 1]."""
        views = large_and_small_views(images, crop, 0, 0, self.recipe, generator)[0].flatten(0, 1)
        mask = draw_mask(len(views), crop // 8, self.settings.masked, generator).to(views.device)
        with torch.no_grad():
            told = self.teacher["head"](all_tokens(self.teacher["vit"], views))
        with hidden_patches(self.student["vit"], mask, self.unseen):
            tokens = all_tokens(self.student["vit"], views)
        scores = self.student["head"](tokens)
        temperature, two = self.settings.student_temperature, (2, len(images))
        whole = across_views(
            self.centered(told[:, 0].unflatten(0, two)), list(scores[:, 0].unflatten(0, two)), temperature
        )
        patches = hidden_disagreement(self.centered_patches(told[:, 1:]), scores[:, 1:], mask.flatten(1), temperature)
        return whole + patches


def draw_mask(count: int, side: int, share: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Which patches are hidden: bool (count, side, side), in each crop a random share of `share`'s range, one at least."""
    cells = side * side
    low, high = share
    wanted = (cells * (low + (high - low) * torch.rand(count, 1, generator=generator))).round().clamp(1, cells)
    order = torch.rand(count, cells, generator=generator).argsort(1).argsort(1)
    return (order < wanted).unflatten(1, (side, side))


def hidden_disagreement(targets: Tensor, scores: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Mean disagreement over the hidden patches of each crop, then over crops.

    targets: the teacher's distributions, scores: the student's, (B, N, K); mask: bool (B, N), one set in each row at least.
    """
    found = disagreement(targets, scores, temperature)
    return ((found * mask).sum(1) / mask.sum(1)).mean()
