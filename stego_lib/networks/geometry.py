"""Infers feature dimension and stride of a network with dummy forward passes."""

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor

from ..utils.errors import StegoError, brief
from ..utils.fields import Size

# Pixels per side of the largest image that an `Experiment` accepts.
MAX_SIDE = 8192


@dataclass(frozen=True)
class Geometry:
    """Shape of a network's features, and the image sizes that it accepts."""

    dim: int
    """C, channels of the features."""
    patch: int
    """Pixels per side of a grid cell: the patch size of a ViT, or the stride of the last stage."""
    fixed_size: tuple[int, int] | None
    """The only size (H, W) that the network accepts; None if it accepts multiples of `patch`."""
    normed: bool
    """Whether timm applies the network's final norm to its intermediate features."""

    def accepts(self, height: int, width: int) -> bool:
        """Whether the network accepts images of this size in pixels."""
        if self.fixed_size is not None:
            return (height, width) == self.fixed_size
        return height % self.patch == 0 == width % self.patch

    def nearest(self, size: Size) -> Size:
        """The nearest accepted size."""
        sides = size if isinstance(size, tuple) else (size, size)
        if self.accepts(*sides):
            return size
        if self.fixed_size is not None:
            return self.fixed_size
        height, width = (self.patch * min(max(1, round(n / self.patch)), MAX_SIDE // self.patch) for n in sides)
        return (height, width) if isinstance(size, tuple) else height


@torch.inference_mode()
def measure(network: Any, name: str) -> Geometry:
    """Infers the geometry from small images, or from the network's default size. The "meta" device is supported.

    Raises StegoError if the network `name` has no feature maps.
    """
    problem = "its last stage is not a grid over the image"
    try:
        cell = int(network.feature_info[-1]["reduction"])
        small = [(2 * cell, 3 * cell)]
        default = getattr(getattr(network, "patch_embed", None), "img_size", None)
        default = default or network.pretrained_cfg["input_size"][1:]
        if not is_vit(network):  # some hierarchical networks accept nothing larger than their default size
            small.append((default[0] + 2 * cell, default[1] + cell))
        for normed in (True, False):
            for sizes in (small, [tuple(default)]):
                try:
                    images = [torch.zeros(1, 3, *size, device=next(network.parameters()).device) for size in sizes]
                    shapes = [feature_map(network, image, -1, normed).shape[1:] for image in images]
                except Exception as error:  # networks raise many types for an unsupported size or norm
                    problem = brief(error)
                    continue
                if all((h * cell, w * cell) == size for (_, h, w), size in zip(shapes, sizes, strict=True)):
                    return Geometry(shapes[0][0], cell, None if sizes is small else sizes[0], normed)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        problem = brief(error)
    raise StegoError(f"backbone {name!r} has no feature maps ({problem}). Use a ViT or convolutional network of timm.")


def is_vit(network: Any) -> bool:
    """Whether a network is a sequence of transformer blocks, not of stages."""
    return hasattr(network, "blocks") and hasattr(network, "num_prefix_tokens")


def feature_map(network: Any, images: Tensor, block: int, normed: bool) -> Tensor:
    """Features (B, C, h, w) of a block, or of the last stage (-1), after the network's final norm if any."""
    features = network.forward_intermediates(
        images, indices=[block], norm=normed, intermediates_only=True, stop_early=True
    )[-1]
    norm = getattr(getattr(network, "head", None), "norm", None)  # of ConvNeXt, where timm does not apply it
    return norm(features) if isinstance(norm, LayerNorm2d) else features
