"""Measurements in a separate process, for its memory. The last printed line is JSON."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from stego_lib import Backbone, train
from stego_lib import raster as library
from stego_lib.neighbors import nearest_neighbors
from stego_lib.segment import segment_folder

from .evaluation_rows import made_run, short_run
from .material import RandomFeatures, Settings, draw_folder, scenes


def neighbors(count: str, dim: str) -> dict[str, Any]:
    """Seconds of the neighbor search for `count` images, and the memory of the process before."""
    features, before = torch.randn(int(count), int(dim)), psutil.Process().memory_info().rss
    started = time.perf_counter()
    nearest_neighbors(features, 7)
    return {"seconds": time.perf_counter() - started, "bytes_before": before}


def train_run(folder: str, tiny: str, images: str, steps: str) -> dict[str, Any]:
    """Trains on synthetic images with random features, and returns the size of the store."""
    settings = Settings(Path(folder) / "memory", tiny=tiny == "1")
    settings.folder.mkdir()
    size = settings.choose(224, 32)
    drawn = draw_folder(settings.folder / "drawn", scenes(size, 8), int(images), 1)
    Backbone.forward = RandomFeatures.forward
    started = time.perf_counter()
    train(settings.experiment(drawn, steps=int(steps), probes="after"), runs_dir=settings.folder / "runs")
    stored = sum(path.stat().st_size for path in settings.folder.glob("runs/features/**/*.npy"))
    return {"seconds": time.perf_counter() - started, "store_bytes": stored, "images": int(images)}


def raster(folder: str, tiny: str, width: str, height: str) -> dict[str, Any]:
    """Segments a synthetic GeoTIFF with `segment_folder`, and returns the memory of the process before."""
    import rasterio

    settings = Settings(Path(folder), tiny=tiny == "1")
    columns, rows, images = int(width), int(height), settings.folder / "rasters"
    images.mkdir()
    scene = np.concatenate(scenes(settings.choose(500, 100), 4), 1)
    line = np.tile(scene, (1, -(-columns // scene.shape[1]), 1))[:, :columns].transpose(2, 0, 1)
    form = dict(driver="GTiff", count=3, dtype="uint8", width=columns, height=rows, crs="EPSG:25832", tiled=True)
    form |= dict(transform=rasterio.Affine(0.1, 0, 4e5, 0, -0.1, 5.5e6), compress="deflate")
    with rasterio.Env(GDAL_CACHEMAX=64), rasterio.open(images / "a.tif", "w", **form) as file:
        for top in range(0, rows, line.shape[1]):
            part = line[:, : rows - top]
            file.write(part, window=((top, top + part.shape[1]), (0, columns)))
    drawn = draw_folder(settings.folder / "drawn", scenes(settings.choose(224, 32), 8), 8, 1)
    run = short_run(settings, drawn)
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    tile, library.LARGE = settings.choose(448, 64), 100_000
    segment_folder(run, images, settings.folder / "segmented", format="geotiff", tile=tile, refine="none")
    return {"seconds": time.perf_counter() - started, "bytes_before": before, "tile": tile}


def predict(folder: str, tiny: str, drawn: str, megapixels: str, options: str) -> dict[str, Any]:
    """Seconds of `Run.predict` on a smooth 4:3 image with noise, without the start of the process."""
    settings, side = Settings(Path(folder), tiny=tiny == "1"), int((float(megapixels) * 1e6 / 12) ** 0.5)
    experiment = settings.experiment(Path(drawn), backbone=settings.embedded())
    run = made_run(experiment, Backbone.of(experiment), settings.folder / f"predict-{megapixels}-{abs(hash(options))}")
    noise = np.random.default_rng(0).integers(0, 40, (3 * side, 4 * side, 3), np.uint8)
    image = noise + np.array(Image.fromarray(scenes(320, 8)[0]).resize((4 * side, 3 * side))) // 2
    started = time.perf_counter()
    run.predict(image, **json.loads(options))
    return {"seconds": time.perf_counter() - started, "pixels": image.shape[0] * image.shape[1]}


PARTS = {"neighbors": neighbors, "train": train_run, "raster": raster, "predict": predict}

if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    print("\n" + json.dumps(PARTS[name](*arguments)))
