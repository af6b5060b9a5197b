"""A run as one ONNX file labels pixels as the run does, for images of any shape."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from randomrun import random_run

from stego_lib import StegoError
from stego_lib.datasets.painter import paint_scene
from stego_lib.export import OUTPUTS, export_onnx

onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra `export`)")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra `export`)")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra `export`)")

# Square, resized down and up, upright, and longer than `predict.MAX_ASPECT_RATIO`.
SHAPES = [(64, 64), (400, 600), (192, 256), (51, 43), (40, 300)]


def outputs_of(path, image: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path))
    return dict(
        zip([output.name for output in session.get_outputs()], session.run(None, {"image": image}), strict=True)
    )


def test_a_file_labels_as_the_run_does(tmp_path, scenes_root):
    """Class b has no cluster; one cluster without a class is merged into class a, another one is dropped."""
    changes = dict(data_root=str(scenes_root), official={"extra_clusters": 1}, train_size=128, eval_size=128)
    run = random_run(tmp_path, [2, -1, 0, -1], **changes)
    run.name_segments({"cluster 1": "a", "cluster 3": None})
    about = export_onnx(run, tmp_path / "a.onnx", outputs=OUTPUTS)
    assert about["agreement"] >= 0.999 and "at 3 sizes" in about["compared_on"], "resized images are among them"
    assert about["bytes"] == (tmp_path / "a.onnx").stat().st_size
    stored = {entry.key: json.loads(entry.value) for entry in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert stored["names"] == list(run.segments.names) == ["a", "b", "c"] and stored["patch"] == 8
    assert stored["colors"] == [list(color) for color in run.segments.colors] and stored["mirror"] is True
    scene, seen = Image.fromarray(paint_scene(5, 0)[0]), set()
    for height, width in SHAPES:
        image = np.array(scene.resize((width, height)))
        ours, expected = outputs_of(tmp_path / "a.onnx", image), run.predict(image, refine="none")
        seen |= set(np.unique(expected).tolist())
        agreement = (ours["labels"] == expected).mean()
        assert agreement >= (0.999 if min(height, width) >= 64 else 0.998), image.shape
        assert ours["scores"].shape == (4, height, width) and (ours["scores"][1] < -1e30).all(), "b has no cluster"
        ids = np.array([0, 1, 2, 255])
        assert (ids[ours["scores"].argmax(0)] == ours["labels"]).all()
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        with torch.no_grad():
            grid = run.scores(pixels)
        for name, theirs in (("code", grid.code), ("similarity", grid.grid)):
            torch.testing.assert_close(torch.from_numpy(ours[name]), theirs, atol=1e-3, rtol=1e-3)
        assert ours["features"].shape[2:] == grid.code.shape[2:]
    assert {0, 255} < seen, "one segment alone would prove nothing"


@pytest.mark.parametrize("on", ["codes", "features"])
def test_a_file_of_a_taught_run_speaks_its_names(tmp_path, scenes_root, on):
    run = random_run(tmp_path, data_root=str(scenes_root), train_size=128, eval_size=128)
    image, _ = paint_scene(5, 0)
    rows = [["a.png", 5, 5, "sky"], ["a.png", 30, 60, "ground"], ["a.png", 60, 50, "ground"]]
    clicks = pd.DataFrame(rows, columns=["image", "x", "y", "name"])
    Image.fromarray(image).save(tmp_path / "a.png")
    run.teach([tmp_path / "a.png"], clicks, on=on)
    about = export_onnx(run, tmp_path / "a.onnx")
    assert about["names"] == ("sky", "ground") and about["agreement"] >= 0.999
    labels = outputs_of(tmp_path / "a.onnx", image)["labels"]
    assert (labels == run.predict(image, refine="none")).mean() >= 0.999 and set(np.unique(labels)) == {0, 1}
    run.teach([tmp_path / "a.png"], clicks, "neighbors", on)
    with pytest.raises(StegoError, match="logistic"):
        export_onnx(run, tmp_path / "a.onnx")


def test_eight_bits_are_smaller_and_change_few_pixels(tmp_path, scenes_root):
    changes = dict(data_root=str(scenes_root), train_size=128, eval_size=128)
    run = random_run(tmp_path, **changes)
    about = export_onnx(run, tmp_path / "small.onnx", precision="int8", outputs=("similarity",))
    weights = sum(weight.numel() * 4 for weight in run.backbone.parameters())
    assert about["bytes"] < 0.4 * weights and 0.95 < about["agreement"] < 1
    image = paint_scene(5, 0)[0]
    assert list(outputs_of(tmp_path / "small.onnx", image)) == ["similarity"]


@pytest.mark.parametrize("options", [dict(precision="int4"), dict(outputs=("label",))])
def test_unknown_precisions_and_outputs_are_rejected(tmp_path, scenes_root, options):
    with pytest.raises(StegoError, match=next(iter(options))):
        export_onnx(random_run(tmp_path, data_root=str(scenes_root)), tmp_path / "a.onnx", **options)
    assert not (tmp_path / "a.onnx").exists()


def test_a_path_that_is_no_onnx_file_is_rejected(tmp_path, scenes_root):
    with pytest.raises(StegoError, match=r"\.onnx file"):
        export_onnx(random_run(tmp_path, data_root=str(scenes_root)), tmp_path)


def test_a_run_with_the_published_resizing_is_rejected(tmp_path):
    with pytest.raises(StegoError, match="published"):
        export_onnx(random_run(tmp_path, official={"published": True}), tmp_path / "a.onnx")
