"""Brings pictures and label maps to the size that training or evaluation asks for."""

import torchvision.transforms.functional as TF
from torch import Tensor
from torchvision.transforms import InterpolationMode

Size = int | tuple[int, int]
"""N: shorter side scaled to N, then centre crop N x N (the published way). (H, W): scaled to H x W, nothing cut off."""


def resize_picture(picture: Tensor, size: Size) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, h, w), bilinear with antialiasing. (The published code takes the nearest pixel.)"""
    return _resize(picture, size, InterpolationMode.BILINEAR)


def resize_label(label: Tensor, size: Size) -> Tensor:
    """int64 (H, W) -> int64 (h, w), the pixel nearest to the centre of each new one (in place with `resize_picture`)."""
    return _resize(label[None], size, InterpolationMode.NEAREST_EXACT)[0]


def _resize(image: Tensor, size: Size, how: InterpolationMode) -> Tensor:
    square = isinstance(size, int)
    image = TF.resize(image, size if square else list(size), how, antialias=how is InterpolationMode.BILINEAR)
    return TF.center_crop(image, size) if square else image
