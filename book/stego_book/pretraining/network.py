"""The pre-trained network: building, tokens and weights file."""

import json
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from stego_lib.networks.loading import IMAGENET
from stego_lib.utils.files import atomic

from .recipe import PretrainRecipe
from .structure import structure

MEAN, STD = (torch.tensor(IMAGENET[key]).view(3, 1, 1) for key in ("mean", "std"))


def build_network(recipe: PretrainRecipe) -> VisionTransformer:
    """The recipe's ViT with random weights from torch's global generator; see `PretrainRecipe.structured`."""
    arguments = recipe.timm_arguments()
    vit = timm.create_model(arguments.pop("architecture"), **arguments)
    if recipe.structured:
        structure(vit)
    return vit


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
