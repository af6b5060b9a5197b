"""Random crops of images with mixed colors."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .recipe import PretrainRecipe


@dataclass(frozen=True)
class _Boxes:
    """One box per image, in coordinates [-1, 1] of the image; both (B, 2)."""

    center: Tensor
    half: Tensor

    @property
    def low(self) -> Tensor:
        return self.center - self.half

    @property
    def high(self) -> Tensor:
        return self.center + self.half


def two_views(
    images: Tensor, crop: int, recipe: PretrainRecipe, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws two overlapping random crops of each image, and points inside both.

    images: float (B, 3, H, W) in [0, 1]. Returns two crop batches (B, 3, crop, crop) and the positions of
    `recipe.points` corresponding points in each, (B, points, 2) as (x, y) in [-1, 1] (-1 and 1 are the crop's edges).
    """
    first, second = _overlapping(images, crop, recipe, generator)
    low, high = torch.maximum(first.low, second.low), torch.minimum(first.high, second.high)
    where = low[:, None] + _uniform(generator, len(images), recipe.points, 2) * (high - low)[:, None]
    views = []
    for boxes in (first, second):
        view, mirror = _view(images, boxes, crop, recipe, generator)
        views += [view, ((where - boxes.center[:, None]) / boxes.half[:, None] * mirror[:, None]).to(images.device)]
    return views[0], views[2], views[1], views[3]


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


def _overlapping(
    images: Tensor, crop: int, recipe: PretrainRecipe, generator: torch.Generator
) -> tuple[_Boxes, _Boxes]:
    half1, half2 = (_half(images, crop, recipe, generator) for _ in range(2))
    center1 = (2 * _uniform(generator, len(images), 2) - 1) * (1 - half1)
    reach = 0.5 * (half1 + half2)  # boxes overlap if their centers are closer than half1 + half2
    center2 = center1 + (2 * _uniform(generator, len(images), 2) - 1) * reach
    return _Boxes(center1, half1), _Boxes(torch.clamp(center2, -(1 - half2), 1 - half2), half2)


def _half(images: Tensor, crop: int, recipe: PretrainRecipe, generator: torch.Generator) -> Tensor:
    """Half the extent of randomly zoomed crops, relative to half the image, (B, 2)."""
    height, width = images.shape[-2:]
    # A crop larger than the image needs upsampling.
    smallest = crop / min(height, width)
    zoom = max(recipe.zoom[0], smallest), max(recipe.zoom[1], 1.4 * smallest)
    enlargement = torch.exp(_uniform(generator, len(images), 1) * math.log(zoom[1] / zoom[0])) * zoom[0]
    return torch.clamp(crop / enlargement / torch.tensor([width, height], dtype=torch.float32), max=1.0)


def _view(
    images: Tensor, boxes: _Boxes, crop: int, recipe: PretrainRecipe, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Resampled boxes with mixed colors, (B, 3, crop, crop), and (B, 2): -1 in x if mirrored, else 1."""
    count = len(images)
    mirror = torch.stack([1 - 2 * (_uniform(generator, count) < 0.5).float(), torch.ones(count)], 1)
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1] = (boxes.half * mirror).unbind(1)
    matrix[:, :, 2] = boxes.center
    grid = F.affine_grid(matrix, [count, 3, crop, crop], align_corners=False).to(images.device)
    view = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return mix_colors(view, recipe.color_mixing, generator), mirror


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator)
