"""Large sets: neighbors, and the memory of training from large stores."""

from typing import Any

import torch

from stego_lib.neighbors import nearest_neighbors

from .material import Settings
from .measuring import in_child, timed
from .published_order import nearest

LARGE = 600_000
"""Images that must be possible by exact comparison."""


def neighbors(settings: Settings) -> dict[str, Any]:
    """Nearest neighbors of 4,000 images (30 each, as the published loop); time and memory of more; 384 channels."""
    dim = settings.choose(384, 16)
    count, many = settings.choose(4000, 100), settings.choose(40_000, 200)
    features = torch.randn(count, dim, generator=torch.Generator().manual_seed(settings.seed))
    ways = {"published": lambda: nearest(features), "ours": lambda: nearest_neighbors(features, 29)}
    row: dict[str, Any] = {"ways": timed(ways, settings)}
    child = in_child("benchmarks.children", "neighbors", many, dim)
    per_pair = child["seconds"] / many**2
    row["many"] = {
        "images": many, "seconds": child["seconds"], "peak_bytes": child["peak_bytes"],
        "bytes_before": child["bytes_before"], "gflop_per_s": 2e-9 * dim / per_pair,
    }  # fmt: skip
    row["extrapolated"] = {
        "images": LARGE, "hours": per_pair * LARGE**2 / 3600,
        "bytes": child["peak_bytes"] + 7 * 8 * (LARGE - many),  # what grows are the neighbors found
    }  # fmt: skip
    return row


def raster(settings: Settings) -> dict[str, Any]:
    """Peak memory and seconds of the label map of a GeoTIFF 20,000 pixels wide, without CRF, by windows of 448 pixels.

    The network is the embedded one. Memory grows with the width alone: a few thousand rows tell that of 400 megapixels.
    """
    width, height = settings.choose(20_000, 700), settings.choose(4_000, 600)
    row = in_child("benchmarks.children", "raster", settings.folder, int(settings.tiny), width, height)
    full = {"megapixels": width * width / 1e6, "hours": row["seconds"] / height * width / 3600}
    return row | {"megapixels": width * height / 1e6, "extrapolated": full}


def memory(settings: Settings) -> dict[str, Any]:
    """Peak memory of `train` from a store of 10 GB, its features computed, checked, read at random, probes fitted.

    The backbone is replaced by random numbers; the rest is as in a run: 12,500 drawn JPEGs of 224 px, ViT-S/8's shape.
    """
    images, steps = settings.choose(12_500, 12), settings.choose(60, 3)
    row = in_child("benchmarks.children", "train", settings.folder, int(settings.tiny), images, steps)
    return row | {"steps": steps}
