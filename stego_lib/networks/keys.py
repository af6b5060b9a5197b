"""Keys of a ViT's attention."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.errors import StegoError


def attention_of(network: nn.Module, block: int, name: str) -> nn.Module:
    """The attention whose keys are the features; Raises StegoError if the block has none of a known kind."""
    attention = getattr(network.blocks[block], "attn", None)
    if not (getattr(attention, "qkv", None) or getattr(attention, "k_proj", None)) or not hasattr(
        attention, "num_heads"
    ):
        raise StegoError(f"the attention of backbone {name!r} has no keys to read; use features='feat'")
    return attention


def project_keys(attention: nn.Module, tokens: Tensor) -> Tensor:
    """Keys of the tokens, (B, N, C) -> (B, N, C), whether timm keeps query, key and value in one matrix or in three."""
    if getattr(attention, "qkv", None) is None:
        return attention.k_proj(tokens)
    bias = getattr(attention, "k_bias", None)
    if bias is None and attention.qkv.bias is not None:
        bias = attention.qkv.bias.chunk(3)[1]
    return F.linear(tokens, attention.qkv.weight.chunk(3)[1], bias)
