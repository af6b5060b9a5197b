"""The whole Cityscapes-sized recipe on a GPU, in under ten minutes: `python -m benchmarks.gpu`.

14,875 synthetic JPEGs of 224 px; ViT-B/8 with random weights, in bfloat16; K = 100; 7,000 steps of batch 32 with both
probes. Measures extraction (with the machine's fastest matrix product), neighbors, training and peak memory. On a CPU
it takes days; `--tiny` tests it.
"""

import argparse
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

from stego_lib import Backbone, open_dataset, train
from stego_lib.batches import find_neighbors
from stego_lib.experiment import PRESETS
from stego_lib.features import open_features
from stego_lib.model import build_model

from .limits import flops, throughput
from .material import N_CLASSES, Settings, draw_folder, scenes
from .measuring import RESULTS, machine, save, seconds_of

CROPS, STEPS = 14_875, 7_000


def full_recipe(settings: Settings) -> dict[str, Any]:
    """The Cityscapes-sized recipe: 14,875 JPEG crops of 224 px, ViT-B/8 in bfloat16, K = 100, 7,000 steps of 32."""
    network = "vit_base_patch8_224"
    recipe = PRESETS["cityscapes-vitb8"] | dict(crop="none", train_size=settings.choose(224, 32), seed=settings.seed)
    if settings.tiny:
        recipe |= dict(batch_size=4, steps=4)
    count, runs_dir = settings.choose(CROPS, 12), settings.folder / "runs"
    drawn = draw(settings, count)
    experiment = settings.experiment(drawn, **recipe | dict(
        dataset="folder", backbone=str(settings.network(network)), precision="auto", eval_size=recipe["train_size"],
    ))  # fmt: skip
    backbone, dataset = Backbone.of(experiment), open_dataset("folder", drawn, "train")
    extraction_s = seconds_of(lambda: open_features(dataset, backbone, experiment.train_size, runs_dir / "features"))
    store = open_features(dataset, backbone, experiment.train_size, runs_dir / "features")
    model = build_model(experiment, backbone.dim, N_CLASSES)
    neighbors_s = seconds_of(lambda: find_neighbors(store, model, experiment))
    if backbone.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    training_s = seconds_of(lambda: train(experiment, runs_dir=runs_dir))  # opens the store, finds neighbors, trains
    per_image = flops("vit_tiny_patch16_224" if settings.tiny else network, experiment.train_size)
    ceiling = throughput(backbone.precision, backbone.device, settings.tiny)
    images_per_second = count / extraction_s
    return {
        "images": count, "steps": experiment.steps,
        "precision": str(backbone.precision), "device": str(backbone.device),
        "extraction_s": extraction_s, "images_per_second": images_per_second,
        "gflop_per_image": per_image / 1e9, "matmul_gflop_per_s": ceiling,
        "share_of_matmul": images_per_second * per_image / 1e9 / ceiling,
        "neighbors_s": neighbors_s, "training_s": training_s, "step_s": (training_s - neighbors_s) / experiment.steps,
        "total_s": extraction_s + training_s,
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if backbone.device.type == "cuda" else None,
        "resident_bytes": psutil.Process().memory_info().rss,
    }  # fmt: skip


def draw(settings: Settings, count: int) -> Path:
    """Writes `count` JPEGs with label maps in several threads."""
    images, parts = scenes(settings.choose(224, 32), 16, settings.seed), 16
    root, each = settings.folder / "drawn", -(-count // parts)
    with ThreadPoolExecutor() as pool:
        folders = list(pool.map(lambda i: draw_folder(root / str(i), images, each, 1, settings.seed + i), range(parts)))
    whole = root / "all"
    for kind, split in ((kind, split) for kind in ("imgs", "labels") for split in ("train", "val")):
        (whole / kind / split).mkdir(parents=True)
        for i, folder in enumerate(folders):
            for path in (folder / kind / split).iterdir():
                path.rename(whole / kind / split / f"{i:02d}-{path.name}")
    (folders[0] / "classes.json").rename(whole / "classes.json")
    surplus = sorted((whole / "imgs" / "train").iterdir())[count:]
    for path in surplus:
        path.unlink()
    return whole


def main(arguments: list[str] | None = None) -> Path:
    """The command line. Returns the file that was written."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="minimal sizes, to test that it runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--scratch", type=Path, help="folder for 25 GB of temporary files (default: the system's)")
    given = parser.parse_args(arguments)
    record = {"machine": machine(), "settings": {"tiny": given.tiny, "seed": given.seed}, "rows": {}}
    with tempfile.TemporaryDirectory(dir=given.scratch, prefix="stego-bench-") as folder:
        row = full_recipe(Settings(Path(folder), given.tiny, seed=given.seed))
    record["rows"]["full_recipe"] = {"what": (full_recipe.__doc__ or ""), **row}
    for name, value in row.items():
        print(f"{name}: {value}")
    path = save(record, given.out)
    print(path)
    return path


if __name__ == "__main__":
    main()
