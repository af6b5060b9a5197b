"""Clicks that name segments: the form and the chapter."""

import io
import zipfile
from base64 import b64decode

import numpy as np
import pandas as pd
import pytest
import torch
from common import ROOT
from PIL import Image
from randomrun import random_run

from stego_book.notebooks import run_notebook
from stego_lib import load_run
from stego_lib.teach import CLICK

CLICKS = pytest.importorskip("stego_book.clicks", reason="ipyevents is not installed")
NOTEBOOK = ROOT / "notebooks" / "five_labels.ipynb"
RED, GREEN = (220, 30, 20), (20, 200, 60)


@pytest.fixture
def run(tmp_path):
    made = random_run(tmp_path, eval_size=64, mirror=False)
    made.save_experiment()
    made.save(torch.optim.Adam(made.model.parameters()), {})
    return made


@pytest.fixture
def images(tmp_path):
    """Two images, red on the left and green on the right, with noise."""
    rng, folder = np.random.default_rng(0), tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        pixels = np.empty((64, 96, 3))
        pixels[:, :48], pixels[:, 48:] = RED, GREEN
        Image.fromarray((pixels + rng.integers(0, 20, pixels.shape)).clip(0, 255).astype(np.uint8)).save(folder / name)
    return folder


def click_both_sides(form):
    for name, places in {"tomato": ((10, 12), (20, 56)), "grass": ((80.4, 50), (70, 8), (90, 20))}.items():
        form.add_name(name)
        for place in places:
            form.add(*place)


def test_a_click_refits_the_segments_without_the_backbone_and_undo_takes_it_back(run, images, tmp_path, monkeypatch):
    form = CLICKS.ClickForm(run, images, tmp_path / "out")
    before = form.labels
    predicted = run.predict(images / "a.png", refine="none")
    rows, columns = (np.round((np.arange(side) + 0.5) * 7.5 - 0.5).astype(int) for side in predicted.shape)
    assert (before[rows][:, columns] == predicted).mean() > 0.97, "shown 7.5 times as large"
    monkeypatch.setattr(run.backbone, "forward", None)  # each image has passed it
    click_both_sides(form)
    left, right = form.labels[:, :340], form.labels[:, 380:]
    assert (left == 0).mean() > 0.95 and (right == 1).mean() > 0.95
    assert "tomato" in form.legend.value and "grass" in form.legend.value
    for _ in range(4):  # down to one name
        form.undo()
    np.testing.assert_array_equal(form.labels, before)
    assert run.taught is None and not (tmp_path / "out").exists(), "nothing changes before it is saved"


def test_saved_clicks_teach_the_run_and_come_back(run, images, tmp_path):
    form = CLICKS.ClickForm(run, images, tmp_path / "out")
    click_both_sides(form)
    assert "labels.zip" in form.segment()
    table = pd.read_csv(tmp_path / "out" / "clicks.csv")
    assert table.to_dict("split")["data"][1:3] == [["a.png", 20, 56, "tomato"], ["a.png", 80.4, 50, "grass"]]
    opened = load_run(run.folder)
    assert opened.segments.names == ("tomato", "grass")
    again = CLICKS.ClickForm(opened, images, tmp_path / "out", list(table.itertuples(index=False, name=None)))
    np.testing.assert_array_equal(again.labels, form.labels)
    content = b64decode(form.segment().split("base64,")[1].split('"')[0])
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert sorted(archive.namelist()) == ["labels/", "labels/a.png", "labels/b.png"]
        np.testing.assert_array_equal(Image.open(archive.open("labels/b.png")), opened.predict(images / "b.png"))


def test_the_chapter_takes_a_file_of_clicks(run, images, tmp_path):
    clicks = [("a.png", 10, 12, "tomato"), ("a.png", 80, 50, "grass"), ("b.png", 80, 20, "grass")]
    pd.DataFrame(clicks, columns=CLICK).to_csv(tmp_path / "clicks.csv", index=False)
    parameters = {"images": images, "run": run.folder, "clicks": tmp_path / "clicks.csv", "output": tmp_path / "out"}
    text = run_notebook(NOTEBOOK, tmp_path / "five_labels.ipynb", parameters | {"device": "cpu"})
    assert "3 clicks on 2 of 2 images, 2 names" in text
    label = np.array(Image.open(tmp_path / "out" / "labels" / "b.png"))
    assert (label[:, :40] == 0).mean() > 0.95 and (label[:, 56:] == 1).mean() > 0.95


def test_the_clicks_of_the_project_lie_on_its_photographs():
    table = pd.read_csv(ROOT / "data" / "photographs" / "clicks.csv")
    assert tuple(table) == CLICK and len(table) == 30 and table["name"].nunique() == 3
    for click in table.itertuples():
        width, height = Image.open(ROOT / "data" / "photographs" / click.image).size
        assert 0 <= click.x < width and 0 <= click.y < height
