"""ONNX export compared with `Run.predict`."""

from functools import partial
from typing import Any

import onnxruntime

from stego_lib import Experiment, train
from stego_lib.backbone import EMBEDDED_FOR_PHOTOGRAPHS
from stego_lib.datasets import open_training_set
from stego_lib.datasets.scenes import draw_scenes
from stego_lib.export import export_onnx
from stego_lib.utils.paths import data_root

from .material import Settings
from .measuring import timed


def exports(settings: Settings) -> dict[str, Any]:
    """Time from pixels to labels of an image, size of the files, and fraction of pixels with the label of `predict`.

    Runs of the embedded backbones on scenes of 128 px and on data/photographs. The file is run with onnxruntime on the
    CPU; `predict` uses torch, without CRF. Both start from an image in memory.
    """
    images = settings.folder / "data"
    draw_scenes(images / "scenes", train=settings.choose(200, 16), val=2)
    made = {"scenes": Experiment.preset("scenes", data_root=str(images), steps=settings.choose(300, 2), crf=False)}
    photographs = dict(
        data_root=str(data_root() / "photographs"), backbone=EMBEDDED_FOR_PHOTOGRAPHS, n_classes=6, steps=100
    )
    if not settings.tiny:
        made["photographs"] = Experiment.preset("folder", **photographs, crf=False)
    return {"kinds": {kind: _kind(settings, experiment) for kind, experiment in made.items()}}


def _kind(settings: Settings, experiment: Experiment) -> dict[str, Any]:
    """Seconds per image of each variant, and properties of the files."""
    run = train(experiment.but(seed=settings.seed), runs_dir=settings.folder / "runs")
    image = open_training_set(run.experiment).image(0).permute(1, 2, 0).contiguous().numpy()
    ways, files = {"predict": partial(run.predict, image)}, {}
    for precision in ("float32", "int8"):
        about = export_onnx(run, settings.folder / f"{precision}.onnx", precision=precision, outputs=("labels",))
        session = onnxruntime.InferenceSession(about["path"], providers=["CPUExecutionProvider"])
        ways[f"onnxruntime, {precision}"] = partial(session.run, ["labels"], {"image": image})
        files[precision] = {key: about[key] for key in ("bytes", "agreement", "compared_on")}
    return {"ways": timed(ways, settings), "files": files, "image": list(image.shape[:2])}
