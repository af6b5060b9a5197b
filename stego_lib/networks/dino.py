"""DINO's vision transformer, built from its tensors alone and run as its authors run it."""

import argparse
import re
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..utils.errors import StegoError
from ..utils.files import load_tensors

HEAD_WIDTH = 64
"""Channels of an attention head in every network that DINO's authors published."""


class DinoViT(VisionTransformer):
    """timm's ViT with DINO's own resampling of the position embeddings (see `resample_positions`)."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Patches (B, h, w, C) -> tokens (B, 1 + h * w, C), the class token first, positions added."""
        positions = resample_positions(self.pos_embed, x.shape[1], x.shape[2])
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], dim=1)
        return tokens + positions.to(x.dtype)


def resample_positions(positions: Tensor, height: int, width: int) -> Tensor:
    """Position embeddings (1, 1 + n * n, C) for a grid of height x width cells: (1, 1 + height * width, C), float32.

    Bicubic without antialiasing, and with the scale (cells + 0.1) / n in place of cells / n, as in DINO's code: the tenth
    was meant against rounding, but it moves every sample a little. The grid of n x n is left untouched.
    """
    positions = positions.float()
    side = round((positions.shape[1] - 1) ** 0.5)
    if torch.compiler.is_exporting():  # a graph whose sizes are free cannot ask which they are
        untouched = (torch.scalar_tensor(height) == side) & (torch.scalar_tensor(width) == side)
        rows, columns = (_bicubic(cells, side, untouched) for cells in (height, width))
        grid = torch.einsum("hi,ijc,wj->hwc", rows, positions[0, 1:].unflatten(0, (side, side)), columns)
        return torch.cat([positions[:, :1], grid.flatten(0, 1)[None]], dim=1)
    if (height, width) == (side, side):
        return positions
    grid = positions[:, 1:].unflatten(1, (side, side)).movedim(-1, 1)
    scale = ((height + 0.1) / side, (width + 0.1) / side)
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False, recompute_scale_factor=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def _bicubic(cells: int, side: int, untouched: Tensor) -> Tensor:
    """The same resampling along one axis as weights, (cells, side); where `untouched`, each cell takes its own position."""
    numbers = torch.arange(cells)
    at = (numbers + 0.5) * side / (cells + 0.1) - 0.5
    weights = torch.zeros(side)
    for tap in range(-1, 3):
        x = (at - at.floor() - tap).abs()  # Keys' kernel with a = -0.75, as in torch
        near, far = (1.25 * x - 2.25) * x * x + 1, -0.75 * (((x - 5) * x + 8) * x - 4)
        taken = (at.floor() + tap).clamp(0, side - 1)
        weights = weights + torch.where(x <= 1, near, far)[:, None] * (taken[:, None] == torch.arange(side))
    return torch.where(untouched, (numbers[:, None] == torch.arange(side)).float(), weights)


def dino_vit(weights: dict[str, Tensor], source: str, heads: int | None = None) -> DinoViT:
    """The network that `weights` (DINO's names, which are timm's) belong to; depth, width and patch are read off them.

    source: what errors call the weights, a file's path, say. heads: attention heads, which leave no trace in the weights;
    without it width / 64, as in every published DINO. Raises StegoError for a missing, foreign or ill-shaped tensor.
    """
    try:
        patches, positions = weights["patch_embed.proj.weight"], weights["pos_embed"]
        width, _, _, patch = patches.shape
        side = round((positions.shape[1] - 1) ** 0.5)
        hidden = len(weights["blocks.0.mlp.fc1.weight"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise StegoError(f"{source} holds no DINO ViT: {error} is missing or has another shape") from None
    if heads is None and width % HEAD_WIDTH:
        raise StegoError(
            f"{source} is {width} channels wide, which does not divide into attention heads of {HEAD_WIDTH}; say how many there are: heads=N"
        )
    heads = heads or width // HEAD_WIDTH
    if not width or width % heads:
        raise StegoError(f"{source} is {width} channels wide and cannot have {heads} attention heads")
    blocks = {found[1] for key in weights if (found := re.match(r"blocks\.(\d+)\.", key))}
    build = partial(
        DinoViT, img_size=side * patch, patch_size=patch, embed_dim=width, num_heads=heads, mlp_ratio=hidden / width,
        depth=len(blocks),  # not the highest number: a name costs nothing, and may claim a billion blocks
        qkv_bias="blocks.0.attn.qkv.bias" in weights, norm_layer=partial(nn.LayerNorm, eps=1e-6),
        num_classes=0, dynamic_img_size=True, weight_init="skip",
    )  # fmt: skip
    with torch.device("meta"):  # shapes alone: a small file may name a network that no memory holds
        expected = build().state_dict()
    wrong = [
        *(f"{key} is unknown" for key in weights.keys() - expected.keys()),
        *(f"{key} is missing" for key in expected.keys() - weights.keys()),
        *(
            f"{key} is {tuple(weights[key].shape)}, not {tuple(value.shape)}"
            for key, value in expected.items()
            if key in weights and weights[key].shape != value.shape
        ),
    ]
    if wrong:
        raise StegoError(f"{source} holds no DINO ViT: {'; '.join(sorted(wrong)[:5])}")
    vit = build()
    vit.load_state_dict({key: value.float() for key, value in weights.items()})
    return vit


def load_pth(path: Path) -> dict[str, Tensor]:
    """Weights in one of DINO's own .pth files: the plain backbone, or the teacher's in a full checkpoint of its training.

    Prefixes that the training leaves ('module.', 'backbone.') are removed and DINO's projection head is left out.
    Runs no code from the file. Raises StegoError for a file that is missing, broken or of another kind.
    """
    if not path.is_file():
        raise StegoError(f"backbone file {path.resolve()} does not exist")
    stored = load_tensors(path, (argparse.Namespace,))  # DINO's full checkpoints hold their options
    stored = stored.get("teacher", stored) if isinstance(stored, dict) else stored
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise StegoError(f"{path} holds no DINO ViT: it must be a dictionary of tensors, or hold one called 'teacher'")
    named = {re.sub(r"^(module\.|backbone\.)+", "", key): value for key, value in stored.items()}
    return {key: value for key, value in named.items() if not key.startswith("head.")}
