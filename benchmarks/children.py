"""What is measured in a process of its own, for its memory. The last line printed is JSON."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from numpy.lib.format import open_memmap
from torch import Tensor

from stego_lib import Backbone, train
from stego_lib.features.arrays import write_rows
from stego_lib.features.pooled import read_pooled
from stego_lib.features.store import FeatureStore
from stego_lib.model import build_model
from stego_lib.neighbors import nearest_neighbors, unit_rows
from stego_lib.neighbors_approximate import approximate_neighbors
from stego_lib.probes import sample_cells
from stego_lib.utils.files import write_json

from .material import N_CLASSES, RandomFeatures, Settings, draw_folder, scenes
from .training_rows import training_steps


class File:
    """Features of `count` images in the file of a store; rows are read when they are asked for."""

    def __init__(self, folder: Path, count: int, dim: int):
        self.folder, self.count = folder, count
        folder.mkdir(exist_ok=True)
        open_memmap(folder / "pooled.npy", "w+", np.float32, (count, dim))
        generator = torch.Generator().manual_seed(0)
        spread = torch.arange(1, dim + 1) ** -0.7  # some directions tell more than others
        for start in range(0, count, 5000):  # groups of 50 that are alike; written, not mapped: a map counts as memory
            size = min(5000, count - start)
            centers = torch.randn(math.ceil(size / 50), dim, generator=generator).repeat_interleave(50, 0)[:size]
            noise = torch.randn(size, dim, generator=generator)
            write_rows(folder / "pooled.npy", start, ((centers + 0.5 * noise) * spread).numpy())

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return read_pooled(self.folder, rows)


def neighbors(folder: str, count: str, dim: str) -> dict[str, Any]:
    """Seconds of the neighbors of `count` images, and the memory of the process before."""
    features, before = File(Path(folder), int(count), int(dim)), psutil.Process().memory_info().rss
    started = time.perf_counter()
    nearest_neighbors(features, 7)
    return {"seconds": time.perf_counter() - started, "bytes_before": before}


def approximate(folder: str, count: str, dim: str) -> dict[str, Any]:
    """Seconds of the approximate neighbors of `count` images, and how many of the true ones of the first 256 are among them."""
    features = File(Path(folder), int(count), int(dim))
    started = time.perf_counter()
    found = approximate_neighbors(features, 7)
    seconds, asked = time.perf_counter() - started, min(256, len(features))
    rows, best = unit_rows(features, 0, asked), torch.empty(asked, 0)
    for start in range(0, len(features), 4096):
        best = (
            torch.cat([best, rows @ unit_rows(features, start, 4096).T], 1).topk(8).values
        )  # the image itself is the first
    cosines = torch.einsum(
        "nc,nkc->nk", rows, F.normalize(features[found[:asked].flatten()], dim=1).unflatten(0, (asked, 7))
    )
    return {"seconds": seconds, "recall": float((cosines >= best[:, -1:] - 1e-6).double().mean())}


def train_run(folder: str, tiny: str, images: str, steps: str) -> dict[str, Any]:
    """Trains on `images` drawn ones with random features, and tells how large the store was."""
    settings = Settings(Path(folder) / "memory", tiny=tiny == "1")
    settings.folder.mkdir()
    size = settings.choose(224, 32)
    drawn = draw_folder(settings.folder / "drawn", scenes(size, 8), int(images), 1)
    Backbone.forward = RandomFeatures.forward
    started = time.perf_counter()
    train(settings.experiment(drawn, steps=int(steps), probes="after"), runs_dir=settings.folder / "runs")
    stored = sum(path.stat().st_size for path in settings.folder.glob("runs/features/**/*.npy"))
    return {"seconds": time.perf_counter() - started, "store_bytes": stored, "images": int(images)}


def large(folder: str, tiny: str, images: str, steps: str) -> dict[str, Any]:
    """Opens a sparse store of `images`, samples codes for the probes, and makes training steps."""
    settings = Settings(Path(folder) / "large", tiny=tiny == "1")
    settings.folder.mkdir()
    experiment, count = settings.experiment(settings.folder), int(images)
    backbone, size = RandomFeatures(experiment.backbone, precision="float32"), settings.choose(224, 32)
    shapes: dict[str, tuple[type, tuple[int, ...]]] = {
        "features": (np.float16, (count, backbone.dim, *backbone.grid(size, size))), "images": (np.uint8, (count, 3, size, size)),
        "labels": (np.uint8, (count, size, size)), "pooled": (np.float32, (count, backbone.dim)),
    }  # fmt: skip
    for name, (dtype, shape) in shapes.items():
        open_memmap(settings.folder / f"{name}.npy", "w+", dtype, shape)
    write_json(settings.folder / "about.json", {"labels": True, "n_classes": N_CLASSES})
    store, started = FeatureStore(settings.folder), time.perf_counter()
    model = build_model(experiment, backbone.dim, N_CLASSES)
    model.feature_mean.copy_(store.mean.view(1, -1, 1, 1))
    step = training_steps(experiment, store, torch.randint(count, (count, experiment.neighbors)), backbone)
    for _ in range(int(steps)):
        step()
    with torch.no_grad():  # as the probes are fitted; a tenth of what they take
        sample_cells(store, 0, lambda rows: model(store.rows(rows)), model.head.code_dim, 4000)
    sizes = {name: (settings.folder / f"{name}.npy").stat().st_size for name in shapes}
    return {"seconds": time.perf_counter() - started, "store_bytes": sum(sizes.values()), "images": count}


PARTS = {"neighbors": neighbors, "approximate": approximate, "train": train_run, "large": large}

if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    print("\n" + json.dumps(PARTS[name](*arguments)))
