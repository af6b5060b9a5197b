"""train.ipynb under papermill, killed during training, gives the same result with `-p resume True`."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from common import ROOT, run_cells
from killing import SAVE_EVERY, Job, runs_in, same, wait_for

from stego_lib import load_run, probes, training

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
STARTUP = """
import time
from stego_lib import probes, training
step, training.SAVE_EVERY, probes.RESTARTS = training.train_step, 3, 1
training.train_step = lambda *arguments: (time.sleep(0.5), step(*arguments))[1]
"""


def papermill(folder: Path, **parameters: object) -> subprocess.Popen:
    """Starts papermill on train.ipynb; each step of training takes half a second more."""
    startup = folder / "profile_default" / "startup" / "first.py"
    startup.parent.mkdir(parents=True)
    startup.write_text(STARTUP)
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / "train.ipynb"), str(folder / "out.ipynb")]
    for name, value in parameters.items():
        command += ["-p", name, str(value)]
    environment = os.environ | {"IPYTHONDIR": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_killed_notebook_resumes_to_the_same_weights_and_scores(scenes_root, tmp_path, monkeypatch):
    parameters = dict(data_root=scenes_root, steps=10, batch_size=4, keep_every=4, device="cpu", crf=False)
    runs_dir = tmp_path / "runs"
    killed = papermill(tmp_path / "killed", runs_dir=runs_dir, **parameters)
    wait_for(lambda: list(runs_dir.glob("*/kept/0000004*")) or killed.poll() is not None)
    (kernel,) = psutil.Process(killed.pid).children()
    kernel.kill()
    assert killed.wait(60) != 0 and "Kernel died" in killed.stderr.read()
    (folder,) = runs_in(runs_dir)
    assert 0 < load_run(folder).step < 10 and not (folder / "metrics.json").exists()
    monkeypatch.setattr(training, "SAVE_EVERY", SAVE_EVERY)
    monkeypatch.setattr(probes, "RESTARTS", 1)
    run_cells("train", **parameters, runs_dir=runs_dir, resume=True)
    undisturbed = Job(load_run(folder).experiment, tmp_path / "reference", baselines=True).outcome()
    assert runs_in(runs_dir) == [folder]
    same(folder, Path(undisturbed["folder"]))
