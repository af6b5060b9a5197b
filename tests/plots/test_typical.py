"""Typical patches of clusters, and the form for their names."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import tiny_experiment
from PIL import Image

from stego_book.plots.typical import CONTEXT, name_form, patch_grid, typical_patches
from stego_lib import StegoError, train
from stego_lib.datasets.images import as_tensor


@pytest.fixture(scope="module")
def run(scenes_root, backbone_file, tmp_path_factory):
    return train(tiny_experiment(scenes_root, backbone_file, steps=2), runs_dir=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number, size in enumerate(((160, 128), (96, 200), (128, 128))):
        noise = np.random.default_rng(number).integers(0, 255, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def test_typical_patches_are_the_nearest_cells_of_each_image(run, paths):
    found, shares = typical_patches(run, paths, 2)
    centers = run.model.cluster_probe.clusters.detach()
    expected, cells = {cluster: [] for cluster in range(8)}, np.zeros(8)
    for path in paths:
        with torch.inference_mode():
            code = run.scores(as_tensor(path, run.classes.rules)[0]).code[0]
        best = {}
        for row in range(code.shape[1]):
            for column in range(code.shape[2]):
                cosines = F.cosine_similarity(centers, code[:, row, column][None])
                cluster = int(cosines.argmax())
                cells[cluster] += 1
                if cluster not in best or cosines[cluster] > best[cluster][0]:
                    best[cluster] = (float(cosines[cluster]), path, row, column)
        for cluster, one in best.items():
            expected[cluster].append(one)
    np.testing.assert_allclose(shares, cells / cells.sum())
    for cluster, some in enumerate(found):
        wanted = sorted(expected[cluster], reverse=True)[:2]
        assert [(one.image, one.row, one.column) for one in some] == [one[1:] for one in wanted]
        assert [one.cosine for one in some] == pytest.approx([one[0] for one in wanted], abs=1e-5)


def test_a_frame_is_around_the_patch_in_its_context(run, paths):
    """The pixels in the frame are those of the grid cell in the whole image."""
    found, _ = typical_patches(run, paths, 1)
    figure = patch_grid(run, found, 1)
    shown = [some[0] for some in found if some]
    for axis, patch in zip(figure.axes, shown, strict=True):
        image = np.asarray(Image.open(patch.image))
        height, width = image.shape[0] / patch.grid[0], image.shape[1] / patch.grid[1]
        crop, frame = np.asarray(axis.images[0].get_array()), axis.patches[0]
        assert crop.shape[0] == crop.shape[1] <= round(CONTEXT * max(height, width))
        left, top = frame.get_x() + 0.5, frame.get_y() + 0.5
        middle = crop[int(top + height / 2), int(left + width / 2)]
        there = image[int((patch.row + 0.5) * height), int((patch.column + 0.5) * width)]
        assert (middle == there).all() and frame.get_width() == pytest.approx(width)


def test_without_images_there_are_no_patches_and_outside_of_notebooks_no_form(run):
    with pytest.raises(StegoError, match="no images"):
        typical_patches(run, [])
    assert name_form(run) is None


def test_the_form_saves_names_merges_and_drops(run, monkeypatch):
    pytest.importorskip("ipywidgets")
    monkeypatch.setattr("IPython.get_ipython", lambda: object())
    form = name_form(run)
    *fields, below = form.children
    assert [field.value for field in fields] == list(run.segments.names)
    fields[0].value = fields[1].value = " sky "
    fields[2].value = ""
    below.children[0].click()
    assert run.segments.names == ("sky", *(f"cluster {i}" for i in range(3, 8))) and run.names[2] is None
    again = name_form(run)
    assert [field.value for field in again.children[:4]] == ["sky", "sky", "", "cluster 3"]
    for field in again.children[:-1]:
        field.value = ""
    again.children[-1].children[0].click()
    assert "dropped" in again.children[-1].children[1].value and run.segments.names[0] == "sky"
    run.name_segments(None)
