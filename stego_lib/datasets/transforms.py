"""Resizes images and label maps for training and evaluation."""

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import Tensor

# Rows of an image that are resized at once, which limits memory.
STRIP = 128
# N: shorter side resized to N, then center crop N x N (as published). (H, W): whole image resized to H x W.
Size = int | tuple[int, int]


def resize_image(image: Tensor, size: Size, published: bool = False) -> Tensor:
    """Resizes bilinearly with antialiasing: uint8 (3, H, W) -> uint8 (3, h, w).

    published: nearest neighbor instead, as in the authors' code.
    """
    if published:
        height, width = image.shape[1:]
        rows, columns = nearest_grid(height, width, size)
        return image[:, rows[:, None], columns]
    if isinstance(size, int):
        height, width = image.shape[1:]
        return TF.center_crop(_antialiased(image, *_scaled_sides(height, width, size)), size)
    return _antialiased(image, *size)


def _scaled_sides(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width with shorter side `size`, rounded down as in torchvision."""
    short = min(height, width)
    return int(size * height / short), int(size * width / short)


def _antialiased(image: Tensor, height: int, width: int) -> Tensor:
    """Like `TF.resize`, but in strips, because float images take four times the memory."""
    if image.shape[1:] == (height, width):
        return image
    narrow = torch.empty(image.shape[0], image.shape[1], width)  # allocated once, to avoid fragmentation
    for strip, rows in zip(image.split(STRIP, 1), narrow.split(STRIP, 1), strict=True):
        rows[:] = _interpolated(strip.float(), strip.shape[1], width)
    return _interpolated(narrow, height, width).round().to(torch.uint8)


def _interpolated(values: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(values[None], (height, width), mode="bilinear", antialias=True)[0]


def resize_label(label: Tensor, size: Size) -> Tensor:
    """Resizes by nearest neighbor: int64 (H, W) -> int64 (h, w). Takes the same pixels as the authors' code."""
    height, width = label.shape
    rows, columns = nearest_grid(height, width, size)
    return label[rows[:, None], columns]


def nearest_grid(height: int, width: int, size: Size) -> tuple[Tensor, Tensor]:
    """Source row of each new row and source column of each new column, int64, for an image of H x W.

    As in torchvision, the crop for size N starts at round((side - N) / 2).
    """
    if not isinstance(size, int):
        return _nearest(height, size[0]), _nearest(width, size[1])
    new_height, new_width = _scaled_sides(height, width, size)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return _nearest(height, new_height)[top : top + size], _nearest(width, new_width)[left : left + size]


def _nearest(old: int, new: int) -> Tensor:
    """Source pixel of each of `new` pixels in a line of `old`, int64 (new,).

    As in Pillow, a running sum of steps from the center of the first new pixel. A product would round differently at
    some sizes (51 x 72 to 32).
    """
    step = old / new
    return torch.from_numpy(np.cumsum([step / 2, *[step] * (new - 1)]).astype(np.int64))
