"""Dense contrast: match the same point in two random crops against points of other images.

InfoNCE (van den Oord et al. 2018) on bilinearly sampled patch tokens, as in dense contrastive learning (Wang et al.
2021).
"""

import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

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


def two_views(
    images: Tensor, crop: int, recipe: PretrainRecipe, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws two overlapping random crops of each image, and points inside both.

    images: float (B, 3, H, W) in [0, 1]. Returns two crop batches (B, 3, crop, crop) and the positions of
    `recipe.points` corresponding points in each, (B, points, 2) as (x, y) in [-1, 1] (-1 and 1 are the crop's edges).
    """
    count = len(images)
    # Half the extent and center of each crop, in coordinates [-1, 1] of the image, (B, 2).
    half1, half2 = (_half_extent(images, crop, recipe, generator) for _ in range(2))
    center1 = (2 * _uniform(generator, count, 2) - 1) * (1 - half1)
    reach = 0.5 * (half1 + half2)  # crops overlap if their centers are closer than half1 + half2
    center2 = center1 + (2 * _uniform(generator, count, 2) - 1) * reach
    center2 = torch.clamp(center2, -(1 - half2), 1 - half2)
    low = torch.maximum(center1 - half1, center2 - half2)
    high = torch.minimum(center1 + half1, center2 + half2)
    points = low[:, None] + _uniform(generator, count, recipe.points, 2) * (high - low)[:, None]
    views, where = [], []
    for center, half in ((center1, half1), (center2, half2)):
        mirror = torch.stack([1 - 2 * (_uniform(generator, count) < 0.5).float(), torch.ones(count)], 1)
        matrix = torch.zeros(count, 2, 3)
        matrix[:, 0, 0], matrix[:, 1, 1] = (half * mirror).unbind(1)
        matrix[:, :, 2] = center
        grid = F.affine_grid(matrix, [count, 3, crop, crop], align_corners=False).to(images.device)
        view = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        views.append(mix_colors(view, recipe.color_mixing, generator))
        where.append(((points - center[:, None]) / half[:, None] * mirror[:, None]).to(images.device))
    return views[0], views[1], where[0], where[1]


def mix_colors(images: Tensor, strength: tuple[float, float, float, float], generator: torch.Generator) -> Tensor:
    """Random 3 x 3 color mixing near the identity, contrast, brightness, and sometimes gray; (B, 3, H, W) in [0, 1].

    `strength`: see `PretrainRecipe.color_mixing`. Zeros change nothing.
    """
    count = len(images)
    matrix_spread, gain_spread, offset_spread, gray_share = strength
    matrix = torch.eye(3) + matrix_spread * torch.randn(count, 3, 3, generator=generator)
    gray = (torch.rand(count, 1, 1, generator=generator) < gray_share).float()
    matrix = gray / 3 + (1 - gray) * matrix
    gain = torch.exp(gain_spread * torch.randn(count, 1, 1, 1, generator=generator))
    offset = offset_spread * torch.randn(count, 3, 1, 1, generator=generator)
    matrix, gain, offset = (value.to(images.device) for value in (matrix, gain, offset))
    mixed = torch.einsum("bij,bjhw->bihw", matrix, images - 0.5)
    return (mixed * gain + 0.5 + offset).clamp(0, 1)


def _half_extent(images: Tensor, crop: int, recipe: PretrainRecipe, generator: torch.Generator) -> Tensor:
    """Half the extent of randomly zoomed crops, relative to half the image, (B, 2)."""
    height, width = images.shape[-2:]
    # A crop larger than the image needs upsampling.
    smallest = crop / min(height, width)
    zoom = max(recipe.zoom[0], smallest), max(recipe.zoom[1], 1.4 * smallest)
    enlargement = torch.exp(_uniform(generator, len(images), 1) * math.log(zoom[1] / zoom[0])) * zoom[0]
    return torch.clamp(crop / enlargement / torch.tensor([width, height], dtype=torch.float32), max=1.0)


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator)
