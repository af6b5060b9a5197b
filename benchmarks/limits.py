"""Hardware limits: throughput of matrix products, and FLOPs of the networks."""

from typing import Any

import psutil
import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from stego_lib.backbone import choose_device, choose_precision

from .material import Settings
from .measuring import seconds_of

SHAPES = ((785 * 4, 384, 1536), (2048, 2048, 2048), (8192, 8192, 8192))
"""Matrix products of four images in a layer of ViT-S/8; square products. The last is only for GPUs."""


def limits(settings: Settings) -> dict[str, Any]:
    """Hardware limit: the fastest matrix product in float32 and bfloat16, and the FLOPs of an image.

    Their quotient is a lower bound on the time per image of any implementation in this precision.
    """
    device = choose_device("auto")
    found = {name: throughput(getattr(torch, name), device, settings.tiny) for name in ("float32", "bfloat16")}
    work = {label: flops(name, size) for label, (name, size) in networks(settings.tiny).items()}
    least = {precision: {name: work[name] / (1e9 * speed) for name in work} for precision, speed in found.items()}
    facts = {"flop_per_image": work, "least_s_per_image": least, "cores": len(psutil.Process().cpu_affinity())}
    return {"gflop_per_s": found} | facts


def networks(tiny: bool) -> dict[str, tuple[str, int]]:
    """Title -> timm's name and image size of the counted networks."""
    small, base = ("vit_tiny_patch16_224",) * 2 if tiny else ("vit_small_patch8_224", "vit_base_patch8_224")
    return {"ViT-S/8, 224 px": (small, 224), "ViT-S/8, 320 px": (small, 320), "ViT-B/8, 224 px": (base, 224)}


def throughput(dtype: torch.dtype, device: torch.device, tiny: bool = False) -> float:
    """GFLOP/s of the fastest of several matrix products, each the best of five; slow ones are reduced."""
    shapes = [(64, 64, 64)] if tiny else SHAPES[: None if device.type == "cuda" else 2]
    best = 0.0
    for rows, inner, columns in shapes:
        few = max(64, rows // 32)  # test first: the full product takes minutes if the type is emulated
        a, b = (
            torch.randn(rows, inner, device=device, dtype=dtype),
            torch.randn(columns, inner, device=device, dtype=dtype),
        )
        tried = min(seconds_of(lambda a=a, b=b, few=few: F.linear(a[:few], b)) for _ in range(2))
        part = a if tried * rows / few < 2 else a[:few]
        taken = min(seconds_of(lambda part=part, b=b: F.linear(part, b)) for _ in range(5))
        best = max(best, 2 * len(part) * inner * columns / taken / 1e9)
    return best


def flops(name: str, size: int) -> int:
    """Floating-point operations of timm's ViT `name` per image; a multiply-add counts as two."""
    with torch.device("meta"), torch.inference_mode():  # only shapes
        vit = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
        for block in vit.blocks:
            block.attn.fused_attn = False  # the counter does not support fused attention on all devices
        with FlopCounterMode(display=False) as counter:
            vit.forward_features(torch.zeros(1, 3, size, size))
    return counter.get_total_flops()


def bfloat16_is_native() -> bool:
    """Whether the machine has native bfloat16; without, bfloat16 is slower than float32."""
    return choose_precision("auto", choose_device("auto")) is torch.bfloat16
