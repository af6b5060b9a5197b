"""Several processes on one run: the same losses, weights and confusion matrices as one."""

import os
from datetime import timedelta

import numpy as np
import pytest
import torch
from common import tiny_experiment
from killing import Job, in_two, runs_in, train_and_score
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from stego_lib import Experiment, StegoError, load_run, train
from stego_lib.datasets.scenes import draw_scenes
from stego_lib.utils import devices
from stego_lib.utils.files import read_json

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, backbone_file) -> Experiment:
    """Two batches of images to score, so that two processes have one each; dropout on."""
    root = tmp_path_factory.mktemp("data")
    draw_scenes(root / "scenes", train=12, val=20, size=64)
    return tiny_experiment(root, backbone_file, steps=5, dropout=0.3)


@pytest.mark.parametrize("changes", [dict(official={"subtract_mean": True}), dict(feature_store="online")], ids=str)
def test_two_processes_give_what_one_gives(experiment, tmp_path, monkeypatch, changes):
    changed = experiment.but(**changes)
    first, second = in_two(changed, tmp_path / "two", baselines=True)
    for outcome in (first, second):
        del outcome["record"]["evaluation_seconds"]
    assert first == second and len(runs_in(tmp_path / "two")) == 1, (first, second)
    ours, theirs = load_run(first["folder"]), train(changed, runs_dir=tmp_path / "one")
    np.testing.assert_allclose(ours.log.to_numpy(), theirs.log.to_numpy(), atol=1e-5)
    for name, value in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=0, atol=2e-4)
    assert np.sum(first["record"]["confusion"]) == 20 * 64 * 64
    assert train(changed, runs_dir=tmp_path / "two", resume=True).folder == ours.folder


@pytest.mark.parametrize("slurm, changes", [(False, dict(seed=1)), (True, dict(steps=7))], ids=["torchrun", "srun"])
def test_processes_that_were_given_different_tasks_are_refused(experiment, tmp_path, changes, slurm):
    """A sweep that was started as one job: without the check, one run would be trained for both, or both would hang."""
    outcomes = in_two(experiment, tmp_path, others=experiment.but(**changes), slurm=slurm)
    assert all(outcome["error"] == "StegoError" and "different tasks" in outcome["message"] for outcome in outcomes)
    assert not runs_in(tmp_path)


def test_processes_that_evaluate_different_runs_are_refused(experiment, tmp_path):
    """Without the check, both would be scored as one run that is neither of them."""
    folders = [train(experiment.but(seed=seed, steps=1), runs_dir=tmp_path).folder for seed in (0, 1)]
    outcomes = in_two(experiment, tmp_path, others=dict(run=str(folders[1])), run=str(folders[0]))
    assert all(outcome["error"] == "StegoError" and "different tasks" in outcome["message"] for outcome in outcomes)
    assert not any((folder / "metrics.json").exists() for folder in folders)


def test_a_process_that_does_not_come_is_waited_for_some_minutes_only(experiment, tmp_path):
    assert timedelta(minutes=1) < devices.JOIN_TIMEOUT <= timedelta(minutes=10)
    names = {"PROCID": "0", "LOCALID": "0", "STEP_NUM_TASKS": "2", "STEP_NUM_NODES": "1", "JOB_ID": "42"}
    environ = {f"SLURM_{name}": value for name, value in names.items()}
    outcome = Job(experiment, tmp_path, environ=environ, meeting=3).outcome()
    assert outcome["error"] == "StegoError" and "start" in outcome["message"], outcome


@pytest.mark.parametrize(
    "step", [{}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}], ids=["sbatch", "srun"]
)
def test_a_task_of_a_job_array_is_a_run_by_itself(monkeypatch, recwarn, step):
    """Also where the job reserves several tasks, which only srun would start."""
    values = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    for name, value in (values | {"SLURM_NTASKS": "1" if step else "4", **step}).items():
        monkeypatch.setenv(name, value)
    devices.join("cpu", "task")
    assert devices.read_ranks() is None and devices.count() == 1 and not recwarn.list


def test_an_error_of_the_first_process_ends_all(experiment, tmp_path):
    outcomes = in_two(experiment.but(device="cuda:1"), tmp_path)
    assert all("device" in outcome["message"] for outcome in outcomes)


def test_torchruns_own_launcher_starts_one_run(experiment, tmp_path):
    """It sets the variables of `torchrun --standalone --nproc-per-node 2`; workers are forked, which is quicker."""
    config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="forkserver")
    values, result = experiment.but(steps=2, batch_size=20).to_dict(), tmp_path / "result.json"
    elastic_launch(config, train_and_score)(values, str(tmp_path / "runs"), str(result), {})
    assert [str(folder) for folder in runs_in(tmp_path / "runs")] == [read_json(result)["folder"]]


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
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda tasks, task: (_ for _ in ()).throw(EOFError))
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
