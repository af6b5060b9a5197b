"""Training: the step, its parts, extraction, and the whole recipe extrapolated."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from stego_book.pretraining import STREETS, DenseContrast, PretrainRecipe, build_network
from stego_lib import Backbone, Experiment, open_dataset
from stego_lib.batches import Batch, draw_batch, find_neighbors
from stego_lib.features import Features, open_features
from stego_lib.features.compact import CompactFeatures, correspondence_error
from stego_lib.features.store import FullFeatures
from stego_lib.loss import published_permutation, random_coords
from stego_lib.model import Stego, build_model
from stego_lib.neighbors import nearest_neighbors
from stego_lib.probes import fit_probes
from stego_lib.training import make_optimizer, train_step

from .limits import bfloat16_is_native
from .material import N_CLASSES, RandomFeatures, Settings, draw_folder, scenes
from .measuring import interleaved, seconds_of, timed
from .published_order import Published

SHIFTS = (0.08, 0.02, 0.66)


def step(settings: Settings) -> dict[str, Any]:
    """A training step of ViT-S/8 at 224 px, K = 70, 27 classes, batch 16.

    The images of the baseline are decoded in memory; ours reads features, or decodes and computes, as in a run.
    """
    experiment, folder = _data(settings, settings.choose(64, 8))
    backbone = Backbone.of(experiment)
    model = build_model(experiment, backbone.dim, N_CLASSES)
    dataset = open_dataset("folder", folder, "train")
    store = open_features(
        dataset, RandomFeatures(experiment.backbone, precision="float32"), experiment.train_size, folder / "stores"
    )
    neighbors = find_neighbors(store, model, experiment)
    theirs = Published(backbone, model, experiment.weights, SHIFTS)
    rows = torch.arange(experiment.batch_size)
    images, label = store.image_rows(rows).to(backbone.device), store.label_rows(rows).to(backbone.device)
    points = _points(experiment, backbone.device)
    ways: dict[str, Callable] = {
        "published": lambda: theirs.step(images, images.flip(0), label, *points),
        "store": training_steps(experiment, store, neighbors, backbone),
        "store, probes after": training_steps(experiment.but(probes="after"), store, neighbors, backbone),
    }
    skipped = {}
    for precision in ("float32", "bfloat16"):
        if precision == "bfloat16" and not (settings.tiny or bfloat16_is_native()):
            skipped[f"online {precision}"] = "this machine has no native bfloat16: see the row limits"
            continue
        network = Backbone.of(experiment.but(precision=precision))
        online = open_features(dataset, network, experiment.train_size, folder / precision, "online")
        ways[f"online {precision}"] = training_steps(experiment, online, neighbors, network)
    return {"ways": timed(ways, settings), "batch": experiment.batch_size, "skipped": skipped}


def pretraining(settings: Settings) -> dict[str, Any]:
    """A step of pre-training on a CPU, with torch's fused attention and with plain matrix products.

    Random images; first stage (crops of 40 px) and second stage (80 px) of `STREETS`; bfloat16 if native.
    """
    precision = torch.bfloat16 if bfloat16_is_native() else torch.float32
    images = torch.randint(0, 256, (64, 3, 120, 160), dtype=torch.uint8)

    def steps(stage: PretrainRecipe, fused: bool) -> Callable:
        contrast = DenseContrast(build_network(stage), stage).train()
        for block in contrast.vit.blocks:
            block.attn.fused_attn = fused
        optimizer, numbers = torch.optim.AdamW(contrast.parameters(), lr=1e-4), count()

        def step() -> None:
            batch = images[: stage.batch_size].float() / 255
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                loss = contrast(batch, stage.crop, torch.Generator().manual_seed(next(numbers)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    kinds = {}
    for stage in STREETS[:2]:
        stage = replace(stage, batch_size=settings.choose(stage.batch_size, 2))
        ways = {"fused attention": steps(stage, True), "plain attention": steps(stage, False)}
        kinds[f"crops of {stage.crop} px"] = {"ways": timed(ways, settings), "batch": stage.batch_size}
    return {"kinds": kinds, "precision": str(precision)}


def compact(settings: Settings) -> dict[str, Any]:
    """Random batches of 32 images at 320 px from a full and a compact store of synthetic scenes, embedded backbone.

    "from the disk": with a cold file cache, as for a store larger than the memory. "bytes" of the features in both,
    "components", and mean "error" of a correspondence at the fit and on other images.
    """
    size, count = settings.choose(320, 64), settings.choose(256, 12)
    folder = draw_folder(settings.folder / "compact", scenes(size, settings.choose(64, 4)), count, 1)
    dataset, backbone = open_dataset("folder", folder, "train"), Backbone("scenes_vit_tiny8", precision="float32")
    full, small = (open_features(dataset, backbone, size, folder / "stores", kind) for kind in ("full", "compact"))
    assert isinstance(full, FullFeatures) and isinstance(small, CompactFeatures)
    generator = torch.Generator().manual_seed(settings.seed)

    def batch(features: Features, folder: Path | None = None) -> Callable[[], Any]:
        def read() -> None:
            for file in folder.glob("*/*.npy") if folder is not None and hasattr(os, "posix_fadvise") else ():
                with open(file, "rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            features.rows(torch.randint(count, (32,), generator=generator))

        return read

    some = torch.randperm(count, generator=generator)[:8]
    ways = {"full store": batch(full), "compact store": batch(small)}
    cold = {
        f"{name}, from the disk": batch(features, features.folder)
        for name, features in {"full store": full, "compact store": small}.items()
    }
    os.sync()  # unwritten pages cannot be dropped from the cache
    return {
        "ways": timed(ways, settings)
        | timed(cold, settings),  # separate: dropping files from the cache would affect the others
        "bytes": {
            "full": 2 * math.prod(full.shape),
            "compact": sum(path.stat().st_size for path in small.folder.glob("*/features.npy")),
        },
        "components": len(small.components.basis),
        "channels": full.shape[1],
        "error": {
            "fitted": small.components.error,
            "measured": correspondence_error(full.rows(some), small.rows(some)),
        },
    }


def rest(settings: Settings) -> dict[str, Any]:
    """A training step without backbone and feature reading, batch 32: head, loss, probes, optimizer; K = 100.

    "channels first, float32": with the memory layout of the backbone's maps.
    """
    experiment, _ = _data(settings, settings.choose(8, 8))
    size, batch_size = experiment.train_size, settings.choose(32, 4)
    experiment = experiment.but(batch_size=batch_size, code_dim=100)
    backbone = Backbone.of(experiment)
    model = build_model(experiment, backbone.dim, N_CLASSES).to(backbone.device)
    theirs, device = Published(backbone, model, experiment.weights, SHIFTS), backbone.device
    feats, feats_knn = torch.randn(2, batch_size, backbone.dim, *backbone.grid(size, size), device=device)
    label = torch.randint(0, N_CLASSES, (batch_size, size, size), device=device)
    points = _points(experiment, device)
    batch = Batch(feats, feats_knn, *points, label)
    last = dict(memory_format=torch.channels_last)
    ordered = replace(batch, feats=feats.contiguous(**last), feats_knn=feats_knn.contiguous(**last))

    def ours(given: Batch, probes: str, precision: torch.dtype = torch.float32) -> Callable[[], Any]:
        trained = build_model(experiment, backbone.dim, N_CLASSES).to(device)
        asked = experiment.but(probes=probes)
        return partial(train_step, trained, make_optimizer(trained, asked), given, asked, SHIFTS, precision)

    ways: dict[str, Callable[[], Any]] = {"published": lambda: theirs.rest(feats, feats_knn, label, *points)}
    for probes, name in {"joint": "ours", "after": "ours, probes after"}.items():
        ways[f"{name}, channels first, float32"] = ours(batch, probes)
        ways[name] = ours(ordered, probes)
        if settings.tiny or bfloat16_is_native():
            ways[f"{name}, bfloat16"] = ours(ordered, probes, torch.bfloat16)
    return {"ways": timed(ways, settings), "batch": batch_size}


def extraction(settings: Settings) -> dict[str, Any]:
    """The frozen backbone, ViT-S/8 at 224 px, in batches of 4; cosine similarity of bfloat16 and float32 features."""
    experiment, _ = _data(settings, 4)
    size, number = experiment.train_size, 4
    networks = {name: Backbone.of(experiment.but(precision=name)) for name in ("float32", "bfloat16")}
    theirs = Published(
        networks["float32"], build_model(experiment, networks["float32"].dim, N_CLASSES), (1, 1, 1), SHIFTS
    )
    drawn = torch.stack([torch.from_numpy(scene).movedim(-1, 0) for scene in scenes(size, number, settings.seed)])
    images = drawn.to(networks["float32"].device)
    ways = {"published": partial(theirs.features, images), "float32": partial(networks["float32"], images)}
    cosine = F.cosine_similarity(networks["bfloat16"](images[:1]), networks["float32"](images[:1]), dim=1)
    row: dict[str, Any] = {"ways": timed(ways, settings), "batch": number}
    slow = {} if settings.tiny or bfloat16_is_native() else {"repeats": 1, "batch": 1}
    few = partial(networks["bfloat16"], images[: slow.get("batch", number)])
    taken = interleaved({"bfloat16": few}, slow.get("repeats", settings.repeats), settings.seconds)["bfloat16"]
    share = number / slow.get("batch", number)
    row["ways"]["bfloat16"] = {key: value * share if key.endswith("_s") else value for key, value in taken.items()}
    row["images_per_second"] = {name: number / way["median_s"] for name, way in row["ways"].items()}
    return row | {"bfloat16_cosine": {"mean": cosine.mean().item(), "min": cosine.min().item()}}


def probes(settings: Settings) -> dict[str, Any]:
    """Cost of both probes: fitted after training, or trained in every step, batch 16."""
    experiment, folder = _data(settings, settings.choose(200, 8))
    network = RandomFeatures(experiment.backbone, precision="float32")
    store = open_features(open_dataset("folder", folder, "train"), network, experiment.train_size, folder / "stores")
    model = build_model(experiment, network.dim, N_CLASSES)
    neighbors = find_neighbors(store, model, experiment)
    ways = {way: training_steps(experiment.but(probes=way), store, neighbors, network) for way in ("joint", "after")}
    fit = seconds_of(lambda: fit_probes(model, store, settings.seed))
    return {"ways": timed(ways, settings), "batch": experiment.batch_size, "images": len(store), "fit_after_s": fit}


def recipe(settings: Settings) -> dict[str, Any]:
    """The Cityscapes-sized recipe with ViT-S/8, EXTRAPOLATED: 14,875 crops of 224 px, K = 100, 7,000 steps of batch 32.

    Measured: feature extraction from 500 JPEG files, and 200 steps from their store.
    """
    crops, steps = 14_875, 7_000
    measured, made = settings.choose(500, 12), settings.choose(200, 3)
    experiment, folder = _data(settings, measured)
    experiment = experiment.but(batch_size=settings.choose(32, 4), code_dim=100, centering=False, precision="auto")
    backbone, dataset = Backbone.of(experiment), open_dataset("folder", folder, "train")
    extraction_s = seconds_of(lambda: open_features(dataset, backbone, experiment.train_size, folder / "stores"))
    store = open_features(dataset, backbone, experiment.train_size, folder / "stores")
    model = build_model(experiment, backbone.dim, N_CLASSES)
    pooled = torch.randn(settings.choose(crops, 200), backbone.dim)
    neighbors_s = seconds_of(lambda: nearest_neighbors(pooled, experiment.neighbors))
    joint = training_steps(experiment, store, find_neighbors(store, model, experiment), backbone)
    taken = interleaved({"step": joint}, made, settings.seconds * 4)["step"]
    parts = {
        "extraction_s": extraction_s / measured * crops,
        "neighbors_s": neighbors_s,
        "steps_s": taken["median_s"] * steps,
    }
    return {
        "extrapolated": True,
        "measured": {
            "images": measured,
            "extraction_s": extraction_s,
            "step": taken,
            "precision": str(backbone.precision),
        },
        **parts,
        "total_s": sum(parts.values()),
    }


def _data(settings: Settings, train: int) -> tuple[Experiment, Any]:
    """The experiment and its folder of synthetic images."""
    folder = settings.folder / f"drawn-{train}"
    if not folder.exists():
        draw_folder(folder, scenes(settings.choose(224, 32), 8, settings.seed), train, 1, settings.seed)
    return settings.experiment(folder), folder


def _points(experiment: Experiment, device: torch.device) -> list[torch.Tensor]:
    """Coordinates of both images and permutations, as inputs of the baseline."""
    size, generator = experiment.batch_size, torch.Generator().manual_seed(experiment.seed)
    coords = [random_coords(size, experiment.points, generator).to(device) for _ in range(2)]
    partners = [published_permutation(size, generator) for _ in range(experiment.negatives)]
    return [*coords, torch.stack(partners).to(device)]


def training_steps(
    experiment: Experiment, features: Any, neighbors: torch.Tensor, backbone: Backbone
) -> Callable[[], None]:
    """A function that runs the next training step: draws the batch, and trains."""
    model: Stego = build_model(experiment, backbone.dim, N_CLASSES).to(backbone.device)
    optimizer, numbers = make_optimizer(model, experiment), count()

    def once() -> None:
        batch = draw_batch(features, neighbors, model, experiment, next(numbers), backbone)
        train_step(model, optimizer, batch, experiment, SHIFTS, backbone.precision)

    return once
