"""Writes a run as one ONNX file, and compares what the file predicts with what the run predicts."""

import copy
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .backbone import Backbone
from .datasets import open_training_set
from .model import mean_over_flips
from .predict import working_size
from .run import Run
from .utils.errors import DataNotFound, StegoError, brief, check_choice, check_installed
from .utils.files import atomic, check_folder
from .utils.paths import shown_path, user_path
from .utils.progress import say
from .utils.torch_state import usual_modes

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 18
PRECISIONS = ("float32", "int8")
OUTPUTS = ("labels", "scores", "similarity", "code", "features")
# Images on which a file is compared with the run: at their own size, and resized to (H, W).
COMPARED = 4
COMPARED_SIZES = ((400, 600), (192, 256))
# Share of the pixels on which a graph in float32 must agree with the run.
MIN_AGREEMENT = 0.999


@usual_modes()
def export_onnx(
    run: Run, path: str | Path, *, precision: str = "float32", outputs: Sequence[str] = ("labels", "scores")
) -> dict[str, Any]:
    """Writes a run as one ONNX file: from "image", RGB uint8 (H, W, 3) of any size, to a label map of that size.

    Resizing, normalization, backbone, head, cluster probe and matching are in the graph; the dense CRF is not. The
    file's metadata hold the names and colors of the ids, sizes and origin, each as JSON.

    Parameters
    ----------
    run
        The run.
    path
        The file, .onnx.
    precision
        "float32", or "int8": the weights of the matrix products in 8 bits, a quarter of the size.
    outputs
        One or several of

        * "labels": uint8 (H, W), 255 for dropped clusters;
        * "scores": float32 (n, H, W), one map per id, the largest wins; a last one for dropped clusters, if any;
        * "similarity": float32 (1, clusters, h, w), codes times cluster centers on the grid;
        * "code": float32 (1, K, h, w);
        * "features": float32 (1, C, h, w), of the backbone.

    Returns
    -------
    dict
        The metadata, and "path", "bytes", "agreement": the share of the pixels that the file labels as
        `run.predict(image, refine="none")` does in float32, on the images that "compared_on" names.

    Raises
    ------
    StegoError
        For missing packages, an unfinished run, an unknown precision or output, and a backbone that cannot be exported.

    Examples
    --------
    >>> export_onnx(run, "stego.onnx", precision="int8")["agreement"]
    """
    check_installed("export_onnx", ["onnx", "onnxruntime", "onnxscript"], "export")
    check_choice("precision", precision, PRECISIONS)
    outputs = [outputs] if isinstance(outputs, str) else list(outputs)
    for name in outputs:
        check_choice("outputs", name, OUTPUTS)
    run.check_fitted()
    if run.taught is not None and run.taught.method != "logistic":
        raise StegoError('A run taught with "neighbors" cannot be exported. Call run.teach(..., method="logistic").')
    path, run = user_path(path), _in_float32(run)
    if path.is_dir():
        raise StegoError(f"{path} is a folder. Name a file in it, such as {path / 'stego.onnx'}.")
    check_folder(path.parent)
    images, source = _images(run)
    expected = [run.predict(image, refine="none") for image in images]
    model, agreement = _checked_graph(run, list(dict.fromkeys([*outputs, "labels"])), images, expected)
    if precision == "int8":
        model = _quantized(model)
        agreement = _agreement(model, images, expected)
    if "labels" not in outputs:  # they were needed for the comparison
        del model.graph.output[-1]
    about = {
        "names": run.segments.names,
        "ids": run.ids.tolist(),
        "colors": run.segments.colors,
        "matched": run.matched,
        "precision": precision,
        "working_size": run.experiment.eval_size,
        "patch": run.backbone.patch,
        "mirror": run.experiment.mirror,
        "dataset": run.experiment.dataset,
        "backbone": run.experiment.backbone,
        "run": run.folder.name,
        "step": run.step,
    }
    for key, value in about.items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    with atomic(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
    say(
        f"{shown_path(path)}: {path.stat().st_size / 1e6:.1f} MB, {precision}; labels {100 * agreement:.2f} % of "
        f"the pixels of {source} as predict does{', without CRF' if run.experiment.crf else ''}"
    )
    return about | {"path": path, "bytes": path.stat().st_size, "agreement": agreement, "compared_on": source}


class Graph(nn.Module):
    """A run from an image, uint8 (H, W, 3), to `outputs`."""

    def __init__(self, run: Run, outputs: Sequence[str]):
        super().__init__()
        self.backbone, self.model, self.outputs = run.backbone, run.model, outputs
        self.size, self.mirror = run.experiment.eval_size, run.experiment.mirror
        self.published, self.taught = run.experiment.official.published, run.taught
        ids = run.ids.tolist()
        # Ids in the order of their maps; that of dropped clusters comes last, and may win too.
        maps = [*range(len(run.segments)), *sorted({id_ for id_ in ids if id_ >= len(run.segments)})]
        clusters = [[cluster for cluster, id_ in enumerate(ids) if id_ == map_] for map_ in maps]
        # Clusters of each map, filled up with the number of a map of minus infinity.
        widest = max(map(len, clusters))
        self.clusters = torch.tensor([row + [len(ids)] * (widest - len(row)) for row in clusters])
        self.ids = torch.tensor(maps, dtype=torch.uint8)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in their order."""
        height, width = image.shape[:2]
        pixels = self.resize(image.permute(2, 0, 1))[None].float()
        images = torch.cat([pixels, pixels.flip(-1)]) if self.mirror else pixels
        features = self.backbone.maps((images / 255 - self.backbone.mean) / self.backbone.std)
        views = features.chunk(2) if self.mirror else (features,)
        code = self.model.mean_code(*views)
        similarity = self.model.cluster_probe.similarity(code)
        cells = similarity[0]
        if self.taught is not None:
            maps = code if self.taught.on == "codes" else mean_over_flips(*views)
            cells = self.taught.scores(maps).grid[0]
        maps = _bilinear(height, cells.shape[1]) @ (cells @ _bilinear(width, cells.shape[2]).T)
        never = torch.full_like(maps[:1], torch.finfo(torch.float32).min)
        scores = torch.cat([maps, never])[self.clusters].amax(1)
        labels = self.ids[scores.argmax(0)]
        made = dict(features=views[0], code=code, similarity=similarity, scores=scores, labels=labels)
        return tuple(made[name] for name in self.outputs)

    def resize(self, image: Tensor) -> Tensor:
        """`datasets.transforms.resize_image`, uint8 (3, H, W), in operations that ONNX has."""
        height, width = image.shape[1:]
        rows, columns = working_size(height, width, self.size, self.backbone.patch)
        if self.published:
            return image[:, _nearest(rows, height)][:, :, _nearest(columns, width)]
        return (_antialiased(rows, height) @ (image.float() @ _antialiased(columns, width).T)).round()


def _antialiased(new: int, old: int) -> Tensor:
    """Share of each old pixel of a line in each new one, (new, old), as `F.interpolate(antialias=True)` has it."""
    step = old / new
    width: Any = torch.sym_max(step, 1.0)
    center = (torch.arange(new)[:, None] + 0.5) * step
    weights = (1 - (torch.arange(old) + 0.5 - center).abs() / width).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def _bilinear(new: int, old: int) -> Tensor:
    """Share of each old pixel of a line in each new one, (new, old), as `F.interpolate(mode="bilinear")` has it."""
    position = ((torch.arange(new) + 0.5) * (old / new) - 0.5).clamp(min=0)
    position = position.minimum(torch.ones(1) * (old - 1))
    return (1 - (position[:, None] - torch.arange(old)).abs()).clamp(min=0)


def _nearest(new: int, old: int) -> Tensor:
    """The old pixel that each new one of a line takes, int64 (new,), by a running sum as in `nearest_grid`."""
    steps = torch.ones(new, dtype=torch.float64) * old / new  # a quotient of integers would be float32 in ONNX
    return torch.where(torch.arange(new) == 0, steps / 2, steps).cumsum(0).long()


def _checked_graph(
    run: Run, outputs: Sequence[str], images: Sequence[np.ndarray], expected: Sequence[np.ndarray]
) -> tuple["ModelProto", float]:
    """The graph for images of all sizes, and its `_agreement` with the run."""
    graph, example = Graph(run, outputs).eval(), torch.zeros(200, 300, 3, dtype=torch.uint8)
    with torch.no_grad():
        graph(example)  # so that a bug in the graph is not reported as a network that cannot be exported
    try:
        dynamic = torch.export.Dim.DYNAMIC
        program = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            dynamic_shapes=({0: dynamic, 1: dynamic},),
            input_names=["image"],
            output_names=list(outputs),
        )
        assert program is not None  # with dynamo=True
        model = program.model_proto
        agreement = _agreement(model, images, expected)
        problem = f"the graph labels only {100 * agreement:.2f} % of the pixels as the run does"
        if agreement >= MIN_AGREEMENT:
            return model, agreement
    except Exception as error:  # torch and onnx raise many types for networks that they do not know
        problem = brief(error)
    raise StegoError(
        f"Backbone {run.experiment.backbone!r} cannot be exported for images of all sizes ({problem}). "
        "One size for all images may work: load_run(RUN, eval_size=(224, 224))."
    )


def _quantized(model: "ModelProto") -> "ModelProto":
    """The model with the weights of its matrix products in 8 bits, a scale for each column."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # advice on graphs without inferred shapes
    options = dict(weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"])
    try:
        with TemporaryDirectory() as folder:
            quantize_dynamic(model, Path(folder) / "int8.onnx", **options)
            return onnx.load(Path(folder) / "int8.onnx")
    finally:
        logging.disable(before)


def _in_float32(run: Run) -> Run:
    """The same run on the CPU in float32; the run itself stays as it is."""
    converted = copy.copy(run)
    converted.experiment = run.experiment.but(device="cpu", precision="float32")
    converted.model = copy.deepcopy(run.model).cpu().eval()
    ready = (run.backbone.device.type, run.backbone.precision) == ("cpu", torch.float32)
    converted.backbone = run.backbone if ready else Backbone.of(converted.experiment)
    return converted


def _images(run: Run) -> tuple[list[np.ndarray], str]:
    """Images to compare on, uint8 (H, W, 3), at their own and other sizes, and where they are from."""
    try:
        dataset = open_training_set(run.experiment)
        rows = np.linspace(0, len(dataset) - 1, COMPARED).astype(int)
        images = [dataset.image(row).permute(1, 2, 0).numpy() for row in rows.tolist()]
        source = f"training images of {run.experiment.dataset}"
    except DataNotFound:
        from .datasets.painter import paint_scene

        images = [paint_scene(0, index)[0] for index in range(COMPARED)]
        source = "drawn scenes (the training images are not here)"
    resized = [np.array(Image.fromarray(image).resize(size[::-1])) for image in images for size in COMPARED_SIZES]
    return [*images, *resized], f"{COMPARED} {source} at {1 + len(COMPARED_SIZES)} sizes"


def _agreement(model: "ModelProto", images: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Share of the pixels of images, uint8 (H, W, 3), that a model labels as expected."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    labels = [session.run(["labels"], {"image": np.array(image)})[0] for image in images]
    return float(np.concatenate([(a == b).ravel() for a, b in zip(labels, expected, strict=True)]).mean())
