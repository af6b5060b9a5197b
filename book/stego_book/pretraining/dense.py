"""Dense contrast: match the same point in two crops against points of other images.

InfoNCE (van den Oord et al. 2018) on bilinearly sampled patch tokens, as in dense contrastive learning (Wang et al.
2021).
"""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .crops import two_views
from .network import tokens_at
from .recipe import PretrainRecipe


class DenseContrast(nn.Module):
    """The loss of the embedded backbones.

    Colors are mixed at random in each crop, so that points are matched by texture and shape.
    """

    def __init__(self, vit: VisionTransformer, recipe: PretrainRecipe):
        super().__init__()
        self.vit, self.recipe, width = vit, recipe, vit.embed_dim
        self.projector = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, recipe.projection))

    def forward(self, images: Tensor, crop: int, generator: torch.Generator) -> Tensor:
        """The loss on random crops of `crop` pixels of float images (B, 3, H, W) in [0, 1]."""
        view1, view2, where1, where2 = two_views(images, crop, self.recipe, generator)
        sampled = tokens_at(self.vit, torch.cat([view1, view2]), torch.cat([where1, where2]))
        ours, theirs = self.projector(sampled).chunk(2)
        return point_contrast(ours, theirs, self.recipe.temperature)


def point_contrast(projected1: Tensor, projected2: Tensor, temperature: float) -> Tensor:
    """InfoNCE between the same points of two crops, (B, P, C) each; negatives are the points of OTHER images.

    Points of the same image are excluded from the denominator, because they often belong to the same class.
    """
    count, points, _ = projected1.shape
    a, b = (F.normalize(p.float(), dim=-1).flatten(0, 1) for p in (projected1, projected2))
    logits = a @ b.T / temperature
    image = torch.arange(count, device=a.device).repeat_interleave(points)
    same = image[:, None] == image[None]
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, float("-inf"))
    target = torch.arange(len(a), device=a.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
