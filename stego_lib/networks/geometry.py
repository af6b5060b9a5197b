"""What a network makes of an image's size, found by trying."""

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ..utils.errors import StegoError, brief
from ..utils.fields import Size

LARGEST_SIDE = 8192
"""Pixels per side of the largest image."""


@dataclass(frozen=True)
class Geometry:
    """What a network makes of an image's size."""

    dim: int
    """C, channels of the features."""
    patch: int
    """Pixels per side of one grid cell: the patch of a ViT, the stride of the last stage of a network with stages."""
    only: tuple[int, int] | None
    """The one size (H, W) that the network takes; None for any that divides into grid cells."""
    normed: bool
    """Whether timm applies the network's final norm to its features."""

    def fits(self, height: int, width: int) -> bool:
        """Whether the network takes images of this size in pixels."""
        return (height, width) == self.only or not (self.only or height % self.patch or width % self.patch)

    def nearest(self, size: Size) -> Size:
        """The fitting size nearest to `size`."""
        if self.only is not None:
            return self.only
        return tuple(map(self._side, size)) if isinstance(size, tuple) else self._side(size)  # type: ignore[return-value]

    def _side(self, pixels: int) -> int:
        return min(max(1, round(pixels / self.patch)), LARGEST_SIDE // self.patch) * self.patch


@torch.inference_mode()
def measure(network: nn.Module, name: str) -> Geometry:
    """The geometry of a network: tried on the smallest image, and else on the size that it was made for.

    Shapes alone are needed, so a network without weights on the device "meta" will do. Raises StegoError that calls the
    network `name` if it gives no map of features.
    """
    try:
        cell = int(network.feature_info[-1]["reduction"])
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise StegoError(_no_map(name, brief(error))) from error
    made_for = (getattr(network, "pretrained_cfg", None) or {}).get("input_size", ())[1:]
    made_for = getattr(getattr(network, "patch_embed", None), "img_size", None) or made_for
    small = (2 * cell, 3 * cell)
    # A network with stages may know positions up to the size that it was made for, and no further.
    larger = (made_for[0] + 2 * cell, made_for[1] + cell) if made_for and not is_vit(network) else small
    problem = ""
    for normed in (True, False):
        for sizes in filter(None, ([small, larger], [tuple(made_for)] if made_for else None)):
            try:
                maps = [feature_map(network, _blank(network, size), -1, normed).shape for size in sizes]
            except Exception as error:  # whatever a network raises for a size, or a norm, that it was not made for
                problem = problem or brief(error)
                continue
            if all((1, h * cell, w * cell) == (n, *size) for (n, _, h, w), size in zip(maps, sizes, strict=True)):
                return Geometry(maps[0][1], cell, None if sizes[0] == small else sizes[0], normed)
    raise StegoError(_no_map(name, problem or "its last stage is no grid over the image"))


def _blank(network: nn.Module, size: tuple[int, int]) -> Tensor:
    return torch.zeros(1, 3, *size, device=next(network.parameters()).device)


def _no_map(name: str, reason: str) -> str:
    return f"backbone {name!r} gives no map of features ({reason}); choose a ViT or a convolutional network of timm"


def is_vit(network: Any) -> bool:
    """Whether a network has blocks of tokens to choose from, rather than stages."""
    return hasattr(network, "blocks") and hasattr(network, "num_prefix_tokens")


def feature_map(network: nn.Module, images: Tensor, block: int, normed: bool) -> Tensor:
    """Features of a block, or of the last stage (-1), after the final norm wherever the network keeps it: (B, C, h, w)."""
    found = network.forward_intermediates(
        images, indices=[block], norm=normed, intermediates_only=True, stop_early=True
    )[-1]
    norm = getattr(getattr(network, "head", None), "norm", None)  # of ConvNeXt, which timm's intermediates leave out
    return norm(found) if isinstance(norm, LayerNorm2d) else found
