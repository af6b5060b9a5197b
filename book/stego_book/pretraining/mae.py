"""Masked autoencoder (He et al. 2022): most patches are never computed; a small decoder paints them from the others."""

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from .crops import large_and_small_views
from .network import embed
from .recipe import PretrainRecipe

DECODER = dict(dim=96, num_heads=3)
"""The decoder's blocks; it is thrown away afterwards."""
DEPTH = 2


class Mae(nn.Module):
    """The network sees a quarter of a crop's patches, so a step costs about as much as one on crops of half the side."""

    def __init__(self, vit: VisionTransformer, recipe: PretrainRecipe):
        super().__init__()
        self.vit, self.recipe, width = vit, recipe, DECODER["dim"]
        self.enter, self.unseen = nn.Linear(vit.embed_dim, width), nn.Parameter(torch.zeros(width))
        self.decoder = nn.Sequential(
            *(Block(**DECODER) for _ in range(DEPTH)), nn.LayerNorm(width), nn.Linear(width, 3 * 8 * 8)
        )

    @property
    def network(self) -> VisionTransformer:
        """What is kept of it all."""
        return self.vit

    def forward(self, images: Tensor, crop: int, generator: torch.Generator) -> Tensor:
        """The loss on random crops of `crop` pixels of float images (B, 3, H, W) in [0, 1]."""
        views = large_and_small_views(images, crop, 0, 0, self.recipe, generator)[0].flatten(0, 1)
        side = crop // 8
        shown = draw_shown(len(views), side * side, self.recipe.masked, generator).to(views.device)
        patches, prefix = embed(self.vit, views), self.vit.num_prefix_tokens
        tokens = torch.cat([patches[:, :prefix], pick(patches[:, prefix:], shown)], 1)
        found = self.enter(self.vit.norm(self.vit.blocks(self.vit.norm_pre(tokens)))[:, prefix:])
        places = build_sincos2d_pos_embed([side, side], DECODER["dim"]).to(found)
        whole = self.unseen.to(found).expand(len(views), side * side, -1)
        whole = whole.scatter(1, shown[..., None].expand_as(found), found)
        return masked_error(self.decoder(whole + places), pixels(views), shown)

    def after_step(self, done: float) -> None:
        """Nothing follows a step."""


def draw_shown(count: int, cells: int, masked: float, generator: torch.Generator) -> Tensor:
    """The patches of each crop that are seen, int64 (count, n), drawn anew: all but the share `masked`, one at least."""
    return torch.rand(count, cells, generator=generator).argsort(1)[:, : max(1, round(cells * (1 - masked)))]


def pick(tokens: Tensor, which: Tensor) -> Tensor:
    """Tokens (B, N, C) at `which`, int64 (B, n): (B, n, C)."""
    return tokens.gather(1, which[..., None].expand(-1, -1, tokens.shape[2]))


def pixels(images: Tensor) -> Tensor:
    """The pixels of each patch with its own mean and spread taken off, (B, h * w, 3 * 8 * 8)."""
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-4).sqrt()


def masked_error(painted: Tensor, known: Tensor, shown: Tensor) -> Tensor:
    """Mean squared error over the patches that were not `shown`, int64 (B, n); painted and known (B, N, P)."""
    hidden = torch.ones_like(known[..., 0]).scatter(1, shown, 0.0)
    return ((painted.float() - known).square().mean(2) * hidden).sum() / hidden.sum()
