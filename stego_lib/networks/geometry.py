"""Feature dimension and stride of a network, inferred with dummy forward passes."""

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ..utils.errors import StegoError, brief
from ..utils.fields import Size

# Pixels per side of the largest image that an `Experiment` accepts.
MAX_SIDE = 8192


@dataclass(frozen=True)
class Geometry:
    """Shape of a network's features, and the image sizes it accepts."""

    dim: int
    """C, channels of the features."""
    patch: int
    """Pixels per side of a grid cell: the patch size of a ViT, or the stride of the last stage."""
    only: tuple[int, int] | None
    """The single size (H, W) that the network accepts; None if it accepts any multiple of `patch`."""
    normed: bool
    """Whether timm applies the network's final norm to its intermediate features."""

    def fits(self, height: int, width: int) -> bool:
        """Whether the network accepts images of this size in pixels."""
        return (height, width) == self.only or not (self.only or height % self.patch or width % self.patch)

    def nearest(self, size: Size) -> Size:
        """The accepted size nearest to `size`; `size` itself if it is accepted."""
        sides = size if isinstance(size, tuple) else (size, size)
        if self.fits(*sides):
            return size
        if self.only is not None:
            return self.only
        height, width = (self.patch * min(max(1, round(n / self.patch)), MAX_SIDE // self.patch) for n in sides)
        return (height, width) if isinstance(size, tuple) else height


@torch.inference_mode()
def measure(network: nn.Module, name: str) -> Geometry:
    """Infers the geometry with dummy forward passes on small images, or on the network's default size.

    Works for a network on the "meta" device. Raises StegoError if the network `name` gives no feature map.
    """
    problem = "its last stage is not a grid over the image"
    try:
        cell = int(network.feature_info[-1]["reduction"])
        small = [(2 * cell, 3 * cell)]
        default = getattr(getattr(network, "patch_embed", None), "img_size", None)
        default = default or network.pretrained_cfg["input_size"][1:]
        if not is_vit(network):  # some networks with stages accept nothing larger than their default size
            small.append((default[0] + 2 * cell, default[1] + cell))
        for normed in (True, False):
            for sizes in (small, [tuple(default)]):
                try:
                    shapes = [_shape(network, size, normed) for size in sizes]
                except Exception as error:  # networks raise many types for a size or a norm they do not support
                    problem = brief(error)
                    continue
                if all((h * cell, w * cell) == size for (_, h, w), size in zip(shapes, sizes, strict=True)):
                    return Geometry(shapes[0][0], cell, None if sizes is small else sizes[0], normed)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        problem = brief(error)
    raise StegoError(f"backbone {name!r} gives no feature map ({problem}). Use a ViT or convolutional network of timm.")


def _shape(network: nn.Module, size: tuple[int, int], normed: bool) -> torch.Size:
    image = torch.zeros(1, 3, *size, device=next(network.parameters()).device)
    return feature_map(network, image, -1, normed).shape[1:]


def is_vit(network: Any) -> bool:
    """Whether a network has a sequence of transformer blocks, rather than stages."""
    return hasattr(network, "blocks") and hasattr(network, "num_prefix_tokens")


def feature_map(network: nn.Module, images: Tensor, block: int, normed: bool) -> Tensor:
    """Features (B, C, h, w) of a block, or of the last stage (-1), after the network's final norm if it has one."""
    features = network.forward_intermediates(
        images, indices=[block], norm=normed, intermediates_only=True, stop_early=True
    )[-1]
    norm = getattr(getattr(network, "head", None), "norm", None)  # ConvNeXt's, which timm does not apply here
    return norm(features) if isinstance(norm, LayerNorm2d) else features
