"""train.ipynb under papermill, its kernel killed during training: with `-p resume True` it ends as if nothing had happened."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from common import ROOT
from killing import runs_in, same, serving, wait_for

from stego_lib import Experiment
from stego_lib.run import read_checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
TESTS = ROOT / "tests"


def papermill(folder: Path, runs_dir: Path, parameters: dict, before: str = "") -> subprocess.Popen:
    """Starts papermill on train.ipynb; its kernel runs `before` first, and computes as the jobs of `killing` do."""
    startup = folder / "profile_default" / "startup" / "first.py"
    startup.parent.mkdir(parents=True)
    startup.write_text(f"import sys\nsys.path.append({str(TESTS)!r})\nimport killing\nkilling.quicken()\n{before}\n")
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / "train.ipynb"), str(folder / "out.ipynb")]
    for name, value in (parameters | {"runs_dir": str(runs_dir)}).items():
        command += ["-p", name, str(value)]
    environment = os.environ | {"IPYTHONDIR": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_notebook_that_was_killed_is_resumed_to_the_same_weights_and_scores(scenes_root, tmp_path):
    parameters = dict(
        data_root=scenes_root, steps=10, batch_size=4, validate_every=4, device="cpu", precision="float32", crf=False
    )
    runs_dir = tmp_path / "runs"
    with serving(tmp_path) as runner:
        experiment = Experiment.preset("scenes", **(parameters | {"data_root": str(scenes_root)}))
        job = dict(experiment=experiment.to_dict(), runs_dir=str(tmp_path / "reference"), compare=True)
        reference = Path(runner.do("train", **job)["folder"])

    killed = papermill(tmp_path / "killed", runs_dir, parameters, "killing.slow_down(0.5)")
    wait_for(lambda: list(runs_dir.glob("*/kept/0000004.pt")) or killed.poll() is not None)
    (kernel,) = psutil.Process(killed.pid).children()
    kernel.kill()
    assert killed.wait(60) != 0 and "Kernel died" in killed.stderr.read()
    (folder,) = runs_in(runs_dir)
    assert 0 < read_checkpoint(folder)["step"] < experiment.steps and not (folder / "metrics.json").exists()

    resumed = papermill(tmp_path / "resumed", runs_dir, parameters | {"resume": True})
    _, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors[-3000:]
    assert runs_in(runs_dir) == [folder], "the run went on in its folder"
    same(folder, reference)
