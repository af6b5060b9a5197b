"""JupyterLab as `make lab` starts it: the training notebook opens in a browser, all cells run, and the scores appear."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
import requests
from common import ROOT
from PIL import Image

pytest.importorskip("selenium", reason="selenium is not installed (extra `dev`)")
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.support import expected_conditions as now
from selenium.webdriver.support.ui import WebDriverWait

TRAIN = Path("notebooks/train.ipynb")
SCREENSHOT = ROOT / "build" / "lab.png"
STARTED = "return [...document.querySelectorAll('.jp-InputPrompt')].some(prompt => /[*0-9]/.test(prompt.innerText))"
"""JavaScript: whether a cell is queued, runs or has run."""
FAILED = "[data-mime-type='application/vnd.jupyter.error']"
"""Selector of a cell's error."""
PRINTED = "return [...document.querySelectorAll('.jp-OutputArea-output')].map(output => output.innerText).join('\\n')"
"""JavaScript: the printed output of all cells."""
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # keeps cells out of view in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
"""JupyterLab settings of this test."""


def command() -> list[str]:
    """The command of `make lab`, with this Python, without a browser and on any free port."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of an outer make
    dry = ["make", "--dry-run", "--no-print-directory", "--old-file=.venv/.ready", "lab", "VENV=.venv"]
    (line,) = (
        subprocess.run(dry, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        .stdout.strip()
        .splitlines()
    )
    program, *arguments = shlex.split(line)
    assert program == ".venv/bin/python" and arguments[-1] == str(TRAIN)
    return [sys.executable, *arguments, "--no-browser", "--allow-root", "--ServerApp.port=0"]


@pytest.fixture
def folder(scenes_root, tmp_path) -> Path:
    """A folder with a copy of train.ipynb whose default parameters are tiny."""
    values = dict(data_root=str(scenes_root), runs_dir=str(tmp_path / "runs"), steps=3, batch_size=4, crf=False)
    notebook = nbformat.read(ROOT / TRAIN, 4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    for name, value in values.items():
        cell.source, count = re.subn(rf"(?m)^({name}: \w+ = )\w+(?=  #)", rf"\g<1>{value!r}", cell.source)
        assert count == 1, name
    (tmp_path / TRAIN).parent.mkdir()
    nbformat.write(notebook, tmp_path / TRAIN)
    return tmp_path


@pytest.fixture
def lab(folder) -> Iterator[dict]:
    """JupyterLab on that folder with its own settings: its address (`url`) and its `token`."""
    for name, values in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    folders = dict(JUPYTER_RUNTIME_DIR="runtime", JUPYTER_CONFIG_DIR="config", IPYTHONDIR="ipython",
               JUPYTERLAB_SETTINGS_DIR="settings", JUPYTERLAB_WORKSPACES_DIR="workspaces")  # fmt: skip
    environment = os.environ | {name: str(folder / value) for name, value in folders.items()}
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command(), cwd=folder, stdout=log, stderr=log, env=environment)

    def started(_: object) -> dict:
        assert server.poll() is None, (folder / "lab.log").read_text()[-2000:]
        return json.loads(next(folder.glob("runtime/jpserver-*.json")).read_text())

    kernels = []
    try:
        yield WebDriverWait(None, 120, ignored_exceptions=[StopIteration, ValueError]).until(started)
        kernels = psutil.Process(server.pid).children(recursive=True)
    finally:
        server.terminate()
        try:
            server.wait(60)
        finally:
            server.kill()
            _, left = psutil.wait_procs(kernels, 10)
            for process in left:
                process.kill()
    assert not left, "JupyterLab ends its kernels"


def test_the_training_notebook_runs_in_jupyterlab(lab, folder, browser):
    def wait_for(condition: Callable, seconds: float = 120) -> object:
        """The first true value of `condition`; elements that the page just replaced are ignored."""
        return WebDriverWait(browser, seconds, ignored_exceptions=[WebDriverException]).until(condition)

    def click(kind: str, text: str) -> None:
        """Clicks the menu or menu item with this text."""
        wait_for(now.element_to_be_clickable((By.XPATH, f"//*[contains(@class, '{kind}') and .='{text}']"))).click()

    def connected(page: object) -> bool:
        """Whether server and page report an idle kernel."""
        answer = requests.get(f"{lab['url']}api/kernels", {"token": lab["token"]}, timeout=30)
        kernels = answer.json() if answer.ok else []  # a slow server may return an error at first
        idle = any(kernel["connections"] and kernel["execution_state"] == "idle" for kernel in kernels)
        return idle and bool(page.find_elements(By.CSS_SELECTOR, "[data-status='idle']"))

    def running(page: object) -> bool:
        """Runs all cells; whether they have started. On a slow machine the page may ask for a kernel instead."""
        for button in page.find_elements(By.CSS_SELECTOR, ".jp-Dialog .jp-mod-accept"):
            button.click()
        wait_for(connected)
        click("lm-MenuBar-itemLabel", "Run")
        click("lm-Menu-itemLabel", "Run All Cells")
        return (
            wait_for(lambda page: page.execute_script(STARTED) or page.find_elements(By.CLASS_NAME, "jp-Dialog"))
            is True
        )

    def ended(page: object) -> bool:
        return "run folder: " in page.execute_script(PRINTED) or page.find_elements(By.CSS_SELECTOR, FAILED)

    browser.get(f"{lab['url']}lab/tree/{TRAIN}?token={lab['token']}")
    try:
        wait_for(now.presence_of_element_located((By.CSS_SELECTOR, ".jp-Notebook .jp-CodeCell")))
        wait_for(running)
        wait_for(ended, 300)
        text = browser.execute_script(PRINTED)
    finally:
        SCREENSHOT.parent.mkdir(exist_ok=True)
        browser.save_screenshot(str(SCREENSHOT))
    assert "run folder: " in text, text
    record = Path(re.search("run folder: (.+)", text)[1]) / "metrics.json"
    assert record.is_relative_to(folder / "runs")
    scores = json.loads(record.read_text())["scores"]["cluster"]
    assert re.search(rf"STEGO, cluster probe +accuracy +{scores['accuracy']:.1f} +mIoU +{scores['miou']:.1f}", text)
    assert len(np.unique(np.asarray(Image.open(SCREENSHOT).convert("L")))) > 50, "the screenshot shows something"
