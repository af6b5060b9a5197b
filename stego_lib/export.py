"""Exports a run to an ONNX file, and compares the predictions of the file and the run."""

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
from .utils.progress import say, stage
from .utils.torch_state import usual_modes

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 18
PRECISIONS = ("float32", "int8")
OUTPUTS = ("labels", "scores", "similarity", "code", "features")
# Number of images for the comparison, at their own size and resized to (H, W).
COMPARED = 4
COMPARED_SIZES = ((400, 600), (192, 256))
# Minimum share of pixels with equal labels in float32.
MIN_AGREEMENT = 0.999


@usual_modes()
def export_onnx(
    run: Run, path: str | Path, *, precision: str = "float32", outputs: Sequence[str] = ("labels", "scores")
) -> dict[str, Any]:
    """Exports a run to ONNX: from "image", RGB uint8 (H, W, 3) of any size, to a label map of the same size.

    The graph includes resizing, normalization, backbone, head, cluster probe and matching, but no CRF. The metadata of
    the file contain names and colors of the ids, sizes and origin as JSON.

    Parameters
    ----------
    run
        The run.
    path
        The file, .onnx.
    precision
        "float32", or "int8" for 8-bit weights in matrix products, a quarter of the size.
    outputs
        One or several of

        * "labels": uint8 (H, W), 255 for dropped clusters;
        * "scores": float32 (n, H, W), one channel per id, and a last one for dropped clusters, if any;
        * "similarity": float32 (1, clusters, h, w), inner products of codes and cluster centers on the grid;
        * "code": float32 (1, K, h, w);
        * "features": float32 (1, C, h, w).

    Returns
    -------
    dict
        The metadata, and "path", "bytes" and "agreement", the share of pixels with the same labels as
        `run.predict(image, refine="none")` in float32 on the images "compared_on".

    Raises
    ------
    StegoError
        For missing packages, an unfinished run, invalid arguments, and a backbone that cannot be exported.

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
    if run.experiment.official.published or (run.taught is not None and run.taught.method != "logistic"):
        problem = 'The published resizing and method="neighbors" of run.teach cannot be exported'
        raise StegoError(f"{problem}. Use load_run(RUN, official={{'published': False}}) and method=\"logistic\".")
    path, run = user_path(path), _in_float32(run)
    if path.suffix != ".onnx":
        raise StegoError(f"{path} is not an .onnx file. Pass a path such as stego.onnx.")
    check_folder(path.parent)
    with stage("exporting the network and comparing it with predict"):
        images, source = _images(run)
        expected = [run.predict(image, refine="none") for image in images]
        model, agreement = _checked_graph(run, list(dict.fromkeys([*outputs, "labels"])), images, expected)
        if precision == "int8":
            model = _quantized(model)
            agreement = _agreement(model, images, expected)
    if "labels" not in outputs:  # only for the comparison
        del model.graph.output[-1]
    metadata = {
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
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    with atomic(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
    say(
        f"{shown_path(path)}: {path.stat().st_size / 1e6:.1f} MB, {precision}; {100 * agreement:.2f} % of the pixels "
        f"of {source} have the labels of predict{' without CRF' if run.experiment.crf else ''}"
    )
    return metadata | {"path": path, "bytes": path.stat().st_size, "agreement": agreement, "compared_on": source}


class Graph(nn.Module):
    """The network of a run, from an image, uint8 (H, W, 3), to `outputs`."""

    def __init__(self, run: Run, outputs: Sequence[str]):
        super().__init__()
        self.backbone, self.model, self.outputs = run.backbone, run.model, outputs
        self.size, self.mirror = run.experiment.eval_size, run.experiment.mirror
        self.taught = run.taught
        ids = run.ids.tolist()
        # Ids in the order of the channels; that of dropped clusters is the last.
        maps = [*range(len(run.segments)), *sorted({id_ for id_ in ids if id_ >= len(run.segments)})]
        clusters = [[cluster for cluster, id_ in enumerate(ids) if id_ == map_] for map_ in maps]
        # Clusters of each channel, padded with the index of a channel of minus infinity.
        widest = max(map(len, clusters))
        self.clusters = torch.tensor([row + [len(ids)] * (widest - len(row)) for row in clusters])
        self.ids = torch.tensor(maps, dtype=torch.uint8)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Computes `outputs` in this order."""
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
        padding = torch.full_like(maps[:1], torch.finfo(torch.float32).min)
        scores = torch.cat([maps, padding])[self.clusters].amax(1)
        labels = self.ids[scores.argmax(0)]
        computed = dict(features=views[0], code=code, similarity=similarity, scores=scores, labels=labels)
        return tuple(computed[name] for name in self.outputs)

    def resize(self, image: Tensor) -> Tensor:
        """`datasets.transforms.resize_image`, uint8 (3, H, W), with ONNX operations."""
        height, width = image.shape[1:]
        rows, columns = working_size(height, width, self.size, self.backbone.patch)
        return (_antialiased(rows, height) @ (image.float() @ _antialiased(columns, width).T)).round()


