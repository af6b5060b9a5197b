"""Evaluation: images of 320 px with mirror averaging, with and without CRF."""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import psutil
import torch

from stego_lib import Backbone, Experiment, Run, evaluate, open_dataset, train
from stego_lib import crf as crf_module
from stego_lib.loss import upsample
from stego_lib.metrics import confusion
from stego_lib.model import build_model

from .material import N_CLASSES, Settings, draw_folder, photographs, scenes, smooth
from .measuring import in_child, interleaved, timed
from .published_order import Published, crf

# Variant -> options of `Run.predict` for large images.
PREDICTED: dict[str, dict[str, Any]] = {
    "whole": dict(refine="none"),
    "whole, CRF": dict(refine="crf"),
    "tiles": dict(refine="none", tile=448),
    "tiles, CRF": dict(refine="crf", tile=448),
}


def evaluation(settings: Settings) -> dict[str, Any]:
    """One image of 320 px with its mirror image, without and with CRF: ViT-S/8, K = 70, 27 classes.

    Ours is `evaluate` on a folder of JPEGs, divided by the number of images, without stored features; it includes
    reading files, confusion matrix and matching. The images of the baseline are in memory. "backbone alone" is both
    passes of all decoded images; "busy" is the CPU utilization of ours with CRF. Kinds: a smooth synthetic image, and
    one with texture.
    """
    number, size = settings.choose(8, 3), settings.choose(320, 48)
    kinds = {"smooth (drawn)": smooth(size), "texture (drawn)": scenes(size, 8, settings.seed)}
    if settings.photos:
        kinds["texture (photographs)"] = photographs(settings.photos, size)
        del kinds["texture (drawn)"]
    found = {}
    for kind, images in kinds.items():
        folder = draw_folder(settings.folder / f"evaluation-{len(found)}", images, 1, number, settings.seed)
        found[kind] = _kind(settings, settings.experiment(folder), number)
    return {"kinds": found, "images": number}


def _kind(settings: Settings, experiment: Experiment, number: int) -> dict[str, Any]:
    """Seconds per image of each variant."""
    backbone, size, runs_dir = Backbone.of(experiment), experiment.eval_size, settings.folder / "runs"
    run = made_run(experiment, backbone, runs_dir)
    theirs = Published(backbone, run.model, experiment.weights, (0, 0, 0))
    dataset, label = open_dataset("folder", experiment.data_root, "val"), torch.zeros(size, size, dtype=torch.int64)
    images = cycle(dataset.image(i) for i in range(number))
    shown: dict[str, Any] = {}

    def plain() -> None:
        shown["image"] = next(images)
        code = theirs.code(shown["image"][None].to(backbone.device))
        shown["maps"] = {name: values.cpu() for name, values in theirs.maps(code, (size, size)).items()}
        for values in shown["maps"].values():
            confusion(values.argmax(0), label, N_CLASSES, N_CLASSES)

    def refined() -> None:
        for values in shown["maps"].values():
            confusion(crf(shown["image"], values), label, N_CLASSES, N_CLASSES)

    def ours(with_crf: bool) -> None:
        shutil.rmtree(runs_dir / "features", ignore_errors=True)
        run.experiment = experiment.but(crf=with_crf)
        evaluate(run, baselines=False)

    batch = torch.stack([dataset.image(i) for i in range(number)])

    def passes() -> None:
        for view in (batch, batch.flip(-1)):
            backbone(view)

    ways = {"published, no CRF": plain, "ours, no CRF": partial(ours, False), "ours, backbone alone": passes}
    ways |= {"ours, with CRF": partial(ours, True)} | ({"published, its CRFs": refined} if pydensecrf() else {})
    found = interleaved(ways, min(settings.repeats, 3), settings.seconds)
    for name in found:
        if name.startswith("ours"):
            found[name] = {key: value / number if key.endswith("_s") else value for key, value in found[name].items()}
    busy = {"busy": busy_share(partial(ours, True))} if "ours, with CRF" in ways else {}
    return {"ways": found, **busy}


