"""Writes a run as one ONNX file, and compares what the file predicts with what the run predicts."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..backbone import Backbone
from ..datasets import open_training_set
from ..datasets.painter import paint_scene
from ..utils.errors import DataNotFound, StegoError, brief
from ..utils.files import atomic
from ..utils.notices import notice
from ..utils.paths import shown_path, user_path
from ..utils.progress import say
from .graph import OUTPUTS, assemble, describe, needed, quantized, trace

if TYPE_CHECKING:
    import onnx

    from ..run import Run

PRECISIONS = ("float32", "int8")
COMPARED = 8
"""Images on which the file is compared with the run."""
ENOUGH = 0.999
"""Share of the pixels on which a graph in float32 must agree with the run."""


def export_onnx(
    run: "Run", path: str | Path, precision: str, outputs: Sequence[str], ids: Sequence[int], longest: float
) -> dict[str, Any]:
    """See `Run.export`. ids, longest: as in `graph.assemble`."""
    needed()
    _refuse(precision, outputs)
    path, run = user_path(path), _in_float32(run)
    images, source = _images(run)
    core, size, agreeing = _traced(run, ids, longest, images)
    graph = assemble(core, run, outputs, size, ids, longest)
    if precision == "int8":
        graph = quantized(graph)
        agreeing = agreement(run, quantized(assemble(core, run, ("labels",), size, ids, longest)), images)
    segments, experiment = run.segments, run.experiment
    about = {
        "names": segments.names, "ids": list(ids), "colors": segments.colors, "outputs": {name: OUTPUTS[name] for name in outputs},
        "matched": run.matched, "precision": precision, "working_size": size or experiment.eval_size, "free_sizes": size is None,
        "patch": run.backbone.patch, "mirror": experiment.mirror, "dataset": experiment.dataset, "backbone": experiment.backbone,
        "run": run.folder.name, "step": run.step, "crf": False,
    }  # fmt: skip
    describe(graph, about)
    with atomic(path) as temporary:
        temporary.write_bytes(graph.SerializeToString())
    size_of_file = path.stat().st_size
    say(
        f"{shown_path(path)}: {size_of_file / 1e6:.1f} MB, {precision}; labels {100 * agreeing:.2f} % of the pixels of {source} as "
        f"predict does{'; the CRF of the evaluation is not in it' if experiment.crf else ''}"
    )
    return about | {"path": path, "bytes": size_of_file, "agreement": agreeing, "compared_on": source}


def _refuse(precision: str, outputs: Sequence[str]) -> None:
    """StegoError for a precision or an output that there is not."""
    if precision not in PRECISIONS:
        raise StegoError(f"precision = {precision!r}: a file has one of {', '.join(PRECISIONS)}")
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown or isinstance(outputs, str) or not outputs:
        raise StegoError(f"outputs = {outputs!r}: a tuple of {', '.join(OUTPUTS)} is expected")


def _in_float32(run: "Run") -> "Run":
    """The same run on the CPU in float32; the run itself stays as it is."""
    found = copy.copy(run)
    found.experiment = run.experiment.but(device="cpu", precision="float32")
    found.model = copy.deepcopy(run.model).cpu().eval()
    there = run.backbone
    ready = (there.device.type, there.precision) == ("cpu", torch.float32)
    found.backbone = there if ready else Backbone.of(found.experiment)
    return found


def _images(run: "Run") -> tuple[list[np.ndarray], str]:
    """Images to compare on, uint8 (H, W, 3), whole and as an upright half, and where they are from."""
    try:
        dataset = open_training_set(run.experiment)
        rows = np.linspace(0, len(dataset) - 1, min(COMPARED, len(dataset))).astype(int)
        found = [dataset.image(int(row)).permute(1, 2, 0).numpy() for row in rows]
        source = f"{len(rows)} training images of {run.experiment.dataset}"
    except DataNotFound:
        found = [paint_scene(0, index)[0] for index in range(COMPARED)]
        source = f"{COMPARED} drawn scenes, for the training images of {run.experiment.dataset} are not here"
    return [image[:, : image.shape[1] // 2] if number % 2 else image for number, image in enumerate(found)], source


def _traced(
    run: "Run", ids: Sequence[int], longest: float, images: list[np.ndarray]
) -> tuple["onnx.ModelProto", tuple[int, int] | None, float]:
    """The traced network, the one working size that it needs (None for free sizes), and its `agreement` on `images`.

    Raises StegoError for a backbone that cannot be traced at all.
    """
    shape = run.experiment.eval_size
    only = (shape, shape) if isinstance(shape, int) else shape

    def attempt(size: tuple[int, int] | None) -> tuple["onnx.ModelProto", float]:
        core = trace(run, size)
        return core, agreement(run, assemble(core, run, ("labels",), size, ids, longest), images)

    try:
        core, share = attempt(None)
        if share >= ENOUGH:
            return core, None, share
        why = f"its graph agrees with the run on {100 * share:.2f} % of the pixels"
    except Exception as error:  # torch and onnx fail in many ways at networks that they do not know
        why = brief(error)
    notice(
        f"backbone {run.experiment.backbone!r} cannot be exported with free sizes ({why}): the graph resizes every image to "
        f"{only[0]} x {only[1]} pixels, whatever its aspect ratio"
    )
    try:
        core, share = attempt(only)
    except Exception as error:
        raise StegoError(f"backbone {run.experiment.backbone!r} cannot be exported: {brief(error)}") from error
    return core, only, share


def agreement(run: "Run", graph: "onnx.ModelProto", images: Sequence[np.ndarray]) -> float:
    """Share of the pixels of images, uint8 (H, W, 3), that a graph with the output "labels" labels as `Run.predict` does."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    same = total = 0
    for image in images:
        (found,) = session.run(["labels"], {"image": np.ascontiguousarray(image)})
        same, total = same + int((found == run.predict(image)).sum()), total + found.size
    return same / total