def _antialiased(new: int, old: int) -> Tensor:
    """Matrix of `F.interpolate(antialias=True)` along one axis, (new, old)."""
    step = old / new
    width: Any = torch.sym_max(step, 1.0)
    center = (torch.arange(new)[:, None] + 0.5) * step
    weights = (1 - (torch.arange(old) + 0.5 - center).abs() / width).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def _bilinear(new: int, old: int) -> Tensor:
    """Matrix of `F.interpolate(mode="bilinear")` along one axis, (new, old)."""
    position = ((torch.arange(new) + 0.5) * (old / new) - 0.5).clamp(min=0)
    position = position.minimum(torch.ones(1) * (old - 1))
    return (1 - (position[:, None] - torch.arange(old)).abs()).clamp(min=0)


def _checked_graph(
    run: Run, outputs: Sequence[str], images: Sequence[np.ndarray], expected: Sequence[np.ndarray]
) -> tuple["ModelProto", float]:
    """Exports the graph for images of all sizes; returns it and its `_agreement` with the run."""
    graph, example = Graph(run, outputs).eval(), torch.zeros(200, 300, 3, dtype=torch.uint8)
    sizes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    options: dict[str, Any] = dict(dynamo=True, opset_version=OPSET, verbose=False, dynamic_shapes=sizes)
    try:
        program = torch.onnx.export(graph, (example,), input_names=["image"], output_names=list(outputs), **options)
        assert program is not None  # with dynamo=True
        agreement = _agreement(program.model_proto, images, expected)
        if agreement >= MIN_AGREEMENT:
            return program.model_proto, agreement
        problem = f"only {100 * agreement:.2f} % of the pixels have the labels of the run"
    except Exception as error:  # torch and onnx raise many types for unsupported networks
        problem = brief(error)
    raise StegoError(
        f"Backbone {run.experiment.backbone!r} cannot be exported for images of all sizes ({problem}). "
        "Try a fixed size: load_run(RUN, eval_size=(224, 224))."
    )


def _quantized(model: "ModelProto") -> "ModelProto":
    """Quantizes the weights of matrix products to 8 bits, with a scale per column."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # warnings about graphs without shape inference
    options = dict(weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"])
    try:
        with TemporaryDirectory() as folder:
            quantize_dynamic(model, Path(folder) / "int8.onnx", **options)
            return onnx.load(Path(folder) / "int8.onnx")
    finally:
        logging.disable(before)


def _in_float32(run: Run) -> Run:
    """A copy of a run on the CPU in float32."""
    converted = copy.copy(run)
    converted.experiment = run.experiment.but(device="cpu", precision="float32")
    converted.model = copy.deepcopy(run.model).cpu().eval()
    ready = (run.backbone.device.type, run.backbone.precision) == ("cpu", torch.float32)
    converted.backbone = run.backbone if ready else Backbone.of(converted.experiment)
    return converted


def _images(run: Run) -> tuple[list[np.ndarray], str]:
    """Images for the comparison, uint8 (H, W, 3), and a description."""
    try:
        dataset = open_training_set(run.experiment)
        rows = np.linspace(0, len(dataset) - 1, COMPARED).astype(int).tolist()
        images, source = [dataset.image(row).permute(1, 2, 0).numpy() for row in rows], "training images"
    except DataNotFound:
        from .datasets.painter import paint_scene

        images, source = [paint_scene(0, index)[0] for index in range(COMPARED)], "drawn scenes"
    resized = [np.array(Image.fromarray(image).resize(size[::-1])) for image in images for size in COMPARED_SIZES]
    return [*images, *resized], f"{COMPARED} {source} at {1 + len(COMPARED_SIZES)} sizes"


def _agreement(model: "ModelProto", images: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Share of pixels of images, uint8 (H, W, 3), with the expected labels."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    labels = [session.run(["labels"], {"image": np.array(image)})[0] for image in images]
    return float(np.concatenate([(a == b).ravel() for a, b in zip(labels, expected, strict=True)]).mean())
