"""A run as one ONNX file labels pixels as the run does, for images of any shape."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from families import FAMILIES
from PIL import Image
from randomrun import random_run

from stego_lib import StegoError, export
from stego_lib.datasets.painter import paint_scene
from stego_lib.export import export_onnx
from stego_lib.utils.notices import Notice

# Square, resized down and up, upright, and longer than `predict.MAX_ASPECT_RATIO`.
SHAPES = [(64, 64), (400, 600), (192, 256), (51, 43), (40, 300)]
# A backbone whose features differ more from place to place than those of the tiny one.
EMBEDDED = dict(backbone="scenes_vit_tiny8", code_dim=70, train_size=128, eval_size=128)


def images() -> list[np.ndarray]:
    scene = Image.fromarray(paint_scene(5, 0)[0])
    return [np.array(scene.resize((width, height))) for height, width in SHAPES]


def outputs_of(path, image: np.ndarray) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(str(path)).run(None, {"image": image})


@pytest.fixture
def make(tmp_path, scenes_root, backbone_file):
    """Makes a run with random weights on the tiny backbone."""

    def made(matching=None, **changes):
        usual = dict(data_root=str(scenes_root), backbone=str(backbone_file), train_size=64, eval_size=64, code_dim=8)
        return random_run(tmp_path, matching, **usual | changes)

    return made


@pytest.mark.filterwarnings("ignore:.*4 times as long")
@pytest.mark.parametrize(
    "changes",
    [dict(), dict(official={"published": True}), dict(mirror=False, head="nonlinear", eval_size=(48, 80))],
    ids=["default", "published", "one size"],
)
def test_a_file_labels_as_the_run_does(make, tmp_path, changes):
    run = make(**changes)
    about = export_onnx(run, tmp_path / "a.onnx")
    assert about["free_sizes"] and about["agreement"] >= 0.999
    assert about["bytes"] == (tmp_path / "a.onnx").stat().st_size
    for image in images():
        labels, scores = outputs_of(tmp_path / "a.onnx", image)
        expected = run.predict(image)
        assert scores.shape == (3, *expected.shape) and (scores.argmax(0) == labels).all()
        assert (labels == expected).mean() >= 0.998, image.shape
    assert len(np.unique(run.predict(images()[1]))) > 1, "one segment alone would prove nothing"


@pytest.mark.parametrize(
    ("family", "keys", "size"), [("DINO", True, 64), ("DINOv3", False, 128), ("EVA-02", False, 112)]
)
def test_positions_of_every_kind_take_free_sizes(make, tmp_path, small_families, family, keys, size):
    """Learned (DINO) and rotary (DINOv3, EVA-02) positions; keys and tokens."""
    run = make(backbone=FAMILIES[family][0], official={"keys": keys}, train_size=size, eval_size=size)
    about = export_onnx(run, tmp_path / "a.onnx")
    assert about["free_sizes"] and about["agreement"] >= 0.999


def test_a_graph_that_disagrees_gets_one_working_size(make, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MIN_AGREEMENT", 1.1)
    run = make()
    with pytest.warns(Notice, match="all sizes"):
        about = export_onnx(run, tmp_path / "a.onnx", outputs=("code",))
    assert not about["free_sizes"] and about["working_size"] == (64, 64)
    assert outputs_of(tmp_path / "a.onnx", images()[1])[0].shape == (1, 8, 8, 8)


def test_matched_merged_and_dropped_clusters(make, tmp_path):
    """Class b has no cluster; one cluster without a class is merged into class a, another one is dropped."""
    run = make([2, -1, 0, -1], official={"extra_clusters": 1}, **EMBEDDED)
    run.name_segments({"cluster 1": "a", "cluster 3": None})
    export_onnx(run, tmp_path / "a.onnx")
    image = images()[1]
    labels, scores = outputs_of(tmp_path / "a.onnx", image)
    expected = run.predict(image)
    assert 255 in expected and (labels == expected).mean() >= 0.999
    assert len(scores) == len(run.segments) + 1 and (scores[1] < -1e30).all()
    stored = {entry.key: json.loads(entry.value) for entry in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert stored["names"] == list(run.segments.names) == ["a", "b", "c"] and stored["patch"] == 8
    assert stored["colors"] == [list(color) for color in run.segments.colors] and stored["mirror"] is True


def test_eight_bits_are_smaller_and_change_few_pixels(make, tmp_path):
    run = make(**EMBEDDED)
    about = export_onnx(run, tmp_path / "small.onnx", precision="int8")
    weights = sum(weight.numel() * 4 for weight in run.backbone.parameters())
    assert about["bytes"] < 0.4 * weights and 0.95 < about["agreement"] < 1
    labels, _ = outputs_of(tmp_path / "small.onnx", images()[1])
    assert (labels == run.predict(images()[1])).mean() > 0.95


def test_grid_outputs_are_those_of_the_run(make, tmp_path):
    run = make()
    about = export_onnx(run, tmp_path / "a.onnx", outputs=("features", "code", "similarity"))
    assert about["agreement"] >= 0.999
    image = images()[0]
    found = [torch.from_numpy(output) for output in outputs_of(tmp_path / "a.onnx", image)]
    with torch.no_grad():
        scores = run.scores(torch.from_numpy(image).permute(2, 0, 1))
        expected = [run.backbone(torch.from_numpy(image).permute(2, 0, 1)[None]), scores.code, scores.grid]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "options", [dict(precision="int4"), dict(outputs=("label",)), dict(outputs="labels"), dict(outputs=())]
)
def test_unknown_precisions_and_outputs_are_refused(make, tmp_path, options):
    with pytest.raises(StegoError, match=next(iter(options))):
        export_onnx(make(), tmp_path / "a.onnx", **options)
    assert not (tmp_path / "a.onnx").exists()
