"""A run as one ONNX file labels pixels as the run does, for images of any shape."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from families import FAMILIES
from randomrun import random_run

from stego_lib import StegoError
from stego_lib.datasets.painter import paint_scene
from stego_lib.utils.notices import Notice

SHAPES = [(128, 128), (96, 200), (251, 143), (40, 300)]
"""Square, oblong, upright, and longer than `LONGEST` allows."""


def images() -> list[np.ndarray]:
    """Scenes cut and repeated to `SHAPES`."""
    scene = np.tile(paint_scene(5, 0)[0], (3, 3, 1))
    return [np.ascontiguousarray(scene[:height, :width]) for height, width in SHAPES]


def outputs_of(path, image: np.ndarray) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(str(path)).run(None, {"image": image})


@pytest.mark.filterwarnings("ignore:an image more than 4 times as long")
@pytest.mark.parametrize(
    "changes",
    [dict(), dict(mirror=False, head="nonlinear"), dict(published=True), dict(eval_size=(96, 160))],
    ids=["as by default", "no mirror", "published", "one size"],
)
def test_a_file_labels_as_the_run_does(tmp_path, changes):
    run = random_run(tmp_path, **changes)
    about = run.export(tmp_path / "a.onnx")
    assert (
        about["free_sizes"] and about["agreement"] >= 0.999 and about["bytes"] == (tmp_path / "a.onnx").stat().st_size
    )
    same = []
    for image in images():
        labels, scores = outputs_of(tmp_path / "a.onnx", image)
        wanted = run.predict(image)
        assert (
            labels.shape == wanted.shape and scores.shape == (3, *wanted.shape) and (scores.argmax(0) == labels).all()
        )
        assert len(np.unique(wanted)) > 1, "one segment alone would prove nothing"
        same.append((labels == wanted).ravel())
        assert same[-1].mean() >= 0.998, image.shape
    assert np.concatenate(same).mean() >= 0.999


@pytest.mark.parametrize(
    ("family", "features"),
    [("DINO", "feat"), ("DINO", "KK"), ("DINOv2 with registers", "feat"), ("MAE", "feat"), ("EVA-02", "feat")],
)
def test_positions_of_every_kind_take_free_sizes(tmp_path, small_families, family, features):
    """Learned (DINO, DINOv2), sinusoidal (MAE) and rotary (EVA-02) positions; tokens and keys."""
    patch = 14 if family in ("DINOv2 with registers", "EVA-02") else 8 if family == "DINO" else 16
    run = random_run(
        tmp_path, backbone=FAMILIES[family][0], features=features, train_size=8 * patch, eval_size=8 * patch
    )
    about = run.export(tmp_path / "a.onnx")
    assert about["free_sizes"] and about["agreement"] >= 0.999


def test_a_network_that_freezes_its_sizes_is_found_out(tmp_path, small_families):
    """Traced, DINOv3 keeps the rotary positions of one size: right in shape, wrong in value. The comparison sees it."""
    run = random_run(tmp_path, backbone=FAMILIES["DINOv3"][0], train_size=128, eval_size=128)
    with pytest.warns(
        Notice, match=r"cannot be exported with free sizes \(its graph agrees .* resizes every image to 128 x 128"
    ):
        about = run.export(tmp_path / "a.onnx")
    assert not about["free_sizes"] and about["working_size"] == (128, 128)
    image = images()[0]
    assert (outputs_of(tmp_path / "a.onnx", image)[0] == run.predict(image)).mean() >= 0.999


def test_matched_clusters_get_the_ids_of_predict_and_the_file_says_what_they_are(tmp_path):
    run = random_run(tmp_path, matching=[2, -1, 0, -1], extra_clusters=1)
    run.export(tmp_path / "a.onnx")
    image = images()[0]
    labels, scores = outputs_of(tmp_path / "a.onnx", image)
    assert (labels == run.predict(image)).mean() >= 0.999 and scores.shape[0] == len(run.segments) == 5
    assert (scores[1] < -1e30).all(), "class b has no cluster"
    stored = {entry.key: json.loads(entry.value) for entry in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert stored["names"] == list(run.segments.names) and stored["colors"] == [
        list(color) for color in run.segments.colors
    ]
    assert stored["mirror"] is True and stored["patch"] == 8 and stored["free_sizes"] is True


def test_a_file_speaks_in_the_names_of_the_run(tmp_path):
    """Two clusters merged under one name; one dropped, whose pixels get id 255."""
    run = random_run(tmp_path, extra_clusters=2)
    names = run.segments.names
    run.name_segments({names[0]: "road", names[1]: "road", names[2]: None})
    run.export(tmp_path / "a.onnx")
    image = images()[0]
    labels, scores = outputs_of(tmp_path / "a.onnx", image)
    wanted = run.predict(image)
    assert set(np.unique(wanted)) > {0, 255} and (labels == wanted).mean() >= 0.999
    assert len(scores) == len(run.segments) + 1, "a map for the dropped cluster"
    stored = {entry.key: json.loads(entry.value) for entry in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert stored["names"] == list(run.segments.names) and stored["names"][0] == "road"


def test_eight_bits_are_smaller_and_change_few_pixels(tmp_path, capsys):
    run = random_run(tmp_path)
    large, small = (run.export(tmp_path / f"{name}.onnx", precision=name) for name in ("float32", "int8"))
    assert small["bytes"] < 0.4 * large["bytes"] and 0.95 < small["agreement"] < large["agreement"]
    last = capsys.readouterr()
    line = (last.out + last.err).strip().splitlines()[-1]
    assert f"{100 * small['agreement']:.2f} % of the pixels of {small['compared_on']}" in line and "CRF" in line


def test_grid_outputs_are_the_runs_own(tmp_path):
    run = random_run(tmp_path)
    about = run.export(tmp_path / "a.onnx", outputs=("features", "code", "similarity"))
    assert about["agreement"] >= 0.999, "a graph of the same network is compared"
    image = images()[0]
    features, code, similarity = outputs_of(tmp_path / "a.onnx", image)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(features), run.backbone(pixels), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(torch.from_numpy(code), run.code(pixels), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(
            torch.from_numpy(similarity), run.model.cluster_probe.similarity(run.code(pixels)), atol=1e-3, rtol=1e-3
        )


@pytest.mark.parametrize(
    "asked", [dict(precision="int4"), dict(outputs=("label",)), dict(outputs="labels"), dict(outputs=())]
)
def test_what_cannot_be_asked_for_is_refused(tmp_path, asked):
    with pytest.raises(StegoError, match=next(iter(asked))):
        random_run(tmp_path).export(tmp_path / "a.onnx", **asked)
    assert not (tmp_path / "a.onnx").exists()


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("stego_lib.export.graph.find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(StegoError, match=r"needs onnxruntime, .*stego_lib\[export\]"):
        random_run(tmp_path).export(tmp_path / "a.onnx")
