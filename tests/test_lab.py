"""JupyterLab as `make lab` starts it: opens the training notebook in a browser, runs all cells, and the scores appear."""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from common import ROOT

from stego_lib.datasets.scenes import draw_scenes

TRAIN = ROOT / "notebooks" / "train.ipynb"
OUTPUTS = "return [...document.querySelectorAll('.jp-OutputArea-output')].map(output => output.innerText).join('\\n')"
"""What the cells have printed, as the page shows it."""
SETTINGS = {
    "notebook-extension/tracker.jupyterlab-settings": {
        "windowingMode": "none"
    },  # cells out of view are in the page too
    "apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
}
"""Settings of the user of this test."""


@pytest.fixture
def tiny_notebook(tmp_path):
    """A copy of train.ipynb whose own defaults are tiny, in a folder that JupyterLab may serve."""
    draw_scenes(tmp_path / "data" / "scenes", train=20, val=4)
    values = {
        "steps": 3,
        "data_root": str(tmp_path / "data"),
        "runs_dir": str(tmp_path / "runs"),
        "crf": False,
        "device": "cpu",
    }
    notebook = nbformat.read(TRAIN, 4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    for name, value in values.items():
        cell.source, count = re.subn(
            rf"^({name}: \w+ = ).*?(  #)", rf"\g<1>{value!r}\g<2>", cell.source, flags=re.MULTILINE
        )
        assert count == 1, name
    nbformat.write(notebook, tmp_path / "train.ipynb")
    return tmp_path / "train.ipynb"


@pytest.fixture
def lab(tiny_notebook):
    """Address of a running JupyterLab on the notebook's folder."""
    make = (ROOT / "Makefile").read_text()
    assert "-m jupyter lab --notebook-dir=. notebooks/train.ipynb" in make, "the test starts what `make lab` starts"
    token = secrets.token_hex(8)
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        "--notebook-dir=.",
        "train.ipynb",
        "--no-browser",
        "--allow-root",
    ]
    command += ["--ServerApp.port=0", f"--IdentityProvider.token={token}"]
    kinds = ("JUPYTER_RUNTIME", "JUPYTER_CONFIG", "JUPYTERLAB_SETTINGS", "JUPYTERLAB_WORKSPACES")
    folders = {f"{kind}_DIR": str(tiny_notebook.parent / kind.lower()) for kind in kinds}
    settings = tiny_notebook.parent / "jupyterlab_settings" / "@jupyterlab"
    for name, values in SETTINGS.items():
        (settings / name).parent.mkdir(parents=True, exist_ok=True)
        (settings / name).write_text(json.dumps(values))
    with open(tiny_notebook.parent / "lab.log", "w") as log:
        server = subprocess.Popen(
            command, cwd=tiny_notebook.parent, stdout=log, stderr=log, env=os.environ | folders, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while not (found := list((tiny_notebook.parent / "jupyter_runtime").glob("jpserver-*.json"))):
            assert server.poll() is None and time.monotonic() < deadline, (
                tiny_notebook.parent / "lab.log"
            ).read_text()[-2000:]
            time.sleep(0.3)
        yield f"{json.loads(found[0].read_text())['url']}lab/tree/train.ipynb?token={token}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # the group that this test started: the server and its kernels
        server.wait(30)


def test_the_training_notebook_runs_in_jupyterlab(lab, tiny_notebook, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support import expected_conditions as now
    from selenium.webdriver.support.ui import WebDriverWait

    def click(css: str, text: str) -> None:
        """Clicks the first visible element of this kind that says `text`."""
        path = f"//*[contains(concat(' ', @class, ' '), ' {css} ') and normalize-space(.)='{text}']"
        WebDriverWait(browser, 90).until(now.element_to_be_clickable((By.XPATH, path))).click()

    browser.get(lab)
    WebDriverWait(browser, 120).until(now.presence_of_element_located((By.CSS_SELECTOR, ".jp-Notebook .jp-CodeCell")))
    WebDriverWait(browser, 90).until(now.presence_of_element_located((By.CSS_SELECTOR, "[data-status='idle']")))
    click("lm-MenuBar-itemLabel", "Run")
    click("lm-Menu-itemLabel", "Run All Cells")
    (ROOT / "build").mkdir(exist_ok=True)
    deadline, text = time.monotonic() + 300, ""
    try:
        while "run folder: " not in text:
            assert time.monotonic() < deadline, text
            time.sleep(1)
            for button in browser.find_elements(By.CSS_SELECTOR, ".jp-Dialog .jp-mod-accept"):
                button.click()  # a slow machine is asked which kernel to use
            text = browser.execute_script(OUTPUTS)
    finally:
        browser.save_screenshot(str(ROOT / "build" / "lab.png"))
    (record,) = (tiny_notebook.parent / "runs").glob("*/metrics.json")
    scores = json.loads(record.read_text())["scores"]["cluster"]
    assert re.search(rf"STEGO, cluster probe\s+accuracy\s+{scores['accuracy']:.1f}\s+mIoU\s+{scores['miou']:.1f}", text)
