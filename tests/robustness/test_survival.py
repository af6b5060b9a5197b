"""Runs that are killed, interrupted or short of disk resume to the same result."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from common import tiny_experiment
from killing import Job, launched, runs_in, same, wait_for
from standins import noise_images

from stego_lib import Experiment, StegoError, load_run, train, training
from stego_lib.segment import segment_folder

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def experiment(scenes_root, backbone_file) -> Experiment:
    return tiny_experiment(scenes_root, backbone_file, steps=10, probes="after", keep_every=4)


@pytest.fixture(scope="module")
def reference(experiment, tmp_path_factory) -> Path:
    """The folder of an undisturbed run."""
    return Path(Job(experiment, tmp_path_factory.mktemp("reference")).outcome()["folder"])


def test_killed_runs_resume_to_the_same_weights_log_and_scores(experiment, reference, tmp_path):
    """SIGKILL at random times until a process survives to the end."""
    draw, kills = random.Random(7), 0
    while True:
        job = Job(experiment, tmp_path, slow=0.1)
        job.process.join(draw.uniform(0.2, 3) if kills < 6 else None)
        if job.process.exitcode is not None:
            break
        job.kill()
        kills += 1
    assert kills and "error" not in job.outcome(), job.outcome()
    (folder,) = [path for path in runs_in(tmp_path) if (path / "metrics.json").exists()]
    same(folder, reference)


def test_a_full_disk_is_an_error_that_leaves_the_last_checkpoint(experiment, reference, tmp_path):
    """No file may grow above some bytes; with room again the run resumes to the same result."""
    shutil.copytree(reference.parent / "features", tmp_path / "features")
    limit = (reference / "checkpoint.safetensors").stat().st_size // 2
    outcome = Job(experiment, tmp_path, largest_file=limit).outcome()
    assert outcome["error"] == "StegoError" and "cannot be read or written" in outcome["message"], outcome
    same(Path(Job(experiment, tmp_path).outcome()["folder"]), reference)


def test_two_runs_at_once_get_a_folder_each(experiment, reference, tmp_path):
    jobs = [Job(experiment, tmp_path, resume=False) for _ in range(2)]
    outcomes = [job.outcome() for job in jobs]
    assert all("folder" in outcome for outcome in outcomes), outcomes
    for folder in runs_in(tmp_path):
        same(folder, reference)


@pytest.mark.parametrize("spoilt", ["loss_knn", "weight"])
def test_numbers_that_are_not_finite_stop_training_before_they_are_saved(experiment, tmp_path, monkeypatch, spoilt):
    monkeypatch.setattr(training, "SAVE_EVERY", 3)
    step, calls = training.train_step, []

    def spoil(model, *arguments):
        values = step(model, *arguments)
        calls.append(values)
        if len(calls) == 6 and spoilt == "weight":
            model.head.linear.weight.data[0, 0] = torch.inf
        return values | {spoilt: torch.inf} if len(calls) == 6 and spoilt != "weight" else values

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", spoil)
        with pytest.raises(StegoError, match=f"{spoilt}.* not finite"):
            train(experiment, runs_dir=tmp_path)
    (folder,) = runs_in(tmp_path)
    assert load_run(folder).step == 3
    assert train(experiment, runs_dir=tmp_path, resume=True).folder == folder


def test_two_processes_segment_a_folder_and_resume_after_one_is_killed(reference, tmp_path):
    """As `torchrun --nproc-per-node 2 -m stego_lib.segment RUN IMAGES OUTPUT` starts them."""
    images, out = tmp_path / "images", tmp_path / "out"
    noise_images(images, *[(320, 240)] * 24)
    whole = segment_folder(load_run(reference), images, tmp_path / "alone", format="coco-instances")

    def start() -> list[subprocess.Popen]:
        command = [sys.executable, "-m", "stego_lib.segment", reference, images, out, "--format", "coco-instances"]
        return [subprocess.Popen([*command, "--device", "cpu"], env=os.environ | place) for place in launched(2)]

    processes = start()
    wait_for(lambda: len(list(out.glob("labels/*.png"))) > 3 or processes[1].poll() is not None)
    processes[1].kill()
    assert processes[0].wait() != 0 and not (out / "areas.csv").exists()
    before = {path: path.stat().st_mtime_ns for path in out.glob("labels/*.png")}
    assert 3 < len(before) < 24
    assert [process.wait() for process in start()] == [0, 0]
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    for path in (tmp_path / "alone").rglob("*.*"):
        if "origin" not in path.name:
            assert (out / path.relative_to(tmp_path / "alone")).read_bytes() == path.read_bytes()
    written = pd.read_csv(out / "areas.csv", index_col="image")
    np.testing.assert_allclose(written.to_numpy(), whole.to_numpy(), atol=0.01)
    assert (out / "origin-1.jsonl").exists()
