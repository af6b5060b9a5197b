"""Structured initialization of a ViT: sinusoidal position embeddings and mimetic attention.

Both imitate weights of trained vision transformers, which helps if images and training time are limited.
"""

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

POSITION = 0.2
"""Amplitude of the position embeddings; embedded patches have a standard deviation of about 0.7."""
LOOK, LOOK_NOISE = 0.7, 0.7
"""beta and alpha of queries and keys (Trockman and Kolter 2023)."""
PASS, PASS_NOISE = 0.4, 0.4
"""beta and alpha of values and projection (ibid.)."""


@torch.no_grad()
def structure(vit: VisionTransformer) -> None:
    """Replaces random positions and attention by sinusoidal positions and mimetic attention (torch's global generator).

    Positions: 2D sine-cosine embeddings of row and column (Vaswani et al. 2017, as in MAE), zero for the class token.
    Attention (Trockman and Kolter 2023): queries and keys of each head attend to similar tokens,
    W_q^T W_k ~ 0.7 Z + 0.7 I; values and projection subtract part of the attended tokens, W_proj W_v ~ 0.4 Z - 0.4 I,
    with Z normal of variance 1/C. Other weights are unchanged.
    """
    waves = build_sincos2d_pos_embed(list(vit.patch_embed.grid_size), vit.embed_dim).reshape(-1, vit.embed_dim)
    vit.pos_embed.zero_()
    vit.pos_embed[0, vit.num_prefix_tokens :] = POSITION * waves
    width = vit.embed_dim
    for block in vit.blocks:
        attention = block.attn
        heads = attention.qkv.weight.unflatten(0, (3, attention.num_heads, -1))  # (3, heads, width of a head, C)
        for head in range(attention.num_heads):
            keys, queries = factors(_near_identity(width, LOOK, LOOK_NOISE), heads.shape[2])
            heads[0, head], heads[1, head] = keys.T, queries
        projection, values = factors(_near_identity(width, -PASS, PASS_NOISE), width)
        attention.qkv.weight[2 * width :], attention.proj.weight[:] = values, projection


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best low-rank factors: (C, C) -> (C, rank) and (rank, C), by SVD with the singular values split evenly."""
    left, strengths, right = torch.linalg.svd(matrix)
    root = strengths[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _near_identity(width: int, identity: float, noise: float) -> Tensor:
    return identity * torch.eye(width) + noise * torch.randn(width, width) / width**0.5
