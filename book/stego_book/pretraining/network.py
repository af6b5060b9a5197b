"""The pre-trained network: initialization, tokens and weights file."""

import json
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from stego_lib.networks.loading import IMAGENET
from stego_lib.utils.files import atomic

from .recipe import PretrainRecipe

MEAN, STD = (torch.tensor(IMAGENET[key]).view(3, 1, 1) for key in ("mean", "std"))
# Amplitude of the position embeddings; embedded patches have a standard deviation of about 0.7.
POSITION = 0.2
# beta and alpha of queries and keys, and of values and projection (Trockman and Kolter 2023).
LOOK, LOOK_NOISE = 0.7, 0.7
PASS, PASS_NOISE = 0.4, 0.4


def build_network(recipe: PretrainRecipe) -> VisionTransformer:
    """The recipe's ViT with random weights from torch's global generator; see `PretrainRecipe.structured`."""
    arguments = recipe.timm_arguments()
    vit = timm.create_model(arguments.pop("architecture"), **arguments)
    if recipe.structured:
        structure(vit)
    return vit


@torch.no_grad()
def structure(vit: VisionTransformer) -> None:
    """Replaces random positions and attention by sinusoidal positions and mimetic attention (torch's global generator).

    Both imitate weights of trained vision transformers, which helps if images and training time are limited.
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


def tokens_of(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Patch tokens after the final norm, (B, h * w, C), of float images (B, 3, H, W) in [0, 1]."""
    return vit.forward_features((images - MEAN.to(images)) / STD.to(images))[:, vit.num_prefix_tokens :]


def tokens_at(vit: VisionTransformer, images: Tensor, where: Tensor) -> Tensor:
    """Patch tokens of square images, bilinear at `where` (B, P, 2), see `two_views`; returns (B, P, C)."""
    side = images.shape[-1] // 8
    maps = tokens_of(vit, images).transpose(1, 2).unflatten(2, (side, side)).float()
    return F.grid_sample(maps, where[:, :, None], padding_mode="border", align_corners=False)[..., 0].transpose(1, 2)


def save_backbone(vit: VisionTransformer, recipe: PretrainRecipe, path: str | Path, trained: str) -> None:
    """Writes the weights in float16 as a safetensors file that `Backbone` loads.

    The metadata contains the timm arguments ("timm") and the description `trained` of the training.
    """
    weights = {name: value.detach().cpu().half().contiguous() for name, value in vit.state_dict().items()}
    with atomic(path) as temporary:
        save_file(weights, temporary, {"timm": json.dumps(recipe.timm_arguments()), "trained": trained})
