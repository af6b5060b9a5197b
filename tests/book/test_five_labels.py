"""Clicks that name segments: the form, the chapter, and both in JupyterLab."""

import io
import os
import socket
import subprocess
import sys
import zipfile
from base64 import b64decode

import nbformat
import numpy as np
import pandas as pd
import pytest
from common import ROOT, run_cells
from killing import wait_for
from nbformat.v4 import new_code_cell
from PIL import Image
from randomrun import random_run, tomatoes, written

from stego_lib import load_run
from stego_lib.teach import CLICK

CLICKS = pytest.importorskip("stego_book.clicks", reason="ipyevents is not installed")
NOTEBOOK = ROOT / "notebooks" / "five_labels.ipynb"


@pytest.fixture
def run(tmp_path):
    return written(random_run(tmp_path, eval_size=64, mirror=False))


@pytest.fixture
def images(tmp_path):
    return tomatoes(tmp_path / "images", "ab")


def assert_shown(form, word):
    assert word in form.message.value


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
    form._answer(lambda: assert_shown(form, "working"))
    assert form.message.value == "clicks: 0"
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
    given = dict(images=images, run=run.folder, clicks=tmp_path / "clicks.csv", output=tmp_path / "out")
    text = run_cells("five_labels", **given, device="cpu")
    assert "3 clicks on 2 of 2 images, 2 names" in text
    label = np.array(Image.open(tmp_path / "out" / "labels" / "b.png"))
    assert (label[:, :40] == 0).mean() > 0.95 and (label[:, 56:] == 1).mean() > 0.95


@pytest.fixture
def lab(tmp_path):
    """Address of a JupyterLab in `tmp_path`."""
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed (extra `lab` of the book)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--IdentityProvider.token="]
    command += ["--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={tmp_path}", f"--ServerApp.port={port}"]
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "JUPYTER_RUNTIME_DIR")
    environment = os.environ | {name: str(tmp_path / "jupyter") for name in folders}
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    wait_for(lambda: "is running at" in (tmp_path / "lab.log").read_text())
    yield f"http://127.0.0.1:{port}/lab/tree"
    server.terminate()
    server.wait(30)


# Mean color of the left and the right half of the shown image.
HALVES = """
const image = document.querySelector("img.widget-image");
if (!image || !image.naturalWidth) return null;
const width = image.naturalWidth / 2, height = image.naturalHeight;
const context = new OffscreenCanvas(2 * width, height).getContext("2d");
context.drawImage(image, 0, 0);
return [0, width].map(left => {
    const {data} = context.getImageData(left, 0, width, height), sums = [0, 0, 0];
    data.forEach((value, place) => { if (place % 4 < 3) sums[place % 4] += value; });
    return sums.map(sum => sum / (width * height));
});"""
CHOSEN = "return document.querySelector('.widget-toggle-button.mod-active')?.innerText"


def test_three_clicks_in_jupyterlab_change_the_map(run, images, tmp_path, lab, browser):
    from selenium.webdriver import ActionChains, Keys

    notebook = nbformat.read(NOTEBOOK, 4)
    at = next(n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    values = {"images": str(images), "run": str(run.folder), "output": str(tmp_path / "out"), "device": "cpu"}
    form_cell = next(n for n, cell in enumerate(notebook.cells) if "else ClickForm(" in cell.source)
    del notebook.cells[form_cell + 1 :]  # the form is then the last output, so JupyterLab keeps it in view
    notebook.cells.insert(at + 1, new_code_cell("\n".join(f"{name} = {value!r}" for name, value in values.items())))
    nbformat.write(notebook, tmp_path / "five_labels.ipynb")
    browser.get(f"{lab}/five_labels.ipynb")
    wait_for(lambda: browser.execute_script("return document.body.innerText.includes('(ipykernel) | Idle')"))
    browser.execute_script("jupyterapp.commands.execute('notebook:run-all-cells')")
    form = CLICKS.ClickForm(run, images, tmp_path / "out")
    shown = wait_for(lambda: browser.execute_script(HALVES))
    np.testing.assert_allclose(shown, halves(form), atol=2)
    field = browser.find_element("css selector", "input[placeholder^='new name']")
    image = browser.find_element("css selector", "img.widget-image")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", image)
    clicks = [("a.png", 10, 12, "tomato"), ("a.png", 80, 50, "grass"), ("a.png", 70, 8, "grass")]
    for number, (_, x, y, name) in enumerate(clicks, start=1):
        field.send_keys(name, Keys.ENTER)
        wait_for(lambda name=name: browser.execute_script(CHOSEN) == name)
        place = [round((at + 0.5 - side / 2) * image.size["width"] / 96) for at, side in ((x, 96), (y, 64))]
        ActionChains(browser).move_to_element_with_offset(image, *place).click().perform()
        message = f"clicks: {number}"
        wait_for(lambda message=message: message in browser.find_element("tag name", "body").text)
        form.add_name(name)
        form.add(x, y)
    np.testing.assert_allclose(browser.execute_script(HALVES), halves(form), atol=4)
    assert np.abs(np.subtract(shown, halves(form))).max() > 20
    browser.find_element("xpath", "//button[text()='Save']").click()
    wait_for((tmp_path / "out" / "clicks.csv").exists)
    saved = pd.read_csv(tmp_path / "out" / "clicks.csv")
    assert list(saved["name"]) == ["tomato", "grass", "grass"]
    np.testing.assert_allclose(saved[["x", "y"]], [click[1:3] for click in clicks], atol=0.5)


def halves(form):
    """Mean color of both halves of a form's image."""
    pixels = np.array(Image.open(io.BytesIO(form.shown.value)))
    return [half.mean((0, 1)) for half in np.split(pixels, 2, axis=1)]
