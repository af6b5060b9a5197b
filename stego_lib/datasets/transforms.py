"""Brings images and label maps to the size that training or evaluation asks for."""

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import Tensor

STRIP = 128
"""Rows of an image that are scaled at once."""
Size = int | tuple[int, int]
"""N: shorter side scaled to N, then center crop N x N (the published way). (H, W): scaled to H x W, nothing cut off."""


def resize_image(image: Tensor, size: Size, published: bool = False) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, h, w), bilinear with antialiasing.

    published: each new pixel is the nearest old one instead, as in the published code (images look rougher, and
    lie on their label maps pixel by pixel).
    """
    if published:
        height, width = image.shape[1:]
        rows, columns = nearest_grid(height, width, size)
        return image[:, rows[:, None], columns]
    if isinstance(size, int):
        short = min(image.shape[1:])
        height, width = (size if side == short else int(size * side / short) for side in image.shape[1:])
        return TF.center_crop(_antialiased(image, height, width), size)
    return _antialiased(image, *size)


def _antialiased(image: Tensor, height: int, width: int) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, height, width) as `TF.resize` does it, a strip at a time: floats take four times the memory."""
    if image.shape[1:] == (height, width):
        return image
    narrow = torch.empty(
        image.shape[0], image.shape[1], width
    )  # made at once: pieces between large blocks would break memory up
    for strip, rows in zip(image.split(STRIP, 1), narrow.split(STRIP, 1), strict=True):
        rows[:] = _interpolated(strip.float(), strip.shape[1], width)
    return _interpolated(narrow, height, width).round().to(torch.uint8)


def _interpolated(values: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(values[None], (height, width), mode="bilinear", antialias=True)[0]


def resize_label(label: Tensor, size: Size) -> Tensor:
    """int64 (H, W) -> int64 (h, w): the nearest pixel, exactly the one that the published code takes."""
    height, width = label.shape
    rows, columns = nearest_grid(height, width, size)
    return label[rows[:, None], columns]


def nearest_grid(height: int, width: int, size: Size) -> tuple[Tensor, Tensor]:
    """The old row of each new row and the old column of each new column, int64, for an H x W image.

    For a size N the other side becomes int(N * long / short), and the crop begins at half of what is over, halves
    rounded to the even number (Python's `round`): the rules of torchvision, which the published code uses.
    """
    if not isinstance(size, int):
        return _nearest(height, size[0]), _nearest(width, size[1])
    short = min(height, width)
    sides = [size if side == short else int(size * side / short) for side in (height, width)]
    middle = [slice(start := round((side - size) / 2), start + size) for side in sides]
    rows, columns = (_nearest(*pair) for pair in zip((height, width), sides, strict=True))
    return rows[middle[0]], columns[middle[1]]


def _nearest(old: int, new: int) -> Tensor:
    """The pixel of a line of `old` that each of `new` takes, int64 (new,).

    Pillow's rule: the middle of the first new pixel, then one step after the other added up. The running sum differs
    from multiplying at some sizes (51 x 72 to 32), where rounding decides which of two pixels is nearest.
    """
    step = old / new
    return torch.from_numpy(np.cumsum([step / 2, *[step] * (new - 1)]).astype(np.int64))
