"""What is measured in a process of its own, for its memory. The last line printed is JSON."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from stego_lib import Backbone, train
from stego_lib.neighbors import nearest_neighbors

from .material import RandomFeatures, Settings, draw_folder, scenes


def neighbors(count: str, dim: str) -> dict[str, Any]:
    """Seconds of the neighbors of `count` images, and the memory of the process before."""
    features, before = torch.randn(int(count), int(dim)), psutil.Process().memory_info().rss
    started = time.perf_counter()
    nearest_neighbors(features, 7)
    return {"seconds": time.perf_counter() - started, "bytes_before": before}


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


PARTS = {"neighbors": neighbors, "train": train_run}

if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    print("\n" + json.dumps(PARTS[name](*arguments)))
