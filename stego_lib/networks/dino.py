"""DINO's vision transformer, built from a state dict, with the position embeddings of the authors' code."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..utils.errors import explained
from .weights import fill

# Channels of an attention head in every network that DINO's authors published.
HEAD_WIDTH = 64


class DinoViT(VisionTransformer):
    """timm's ViT with DINO's resampling of position embeddings (see `resample_positions`)."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Prepends the class token and adds positions: patches (B, h, w, C) -> tokens (B, 1 + h * w, C)."""
        positions = resample_positions(self.pos_embed, x.shape[1], x.shape[2])
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], dim=1)
        return tokens + positions.to(x.dtype)


def resample_positions(positions: Tensor, height: int, width: int) -> Tensor:
    """Resamples position embeddings (1, 1 + n * n, C) to a grid: (1, 1 + height * width, C), float32.

    As in DINO's code: bicubic without antialiasing, with the scale (cells + 0.1) / n instead of cells / n. The 0.1
    avoids rounding errors but shifts every sample slightly. An n x n grid is returned unchanged.
    """
    positions = positions.float()
    side = round((positions.shape[1] - 1) ** 0.5)
    if torch.compiler.is_exporting():  # sizes are symbolic in an exported graph
        unchanged = (torch.scalar_tensor(height) == side) & (torch.scalar_tensor(width) == side)
        rows, columns = (_bicubic(cells, side, unchanged) for cells in (height, width))
        grid = torch.einsum("hi,ijc,wj->hwc", rows, positions[0, 1:].unflatten(0, (side, side)), columns)
        return torch.cat([positions[:, :1], grid.flatten(0, 1)[None]], dim=1)
    if (height, width) == (side, side):
        return positions
    grid = positions[:, 1:].unflatten(1, (side, side)).movedim(-1, 1)
    scale = ((height + 0.1) / side, (width + 0.1) / side)
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False, recompute_scale_factor=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def _bicubic(cells: int, side: int, unchanged: Tensor) -> Tensor:
    """Resampling along one axis as a matrix (cells, side); the identity if `unchanged`."""
    numbers = torch.arange(cells)
    at = (numbers + 0.5) * side / (cells + 0.1) - 0.5
    weights = torch.zeros(side)
    for tap in range(-1, 3):
        x = (at - at.floor() - tap).abs()  # Keys' kernel with a = -0.75, as in torch
        near, far = (1.25 * x - 2.25) * x * x + 1, -0.75 * (((x - 5) * x + 8) * x - 4)
        source = (at.floor() + tap).clamp(0, side - 1)
        weights = weights + torch.where(x <= 1, near, far)[:, None] * (source[:, None] == torch.arange(side))
    return torch.where(unchanged, (numbers[:, None] == torch.arange(side)).float(), weights)


def dino_vit(weights: dict[str, Tensor], source: Any, heads: int | None = None) -> DinoViT:
    """Builds the network of a state dict with DINO's names. Depth, width and patch size come from the tensors.

    heads: number of attention heads; width / 64 by default, as in published networks. Raises StegoError that names
    `source` for missing or unknown tensors and for wrong shapes.
    """
    remedy = "Use a file of DINO's authors."
    with explained((KeyError, IndexError, ValueError), f"{source} is not a DINO ViT", remedy):
        width, _, _, patch = weights["patch_embed.proj.weight"].shape
        side = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
        hidden = len(weights["blocks.0.mlp.fc1.weight"])
        heads, rest = (heads, width % heads) if heads else divmod(width, HEAD_WIDTH)
        if rest:
            raise ValueError(f"{width} channels are not a multiple of the heads; set heads=N")
    with torch.device("meta"):
        vit = DinoViT(
            img_size=side * patch, patch_size=patch, embed_dim=width, num_heads=heads, mlp_ratio=hidden / width,
            depth=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
            qkv_bias="blocks.0.attn.qkv.bias" in weights, norm_layer=partial(nn.LayerNorm, eps=1e-6),
            num_classes=0, dynamic_img_size=True, weight_init="skip",
        )  # fmt: skip
    fill(vit, weights, source, assign=True)
    return vit
