"""Several processes on one run: the same losses, weights and confusion matrices as one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import ROOT, tiny_experiment
from killing import Runner, miou_of, runs_in, wait_for

from stego_lib import Experiment, StegoError, evaluate, load_run, probes, train, training
from stego_lib.datasets.scenes import draw_scenes
from stego_lib.run import read_checkpoint
from stego_lib.utils import devices
from stego_lib.utils.files import read_json

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
pytest.importorskip("lightning_fabric", reason="lightning-fabric is not installed (extra `parallel`)")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, backbone_file) -> Experiment:
    """Two batches of images to score, so that two processes have one each; dropout on."""
    root = tmp_path_factory.mktemp("data")
    draw_scenes(root / "scenes", train=12, val=20, size=64)
    return tiny_experiment(root, backbone_file, steps=5, dropout=0.3, subtract_mean=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """k-means begins once, as in the processes of the runner."""
    monkeypatch.setattr(probes, "RESTARTS", 1)


def started_by(program: str) -> dict[str, str]:
    """What the environment tells each of two processes that a program has started on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return where | {
        "torchrun": {
            "TORCHELASTIC_RUN_ID": "1", "RANK": "{rank}", "LOCAL_RANK": "{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        },
        "slurm": {
            "SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{rank}", "SLURM_NODEID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "1",
            "SLURM_JOB_NAME": "stego", "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1",
        },
        "slurm, two machines": {
            "SLURM_PROCID": "{rank}", "SLURM_LOCALID": "0", "SLURM_NODEID": "{rank}", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "1",
            "SLURM_JOB_NAME": "stego", "SLURM_NTASKS_PER_NODE": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2",
        },
    }[program]  # fmt: skip


def in_two(runner: Runner, program: str, **job) -> list[dict]:
    runner.start("train", copies=2, join=started_by(program), **job)
    statuses = runner.wait()
    found = runner.results()
    assert statuses == [0, 0], found
    return found


def agree(run: Path, one: Path) -> None:
    """The same losses, shifts and weights but for rounding, and a record that one process alone makes of the checkpoint."""
    ours, theirs = load_run(run), load_run(one)
    np.testing.assert_allclose(ours.log.to_numpy(), theirs.log.to_numpy(), atol=1e-5)
    assert ours.shifts == theirs.shifts and ours.step == theirs.step
    for name, value in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=0, atol=2e-4)
    record = read_json(run / "metrics.json")
    alone = json.loads(json.dumps(evaluate(ours, baselines=False)))
    assert record["confusion"] == alone["confusion"] and record["matching"] == alone["matching"]
    assert record["experiment"] == alone["experiment"]
    for name, scores in alone["scores"].items():
        assert record["scores"][name]["miou"] == scores["miou"], name


@pytest.mark.parametrize(
    "program, changes",
    [
        ("torchrun", {}),
        ("slurm", dict(published=True, centering=True)),
        ("torchrun", dict(feature_store="online", validate_every=2, probes="after", subtract_mean=False)),
        ("torchrun", dict(rec_weight=0.1, crf_weight=0.1, aug_alignment_weight=0.1, head="linear")),
    ],
    ids=str,
)
def test_two_processes_give_what_one_gives(runner, experiment, tmp_path, program, changes):
    changed = experiment.but(**changes)
    found = in_two(runner, program, experiment=changed.to_dict(), runs_dir=str(tmp_path / "two"))
    assert found[0]["folder"] == found[1]["folder"] and len(runs_in(tmp_path / "two")) == 1
    assert found[0]["weights"] == found[1]["weights"], "every process ends with the same model"
    agree(Path(found[0]["folder"]), train(changed, runs_dir=tmp_path / "one").folder)


