"""Large datasets: neighbor search, memory of training, large rasters, many images."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from stego_lib.neighbors import nearest_neighbors

from .evaluation_rows import short_run
from .material import Settings, draw_folder, scenes
from .measuring import ROOT, in_child, timed
from .published_order import nearest

LARGE = 600_000
"""Number of images of the extrapolated exact search."""


def neighbors(settings: Settings) -> dict[str, Any]:
    """Nearest neighbors of 4,000 images (30 each, as in the published code); time and memory for more; 384 channels."""
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
        "bytes": child["peak_bytes"] + 7 * 8 * (LARGE - many),  # the result grows with the number of images
    }  # fmt: skip
    return row


def raster(settings: Settings) -> dict[str, Any]:
    """Peak memory and seconds for a GeoTIFF 20,000 pixels wide, without CRF, with windows of 448 pixels.

    Uses the embedded backbone. Memory depends only on the width, so 1,000 rows give that of 400 megapixels.
    """
    width, height = settings.choose(20_000, 700), settings.choose(1_000, 600)
    row = in_child("benchmarks.children", "raster", settings.folder, int(settings.tiny), width, height)
    full = {"megapixels": width * width / 1e6, "hours": row["seconds"] / height * width / 3600}
    return row | {"megapixels": width * height / 1e6, "extrapolated": full}


def segment(settings: Settings) -> dict[str, Any]:
    """A folder of images of 480 px without CRF, on one and on two processes of one thread each.

    `torchrun -m stego_lib.segment` with the embedded backbone. The seconds include the start of the processes.
    """
    size, count = settings.choose(480, 48), settings.choose(200, 4)
    drawn = draw_folder(settings.folder / "drawn", scenes(size, 8), 8, count)
    run, images = short_run(settings, drawn).folder, drawn / "imgs" / "val"
    ways = {"1 process": partial(in_processes, run, images, 1), "2 processes": partial(in_processes, run, images, 2)}
    return {"ways": timed(ways, settings), "images": count}


def in_processes(run: Path, images: Path, count: int) -> None:
    """Segments a folder with `count` processes into a new folder."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", "stego_lib.segment"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with TemporaryDirectory(dir=run.parent) as output:
        command = [sys.executable, *start, str(run), str(images), output, "--refine", "none"]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment)


def memory(settings: Settings) -> dict[str, Any]:
    """Peak memory of `train` with a store of 10 GB: extraction, training steps, and fitting of the probes.

    The backbone returns random features; the rest is a normal run: 12,500 synthetic JPEGs of 224 px, ViT-S/8's shape.
    """
    images, steps = settings.choose(12_500, 12), settings.choose(60, 3)
    row = in_child("benchmarks.children", "train", settings.folder, int(settings.tiny), images, steps)
    return row | {"steps": steps}
