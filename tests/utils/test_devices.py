"""Several processes on one run: the same losses, weights and confusion matrices as one."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from common import ROOT, tiny_experiment
from killing import in_two, runs_in

from stego_lib import Experiment, StegoError, load_run, probes, train
from stego_lib.datasets.scenes import draw_scenes
from stego_lib.utils import devices

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, backbone_file) -> Experiment:
    """Two batches of images to score, so that two processes have one each; dropout on."""
    root = tmp_path_factory.mktemp("data")
    draw_scenes(root / "scenes", train=12, val=20, size=64)
    return tiny_experiment(root, backbone_file, steps=5, dropout=0.3)


@pytest.mark.parametrize("changes", [dict(official={"subtract_mean": True}), dict(feature_store="online")], ids=str)
def test_two_processes_give_what_one_gives(experiment, tmp_path, monkeypatch, changes):
    """The same losses, shifts and weights but for rounding, and a record that each returns."""
    monkeypatch.setattr(probes, "RESTARTS", 1)
    changed = experiment.but(**changes)
    first, second = in_two(changed, tmp_path / "two", baselines=True)
    assert first == second and len(runs_in(tmp_path / "two")) == 1, (first, second)
    ours, theirs = load_run(first["folder"]), train(changed, runs_dir=tmp_path / "one")
    np.testing.assert_allclose(ours.log.to_numpy(), theirs.log.to_numpy(), atol=1e-5)
    for name, value in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=0, atol=2e-4)
    assert np.sum(first["record"]["confusion"]) == 20 * 64 * 64
    assert train(changed, runs_dir=tmp_path / "two", resume=True).folder == ours.folder


def test_processes_that_were_given_different_tasks_are_refused(experiment, tmp_path):
    """A sweep that was started as one job: without the check, one seed would be trained and scored for both."""
    outcomes = in_two(experiment, tmp_path, others=experiment.but(seed=1))
    assert all(outcome["error"] == "StegoError" and "different tasks" in outcome["message"] for outcome in outcomes)
    assert not runs_in(tmp_path)


def test_an_error_of_the_first_process_ends_all(experiment, tmp_path):
    outcomes = in_two(experiment.but(device="cuda:1"), tmp_path)
    assert all("device" in outcome["message"] for outcome in outcomes)


def test_torchrun_starts_a_script(experiment, tmp_path):
    script, values = tmp_path / "train.py", experiment.but(steps=2, batch_size=20).to_dict()
    script.write_text(
        "from stego_lib import Experiment, train\n"
        f"print(train(Experiment.from_dict({values!r}), runs_dir={str(tmp_path / 'runs')!r}).folder.name)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr[-2000:]
    (folder,) = runs_in(tmp_path / "runs")
    assert ended.stdout.count(folder.name) == 2
    assert ended.stderr.count("batch_size is 12") == 1, "one process shows notices"


def test_alone_everything_is_the_identity():
    values = torch.rand(4, 3, requires_grad=True)
    devices.join("cpu", "task")
    assert devices.gather(values) is values and devices.total(values) is values
    assert devices.share([1, 2, 3]) == [1, 2, 3]
    assert (devices.count(), devices.first(), devices.once(lambda: 7), devices.wait()) == (1, True, 7, None)


def slurm(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    usual = {"PROCID": "1", "STEP_NUM_TASKS": "2", "LOCALID": "0", "STEP_NUM_NODES": "2", "JOB_ID": "7", "STEP_ID": "3"}
    for name, value in (usual | values).items():
        monkeypatch.setenv(f"SLURM_{name}", value)


@pytest.mark.parametrize(
    ("nodes", "address"), [("gpu[03-05,08],login1", "gpu03"), ("n5,n7", "n5"), ("n[5]", "n5"), ("host-a", "host-a")]
)
def test_slurm_names_the_first_machine(monkeypatch, nodes, address):
    slurm(monkeypatch, STEP_NODELIST=nodes)
    joined = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **values: joined.update(values))
    monkeypatch.setattr(
        torch.distributed, "all_gather_object", lambda tasks, task, group: (_ for _ in ()).throw(EOFError)
    )
    with pytest.raises(EOFError):
        devices.join("cpu", "task")
    assert os.environ.pop("MASTER_ADDR") == address and os.environ.pop("MASTER_PORT") == "15703"
    assert (joined["rank"], joined["world_size"]) == (1, 2)


def test_fewer_gpus_than_processes_are_refused(monkeypatch):
    slurm(monkeypatch, STEP_NUM_NODES="1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(StegoError, match="GPU"):
        devices.join("auto", "task")
