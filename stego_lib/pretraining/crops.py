"""Random crops of pictures with their colours mixed: what every objective sees."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .recipe import PretrainRecipe


@dataclass(frozen=True)
class _Boxes:
    """One box in each picture; a picture spans [-1, 1] in x and y. Both (B, 2)."""

    centre: Tensor
    half: Tensor

    @property
    def low(self) -> Tensor:
        return self.centre - self.half

    @property
    def high(self) -> Tensor:
        return self.centre + self.half


def two_views(
    pictures: Tensor, crop: int, recipe: PretrainRecipe, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cuts two overlapping random crops from each picture and picks points seen in both, as many as the recipe says.

    pictures: float (B, 3, H, W) in [0, 1]. Returns two crop batches (B, 3, crop, crop) and the positions of the same
    `points` points in each, (B, points, 2) as (x, y) in [-1, 1] of the crop (-1 and 1 are its outer edges).
    """
    first, second = _overlapping(pictures, crop, recipe, generator)
    low, high = torch.maximum(first.low, second.low), torch.minimum(first.high, second.high)
    where = low[:, None] + _uniform(generator, len(pictures), recipe.points, 2) * (high - low)[:, None]
    views = []
    for boxes in (first, second):
        view, mirror = _view(pictures, boxes, crop, recipe, generator)
        views += [view, ((where - boxes.centre[:, None]) / boxes.half[:, None] * mirror[:, None]).to(pictures.device)]
    return views[0], views[2], views[1], views[3]


def large_and_small_views(
    pictures: Tensor, crop: int, small_crop: int, smalls: int, recipe: PretrainRecipe, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Two overlapping random crops of each picture, and `smalls` smaller ones of what the two show (DINO's multi-crop).

    pictures: float (B, 3, H, W) in [0, 1]. Returns (2, B, 3, crop, crop) and (smalls, B, 3, small_crop, small_crop).
    """
    first, second = _overlapping(pictures, crop, recipe, generator)
    large = [_view(pictures, boxes, crop, recipe, generator)[0] for boxes in (first, second)]
    low, high = torch.minimum(first.low, second.low), torch.maximum(first.high, second.high)
    small = []
    for _ in range(smalls):
        half = torch.minimum(_half(pictures, small_crop, recipe, generator), (high - low) / 2)
        centre = low + half + _uniform(generator, len(pictures), 2) * (high - low - 2 * half)
        small.append(_view(pictures, _Boxes(centre, half), small_crop, recipe, generator)[0])
    return torch.stack(large), torch.stack(small) if small else pictures.new_empty(0, len(pictures), 3, 0, 0)


def mix_colours(pictures: Tensor, strength: tuple[float, float, float, float], generator: torch.Generator) -> Tensor:
    """Random 3 x 3 colour mixing near the identity, contrast, brightness, now and then grey; (B, 3, H, W) in [0, 1].

    `strength`: see `PretrainRecipe.colour_mixing`. Zeros change nothing.
    """
    count = len(pictures)
    matrix_spread, gain_spread, offset_spread, grey_share = strength
    matrix = torch.eye(3) + matrix_spread * torch.randn(count, 3, 3, generator=generator)
    grey = (torch.rand(count, 1, 1, generator=generator) < grey_share).float()
    matrix = grey / 3 + (1 - grey) * matrix
    gain = torch.exp(gain_spread * torch.randn(count, 1, 1, 1, generator=generator))
    offset = offset_spread * torch.randn(count, 3, 1, 1, generator=generator)
    matrix, gain, offset = (value.to(pictures.device) for value in (matrix, gain, offset))
    mixed = torch.einsum("bij,bjhw->bihw", matrix, pictures - 0.5)
    return (mixed * gain + 0.5 + offset).clamp(0, 1)


def _overlapping(
    pictures: Tensor, crop: int, recipe: PretrainRecipe, generator: torch.Generator
) -> tuple[_Boxes, _Boxes]:
    half1, half2 = (_half(pictures, crop, recipe, generator) for _ in range(2))
    centre1 = (2 * _uniform(generator, len(pictures), 2) - 1) * (1 - half1)
    reach = 0.5 * (half1 + half2)  # centres nearer than half1 + half2 overlap; half of that overlaps well
    centre2 = centre1 + (2 * _uniform(generator, len(pictures), 2) - 1) * reach
    return _Boxes(centre1, half1), _Boxes(torch.clamp(centre2, -(1 - half2), 1 - half2), half2)


def _half(pictures: Tensor, crop: int, recipe: PretrainRecipe, generator: torch.Generator) -> Tensor:
    """(B, 2): half the extent that a crop of random enlargement covers; the same share as its extent has of the picture."""
    height, width = pictures.shape[-2:]
    # A crop as large as the picture can only be had by enlarging.
    smallest = crop / min(height, width)
    zoom = max(recipe.zoom[0], smallest), max(recipe.zoom[1], 1.4 * smallest)
    enlargement = torch.exp(_uniform(generator, len(pictures), 1) * math.log(zoom[1] / zoom[0])) * zoom[0]
    return torch.clamp(crop / enlargement / torch.tensor([width, height], dtype=torch.float32), max=1.0)


def _view(
    pictures: Tensor, boxes: _Boxes, crop: int, recipe: PretrainRecipe, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What the boxes show, (B, 3, crop, crop), colours mixed, and (B, 2) of 1, or -1 in x where it is mirrored."""
    count = len(pictures)
    mirror = torch.stack([1 - 2 * (_uniform(generator, count) < 0.5).float(), torch.ones(count)], 1)
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1] = (boxes.half * mirror).unbind(1)
    matrix[:, :, 2] = boxes.centre
    grid = F.affine_grid(matrix, [count, 3, crop, crop], align_corners=False).to(pictures.device)
    view = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    return mix_colours(view, recipe.colour_mixing, generator), mirror


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator)