def pydensecrf() -> bool:
    """Whether the published code's CRF is installed."""
    return find_spec("pydensecrf") is not None


def busy_share(work: Callable[[], Any]) -> float:
    """CPU utilization of this process and its workers during `work`, from 0 to 1."""
    process = psutil.Process()
    begun, own = time.perf_counter(), sum(process.cpu_times()[:2])
    of_workers: dict[int, float] = {}
    ended = Event()

    def look() -> None:
        while not ended.wait(0.02):
            for child in process.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    of_workers[child.pid] = sum(child.cpu_times()[:2])

    watching = Thread(target=look, daemon=True)
    watching.start()
    work()
    wall = time.perf_counter() - begun
    ended.set()
    watching.join()
    return (sum(process.cpu_times()[:2]) - own + sum(of_workers.values())) / wall / len(process.cpu_affinity())


def crf_engines(settings: Settings) -> dict[str, Any]:
    """The dense CRF of three maps of an image of 320 px, 27 classes: pydensecrf, and the project's own engine.

    Seconds are of one process. "same_labels" is the fraction of pixels with the same label, "difference" the largest
    difference of a probability.
    """
    size = settings.choose(320, 48)
    shown = photographs(settings.photos, size) if settings.photos else scenes(size)
    coarse = torch.randn(3, N_CLASSES, size // 8, size // 8, generator=torch.Generator().manual_seed(settings.seed))
    maps = [one.numpy() for one in upsample(3 * coarse, (size, size)).softmax(1)]
    ways = {"lattice": partial(crf_module.refine, shown[0], maps)}
    if not pydensecrf():
        return {"ways": timed(ways, settings), "skipped": {"pydensecrf": "it is not installed"}}
    ways = {"pydensecrf": partial(crf_module.refine, shown[0], maps, engine="pydensecrf"), **ways}
    theirs, ours = (way() for way in ways.values())
    same = [float((a.argmax(0) == b.argmax(0)).mean()) for a, b in zip(theirs, ours, strict=True)]
    difference = max(float(np.abs(a - b).max()) for a, b in zip(theirs, ours, strict=True))
    return {"ways": timed(ways, settings), "same_labels": min(same), "difference": difference}


def predict(settings: Settings) -> dict[str, Any]:
    """`Run.predict` for images of 1, 12 and 48 megapixels, whole and in tiles of 448 px, without and with CRF.

    The embedded backbone, K = 70, 27 classes, a head with random weights. "seconds" and peak memory, each in a separate
    process. Tiles are measured for one megapixel; their time grows with the number of pixels, see `raster`.
    """
    folder = draw_folder(settings.folder / "drawn", scenes(settings.choose(320, 48), 2), 1, 1)
    kinds = {}
    for megapixels in (1, 12, 48) if not settings.tiny else (0.01,):
        for name, options in PREDICTED.items():
            if "tile" not in options or megapixels <= 1:
                told = (settings.folder, int(settings.tiny), folder, megapixels, json.dumps(options))
                kinds[f"{megapixels} MP, {name}"] = in_child("benchmarks.children", "predict", *told)
    return {"images": kinds}


def made_run(experiment: Experiment, backbone: Backbone, runs_dir: Path) -> Run:
    """A finished run with random weights."""
    model = build_model(experiment, backbone.dim, N_CLASSES).to(backbone.device)
    classes = open_dataset("folder", experiment.data_root, "val").classes
    folder = runs_dir / "run"
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, experiment, classes, model, backbone)
    run.save_experiment()
    run.step = experiment.steps
    return run


def short_run(settings: Settings, drawn: Path) -> Run:
    """A run on the embedded backbone after two steps on the images of `drawn`."""
    experiment = settings.experiment(drawn, backbone=settings.embedded(), steps=2, probes="after")
    return train(experiment, runs_dir=settings.folder / "runs")