def test_features_are_shared_out_and_the_store_is_the_same(runner, experiment, tmp_path):
    """Three batches of four training images, five to score, and those again flipped: each is computed once, by either process."""
    job = dict(experiment=experiment.but(steps=1).to_dict(), keep_every=0.0, slow=0.2)
    two = in_two(runner, "torchrun", runs_dir=str(tmp_path / "two"), **job)
    one = runner.do("train", runs_dir=str(tmp_path / "one"), **job)
    assert one["images"] == 12 + 2 * 20 == sum(found["images"] for found in two)
    assert all(found["images"] >= 4 for found in two), "each takes the next batch when it is free"
    for path in (tmp_path / "one" / "features").glob("*/*"):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert other.read_bytes() == path.read_bytes(), path.name


def test_two_machines_go_on_where_both_were_killed_while_they_extracted(runner, experiment, tmp_path):
    """With one shared folder, as SLURM starts them. What was recorded is not computed again, and the store is that of one."""
    job = dict(experiment=experiment.but(steps=1).to_dict(), runs_dir=str(tmp_path / "two"), keep_every=0.0, slow=0.3)
    pids = runner.start("train", copies=2, join=started_by("slurm, two machines"), **job)
    wait_for(lambda: list(tmp_path.glob("two/features/.*-train-*.part/chunks/[!.]*.json")))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    runner.wait()
    assert not runs_in(tmp_path / "two") and not list(tmp_path.glob("two/features/[!.]*-train-*"))
    two = in_two(runner, "slurm, two machines", **job)
    one = runner.do("train", **(job | {"runs_dir": str(tmp_path / "one"), "slow": 0}))
    training, scored = 12, 2 * 20
    assert one["images"] == training + scored
    assert scored <= sum(found["images"] for found in two) <= training + scored - 4, "a batch of four at least was safe"
    assert len(runs_in(tmp_path / "two")) == 1 and two[0]["weights"] == two[1]["weights"]
    for path in (tmp_path / "one" / "features").glob("*/*"):
        assert (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes(), path.name


def test_a_run_that_is_opened_is_scored_together(runner, experiment, tmp_path):
    """By processes that torchrun has started; with the CRF, which takes images one by one. Each computes features of its part."""
    run = train(experiment.but(steps=1, crf=True), runs_dir=tmp_path)
    alone = evaluate(run, baselines=False)
    for store in tmp_path.glob("features/[!.]*-val-*"):
        shutil.rmtree(store)
    runner.start("evaluate", folder=str(run.folder), copies=2, join=started_by("torchrun"), keep_every=0.0, slow=0.2)
    assert runner.wait() == [0, 0], runner.results()
    found = runner.results()
    assert sum(one["images"] for one in found) == 2 * 20 and all(one["images"] >= 4 for one in found)
    for one in found:
        assert one["confusion"] == alone["confusion"] and one["miou"] == miou_of(alone)


def test_two_go_on_where_one_was_broken_off_and_one_where_two_were(runner, experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 3)
    step, calls = training.train_step, []

    def breaks(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "train_step", breaks)
        train(experiment, runs_dir=tmp_path)
    (folder,) = runs_in(tmp_path)
    assert read_checkpoint(folder)["step"] == 3
    found = in_two(runner, "torchrun", experiment=experiment.to_dict(), runs_dir=str(tmp_path))
    assert Path(found[0]["folder"]) == folder
    agree(folder, train(experiment, runs_dir=tmp_path / "one").folder)
    assert train(experiment, runs_dir=tmp_path, resume=True).folder == folder


# ---------------------------------------------------------------------------------------------- what goes wrong


def test_the_baselines_are_those_of_one_process(runner, experiment, tmp_path):
    job = dict(experiment=experiment.but(steps=2).to_dict(), compare=True)
    two, one = (
        in_two(runner, "torchrun", runs_dir=str(tmp_path / "two"), **job)[0],
        runner.do("train", runs_dir=str(tmp_path / "one"), **job),
    )
    scores = [read_json(Path(found["folder"]) / "metrics.json")["scores"] for found in (two, one)]
    assert scores[0].keys() == scores[1].keys() and "kmeans_features" in scores[0]
    for name, found in scores[0].items():
        assert found["miou"] == pytest.approx(scores[1][name]["miou"], abs=0.3), name


def test_torchrun_starts_a_script(experiment, tmp_path):
    """The line of the book, with the real torchrun: one run, which both processes return, and one notice."""
    script = tmp_path / "train.py"
    script.write_text(
        f"""
from stego_lib import Experiment, evaluate, train
run = train(Experiment.from_dict({experiment.but(steps=2, batch_size=20).to_dict()!r}), runs_dir={str(tmp_path / "runs")!r})
record = evaluate(run, baselines=False)
print(run.folder.name + " " + str(record["scores"]["cluster"]["miou"]))
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr[-2000:]
    (folder,) = runs_in(tmp_path / "runs")
    miou = read_json(folder / "metrics.json")["scores"]["cluster"]["miou"]
    assert ended.stdout.count(f"{folder.name} {miou}") == 2
    assert ended.stderr.count("has 12 training images, so batch_size is 12") == 1


def test_a_device_with_a_number_is_refused(runner, experiment, tmp_path):
    asked = experiment.but(device="cuda:1")
    runner.start("train", copies=2, join=started_by("torchrun"), experiment=asked.to_dict(), runs_dir=str(tmp_path))
    assert runner.wait() == [1, 1] and "device = 'cuda:1' is one" in runner.results()[0]["message"]


def as_torchrun(monkeypatch) -> None:
    for key, value in started_by("torchrun").items():
        monkeypatch.setenv(key, value.format(rank=0))
    monkeypatch.setattr(devices, "_fabric", None)


def test_without_fabric_the_extra_is_named(monkeypatch):
    as_torchrun(monkeypatch)
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(StegoError, match=r"pip install 'stego_lib\[parallel\]'"):
        devices.join("cpu")


def test_alone_everything_is_the_identity():
    values = torch.rand(4, 3, requires_grad=True)
    devices.join("cpu")
    assert (
        devices.gather(values) is values and devices.total(values) is values and devices.share([1, 2, 3]) == [1, 2, 3]
    )
    assert (devices.count(), devices.first(), devices.once(lambda: 7), devices.wait()) == (1, True, 7, None)


class Fabric:
    """What `devices` asks of Lightning Fabric, as one of several processes sees it."""

    def __init__(self, rank: int, count: int, parts: list[torch.Tensor] | None = None):
        self.global_rank, self.world_size, self.parts = rank, count, parts

    def all_gather(self, value):
        """What each process would have sent: lengths, or rows padded to the longest."""
        if value.ndim == 0:
            return torch.tensor([len(part) for part in self.parts])
        return torch.stack([F.pad(part, [0, 0, 0, len(value) - len(part)]) for part in self.parts])


def test_shares_are_the_whole_in_order_and_gathered_again(monkeypatch):
    for count in (1, 2, 3, 5):
        for length in (1, 4, 7, 11):
            rows, parts = torch.rand(length, 2), []
            for rank in range(count):
                monkeypatch.setattr(devices, "_fabric", Fabric(rank, count))
                parts.append(devices.share(rows))
            for rank, part in enumerate(parts):
                monkeypatch.setattr(devices, "_fabric", Fabric(rank, count, parts))
                assert torch.equal(devices.gather(part), rows)


@pytest.mark.parametrize(
    "asked, gpus, expected", [("auto", 2, "cuda"), ("auto", 0, "cpu"), ("cuda", 3, "cuda"), ("cpu", 2, "cpu")]
)
def test_processes_have_a_gpu_each_where_there_are_any(monkeypatch, asked, gpus, expected):
    """What Fabric is asked for; there is no GPU here."""
    made = []

    class Asked:
        global_rank, world_size = 0, 2

        def __init__(self, **options):
            made.append(options)

        def launch(self):
            made.append("launched")

    as_torchrun(monkeypatch)
    monkeypatch.setattr("lightning_fabric.Fabric", Asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    devices.join(asked)
    assert made[0]["accelerator"] == expected and made[0]["devices"] == 2 and made[1:] == ["launched"]


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_fewer_gpus_than_processes_are_refused(monkeypatch, asked):
    as_torchrun(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(StegoError, match="2 processes need a GPU each, this machine has 1"):
        devices.join(asked)
