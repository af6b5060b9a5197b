"""The ONNX graph of a run: from an RGB image of any size to scores at the image's own resolution.

Resizing and upsampling are written in ONNX's own text format; the network in the middle is traced by torch.
"""

import json
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backbone import Backbone
from ..utils.errors import StegoError

if TYPE_CHECKING:
    import onnx

    from ..run import Run

OPSET = 18
"""The oldest ONNX operators that resize with antialiasing."""
LARGEST = 1024
"""Grid cells per side of the largest working size that a graph with free sizes takes."""
OUTPUTS = {
    "labels": "uint8 (H, W), the id of each pixel, 255 for none",
    "scores": "float32 (n, H, W), one map for each id, higher is more likely; a last one for clusters that were dropped, if any",
    "similarity": "float32 (1, clusters, h, w), codes times cluster centers on the grid",
    "code": "float32 (1, K, h, w)",
    "features": "float32 (1, C, h, w), of the backbone",
}
"""What a graph can return."""


class Core(nn.Module):
    """Backbone, head and cluster probe: float32 pixels (1, 3, H, W) in 0..255 -> features, code and similarity on the grid."""

    def __init__(self, backbone: Backbone, model: Any, mirror: bool):
        super().__init__()
        self.backbone, self.model, self.mirror = backbone, model, mirror

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three maps of one image."""
        images = torch.cat([pixels, pixels.flip(-1)]) if self.mirror else pixels
        found = self.backbone.maps((images / 255 - self.backbone.mean) / self.backbone.std)
        features, flipped = found.chunk(2) if self.mirror else (found, None)
        code = self.model.mean_code(features, flipped)
        return features, code, self.model.cluster_probe.similarity(code)


def trace(run: "Run", size: tuple[int, int] | None) -> "onnx.ModelProto":
    """`Core` as a graph, of a run on the CPU in float32; with free sizes where `size` is None."""
    patch, core = run.backbone.patch, Core(run.backbone, run.model, run.experiment.mirror).eval()
    height, width = size or (4 * patch, 6 * patch)  # unlike each other, so that none is taken for the other
    sides = [patch * torch.export.Dim(name, min=1, max=LARGEST) for name in ("h", "w")]
    program = torch.onnx.export(
        core, (torch.rand(1, 3, height, width),), dynamo=True, opset_version=OPSET, verbose=False,
        dynamic_shapes=None if size else ({2: sides[0], 3: sides[1]},),
        input_names=["pixels"], output_names=["features", "code", "similarity"],
    )  # fmt: skip
    return program.model_proto


def assemble(
    core: "onnx.ModelProto",
    run: "Run",
    outputs: Sequence[str],
    size: tuple[int, int] | None,
    ids: Sequence[int],
    longest: float,
) -> "onnx.ModelProto":
    """The whole graph of a run.

    Parameters
    ----------
    core
        The network, from `trace`.
    run
        The run.
    outputs
        Keys of `OUTPUTS`.
    size
        Working size (H, W) of every image; None brings an image to the size that `Run.predict` works at.
    ids
        Id of each cluster in label maps.
    longest
        Aspect ratio up to which the shorter side is brought to the evaluation size.
    """
    import onnx
    from onnx import compose

    graph = compose.merge_models(
        _parsed(_resizing(run, size, longest)), core, io_map=[("resized", "pixels")],
        inputs=["image"], outputs=["height_width", "features", "code", "similarity"],
    )  # fmt: skip
    if {"labels", "scores"} & set(outputs):
        graph = compose.merge_models(
            graph, _parsed(_upsampling(ids, len(run.segments))),
            io_map=[("height_width", "size"), ("similarity", "cells")], inputs=["image"],
            outputs=["scores", "labels", "features", "code", "similarity"],
        )  # fmt: skip
    del graph.graph.value_info[:]  # the parts name unknown sizes alike, and a runtime would take them for equal
    kept = {output.name: output for output in graph.graph.output}
    del graph.graph.output[:]
    graph.graph.output.extend(kept[name] for name in outputs)
    del graph.opset_import[:]  # merging lists the same operators once for each part
    graph.opset_import.append(onnx.helper.make_opsetid("", OPSET))
    onnx.checker.check_model(graph)
    return graph


def _parsed(text: str) -> "onnx.ModelProto":
    import onnx

    header = f'<ir_version: 10, opset_import: ["": {OPSET}]>\n'
    return onnx.parser.parse_model(header + text)


def _resizing(run: "Run", size: tuple[int, int] | None, longest: float) -> str:
    """uint8 image (H, W, 3) -> "resized", float32 (1, 3, h, w) in 0..255, as `Run.predict` resizes it."""
    patch, shorter = run.backbone.patch, size or run.experiment.eval_size
    if isinstance(shorter, tuple):
        target = f"target = Constant <value = int64[2] {{{shorter[0]}, {shorter[1]}}}> ()"
    else:
        target = f"""
        sides = Cast <to = 11> (height_width)
        short = ReduceMin <keepdims = 1> (sides)
        long = ReduceMax <keepdims = 1> (sides)
        side = Constant <value = double[1] {{{float(shorter)}}}> ()
        most = Constant <value = double[1] {{{float(longest * shorter)}}}> ()
        by_short = Div (side, short)
        by_long = Div (most, long)
        scale = Min (by_short, by_long)
        patch = Constant <value = double[1] {{{float(patch)}}}> ()
        one = Constant <value = double[1] {{1.0}}> ()
        pixels_wanted = Mul (sides, scale)
        cells_wanted = Div (pixels_wanted, patch)
        cells_rounded = Round (cells_wanted)
        cells_taken = Max (cells_rounded, one)
        target_double = Mul (cells_taken, patch)
        target = Cast <to = 7> (target_double)"""
    if run.experiment.official.published:  # the nearest pixel, found by a running sum as Pillow does
        resize = (
            "\n".join(_nearest(axis) for axis in (0, 1))
            + """
        some_rows = Gather <axis = 2> (large, taken_0)
        resized = Gather <axis = 3> (some_rows, taken_1)"""
        )
    else:
        resize = """
        front = Constant <value = int64[2] {1, 3}> ()
        sizes = Concat <axis = 0> (front, target)
        exact = Resize <mode = "linear", antialias = 1, coordinate_transformation_mode = "half_pixel"> (large, "", "", sizes)
        resized = Round (exact)"""
    return f"""
    resizing (uint8[H, W, 3] image) => (float[1, 3, working_height, working_width] resized, int64[2] height_width) {{
        height_width = Shape <start = 0, end = 2> (image)
        {target}
        channels = Transpose <perm = [2, 0, 1]> (image)
        values = Cast <to = 1> (channels)
        first = Constant <value = int64[1] {{0}}> ()
        large = Unsqueeze (values, first)
        {resize}
    }}"""


def _nearest(axis: int) -> str:
    """Positions that a nearest-pixel resize takes along an axis, as `transforms.nearest_grid` finds them."""
    return f"""
        at_{axis} = Constant <value = int64[1] {{{axis}}}> ()
        old_{axis} = Gather <axis = 0> (height_width, at_{axis})
        new_{axis} = Gather <axis = 0> (target, at_{axis})
        old_double_{axis} = Cast <to = 11> (old_{axis})
        new_double_{axis} = Cast <to = 11> (new_{axis})
        step_{axis} = Div (old_double_{axis}, new_double_{axis})
        half_{axis} = Constant <value = double[1] {{0.5}}> ()
        start_{axis} = Mul (step_{axis}, half_{axis})
        all_{axis} = Expand (step_{axis}, new_{axis})
        one_{axis} = Constant <value = int64[1] {{1}}> ()
        zero_{axis} = Constant <value = int64[1] {{0}}> ()
        rest_{axis} = Slice (all_{axis}, one_{axis}, new_{axis}, zero_{axis})
        steps_{axis} = Concat <axis = 0> (start_{axis}, rest_{axis})
        along_{axis} = Constant <value = int64 {{0}}> ()
        sums_{axis} = CumSum (steps_{axis}, along_{axis})
        taken_{axis} = Cast <to = 7> (sums_{axis})"""


def _upsampling(ids: Sequence[int], count: int) -> str:
    """Similarities (1, clusters, h, w) on the grid -> scores (n, H, W) of the ids of `Run.predict`, and labels."""
    maps = [
        *range(count),
        *sorted({id_ for id_ in ids if id_ >= count}),
    ]  # a last one for dropped clusters, which may win too
    of_id = [[cluster for cluster, id_ in enumerate(ids) if id_ == wanted] for wanted in maps]
    widest = max(map(len, of_id))
    nothing = len(ids)  # a map of minus infinity, for ids without a cluster
    table = [clusters + [nothing] * (widest - len(clusters)) for clusters in of_id]
    numbers = ", ".join(str(number) for line in table for number in line)
    return f"""
    upsampling (float[1, clusters, h, w] cells, int64[2] size) => (float[n, H, W] scores, uint8[H, W] labels) {{
        maps_front = Constant <value = int64[2] {{1, {len(ids)}}}> ()
        maps_sizes = Concat <axis = 0> (maps_front, size)
        maps = Resize <mode = "linear", coordinate_transformation_mode = "half_pixel"> (cells, "", "", maps_sizes)
        axis_0 = Constant <value = int64[1] {{0}}> ()
        known = Squeeze (maps, axis_0)
        axis_1 = Constant <value = int64[1] {{1}}> ()
        shape_of_none = Concat <axis = 0> (axis_1, size)
        never = Constant <value = float[1] {{{np.finfo(np.float32).min}}}> ()
        none = Expand (never, shape_of_none)
        with_none = Concat <axis = 0> (known, none)
        clusters_of_id = Constant <value = int64[{len(maps)}, {widest}] {{{numbers}}}> ()
        gathered = Gather <axis = 0> (with_none, clusters_of_id)
        scores = ReduceMax <keepdims = 0> (gathered, axis_1)
        best = ArgMax <axis = 0, keepdims = 0> (scores)
        id_of_map = Constant <value = uint8[{len(maps)}] {{{", ".join(map(str, maps))}}}> ()
        labels = Gather <axis = 0> (id_of_map, best)
    }}"""


def quantized(graph: "onnx.ModelProto") -> "onnx.ModelProto":
    """The graph with the weights of its matrix products in 8 bits, a scale for each column; the rest as it was."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # its advice to prepare the graph is for graphs without inferred shapes
    try:
        with TemporaryDirectory() as folder:
            file = Path(folder) / "small.onnx"
            quantize_dynamic(
                graph, file, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"]
            )
            return onnx.load(file)
    finally:
        logging.disable(before)


def describe(graph: "onnx.ModelProto", about: dict[str, Any]) -> None:
    """Writes what the graph is into its metadata, each value as JSON."""
    import onnx

    onnx.helper.set_model_props(graph, {key: json.dumps(value) for key, value in about.items()})


def needed() -> None:
    """StegoError where a package of the extra `export` is not installed."""
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise StegoError(f"exporting needs {', '.join(missing)}, not installed here: pip install 'stego_lib[export]'")
