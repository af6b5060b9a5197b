"""Several processes on one run: the same losses, weights and tables as one, whoever starts them; errors and interruptions."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from common import tiny_experiment
from killing import Runner, miou_of, runs_in, weights_of
from torch.multiprocessing import ProcessExitedException

from stego_lib import Experiment, StegoError, crf, evaluate, evaluation, load_run, probes, train, training
from stego_lib.datasets.scenes import draw_scenes
from stego_lib.features.store import Features, Share
from stego_lib.model import ChannelDropout
from stego_lib.run import read_checkpoint
from stego_lib.runtime import devices as processes
from stego_lib.runtime.files import read_json

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


def test_devices_start_processes_by_themselves(runner, experiment, tmp_path):
    """And the baselines, which one process fits, are the same."""
    asked = experiment.but(devices=2, steps=2)
    folder = Path(
        runner.do("train", experiment=asked.to_dict(), runs_dir=str(tmp_path / "two"), compare=True)["folder"]
    )
    record = read_json(folder / "metrics.json")
    assert read_json(folder / "experiment.json")["devices"] == 2 and "devices" not in record["experiment"]
    one = train(experiment.but(steps=2), runs_dir=tmp_path / "one")
    agree(folder, one.folder)
    alone = runner.do(
        "train", experiment=experiment.but(steps=2).to_dict(), runs_dir=str(tmp_path / "one"), compare=True
    )
    for name, scores in read_json(Path(alone["folder"]) / "metrics.json")["scores"].items():
        assert record["scores"][name]["miou"] == pytest.approx(scores["miou"], abs=0.3), name


def test_fresh_processes_train_from_here(experiment, tmp_path):
    """As from a notebook: nothing is forked, everything is imported anew."""
    run = train(experiment.but(devices=2, steps=2), runs_dir=tmp_path)
    assert run.step == 2 and len(run.log) == 2 and not run.model.training
    assert weights_of(run.model) == weights_of(load_run(run.folder).model)


def test_features_are_shared_out_and_the_store_is_the_same(runner, experiment, tmp_path):
    """Three batches of four training images: one process computes two, the other one; five of 20 to score."""
    job = dict(experiment=experiment.but(steps=1).to_dict(), keep_every=0.0)
    two = in_two(runner, "torchrun", runs_dir=str(tmp_path / "two"), **job)
    one = runner.do("train", runs_dir=str(tmp_path / "one"), **job)
    assert one["images"] == 12 + 2 * 20 and sorted(found["images"] for found in two) == [4 + 16, 8 + 24]
    for path in (tmp_path / "one" / "features").glob("*/*"):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert other.read_bytes() == path.read_bytes(), path.name


def test_a_run_that_is_opened_is_scored_together(runner, experiment, tmp_path):
    """By processes that torchrun has started; with the CRF, which takes images one by one. Each computes features of its part."""
    run = train(experiment.but(steps=1, crf=crf.available()), runs_dir=tmp_path)
    alone = evaluate(run, baselines=False)
    for store in tmp_path.glob("features/[!.]*-val-*"):
        shutil.rmtree(store)
    runner.start("evaluate", folder=str(run.folder), copies=2, join=started_by("torchrun"), keep_every=0.0)
    assert runner.wait() == [0, 0], runner.results()
    found = runner.results()
    assert sorted(one["images"] for one in found) == [2 * 8, 2 * 12], (
        "20 images and their mirror images, by batches of 4"
    )
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
    assert train(experiment.but(devices=1), runs_dir=tmp_path, resume=True).folder == folder


# ---------------------------------------------------------------------------------------------- what goes wrong


def test_an_error_in_a_process_is_told_with_its_message(runner, experiment, tmp_path):
    """A dataset that is not there, found by the processes, not by who started them."""
    asked = experiment.but(devices=2, data_root=str(tmp_path), dataset="camvid")
    runner.start("train", experiment=asked.to_dict(), runs_dir=str(tmp_path / "runs"))
    assert runner.wait() == [1]
    (found,) = runner.results()
    assert found["error"] == "DataNotFound" and "camvid was not found in" in found["message"]


def told(folder: Path, rank: int, when: float, error: StegoError | None, text: str = "") -> None:
    known = (None, text) if error is None else (type(error).__name__, str(error))
    (folder / f"error{rank}").write_text(json.dumps([when, *known, text]))


def test_the_first_error_is_the_one_that_is_raised(tmp_path):
    """The others only lost their partner."""
    ended = ProcessExitedException("process 0 terminated with exit code 1", error_index=0, error_pid=7, exit_code=1)
    assert "__main__" in str(processes._first_error(tmp_path, ended)), "it could not say why"
    told(tmp_path, 0, 2.0, None, "RuntimeError: connection closed")
    told(tmp_path, 1, 1.0, None, "ZeroDivisionError: here")
    assert "ZeroDivisionError: here" in str(processes._first_error(tmp_path, ended))
    told(tmp_path, 2, 3.0, StegoError("the disk is full"))
    assert str(processes._first_error(tmp_path, ended)) == "the disk is full"


def test_a_process_that_is_killed_ends_the_others_and_ctrl_c_ends_all(runner, experiment, tmp_path):
    asked = experiment.but(devices=2, steps=2000)
    for way in ("killed", "interrupted"):
        (pid,) = runner.start("train", experiment=asked.to_dict(), runs_dir=str(tmp_path / way))
        until = time.monotonic() + 60
        while not list(tmp_path.glob(f"{way}/*/log.csv")) and time.monotonic() < until:
            time.sleep(0.05)
        children = psutil.Process(pid).children()
        workers = [child for child in children if not child.children() and child.is_running()]
        assert len(workers) == 2
        os.kill(workers[1].pid if way == "killed" else pid, signal.SIGKILL if way == "killed" else signal.SIGINT)
        assert runner.wait() == [1]
        (found,) = runner.results()
        if way == "killed":
            assert found["error"] == "StegoError" and "SIGKILL" in found["message"], found
        else:
            assert found["error"] == "KeyboardInterrupt", found
        assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)


@pytest.mark.parametrize(
    "changes, message",
    [(dict(batch_size=5), "a batch of 5 does not divide into 2"), (dict(device="cuda:1"), "device = 'cuda:1' is one")],
    ids=str,
)
def test_what_cannot_be_shared_is_refused(runner, experiment, tmp_path, changes, message):
    asked = experiment.but(devices=2, **changes)
    runner.start("train", experiment=asked.to_dict(), runs_dir=str(tmp_path))
    assert runner.wait() == [1] and message in runner.results()[0]["message"]


def test_another_number_than_was_started_is_refused(monkeypatch):
    for key, value in started_by("torchrun").items():
        monkeypatch.setenv(key, value)
    assert processes.started() == (2, 1)
    with pytest.raises(StegoError, match="devices = 3, but 2 processes were started"):
        processes.join(3, "cpu")


def test_without_fabric_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lightning_fabric", None)
    with pytest.raises(StegoError, match=r"pip install 'stego_lib\[parallel\]'"):
        processes.spawn(print, 2, "cpu")


def test_alone_everything_is_the_identity():
    values = torch.rand(4, 3, requires_grad=True)
    alone = processes.ALONE
    assert alone.gather(values) is values and alone.mean(values) is values and alone.share([1, 2, 3]) == [1, 2, 3]
    assert (alone.rank, alone.count, alone.first, alone.device("auto")) == (0, 1, True, "auto")


def test_shares_are_the_whole_in_order():
    one = processes.Processes()
    for count in (1, 2, 3, 5):
        for length in (0, 1, 4, 7, 11):
            parts = []
            for rank in range(count):
                one.rank, one.count = rank, count
                parts += one.share(list(range(length)))
            assert parts == list(range(length))


class Numbered(Features):
    """Features, images and labels that say which row they are."""

    def __init__(self, count: int):
        self.name, self.has_labels, self.n_classes = "numbered", True, 3
        self.shape, self.image_size, self.expected = (count, 1, 1, 1), (2, 2), []
        self.pooled = torch.arange(float(count))[:, None]

    def rows(self, index, device="cpu"):
        return index.view(-1, 1, 1, 1).float()

    def stored_labels(self, index):
        return index.view(-1, 1, 1).expand(-1, 2, 2).to(torch.uint8)

    def image_rows(self, index):
        return index.view(-1, 1, 1, 1).expand(-1, 3, 2, 2).to(torch.uint8)

    def expect(self, index):
        self.expected.append(index)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_shares_of_features_are_all_rows_in_whole_batches(count):
    """Whatever is asked of a share is that of its rows in the whole; 31 rows are 8 batches, so of 9 processes one has none."""
    whole, one, found = Numbered(31), processes.Processes(), []
    for rank in range(count):
        one.rank, one.count = rank, count
        share = Share(whole, one, 4)
        own = torch.arange(len(share)).flip(0)
        numbers = share.places(own)
        assert len(share) == 0 or share.places(own[-1:]) % 4 == 0, "it begins with a batch"
        assert torch.equal(share.rows(own).flatten().long(), numbers)
        assert torch.equal(share.image_rows(own)[:, 2, 1, 1].long(), numbers)
        assert torch.equal(share.label_rows(own)[:, 1, 0], numbers)
        assert torch.equal(share.pooled[own, 0].long(), numbers)
        share.expect(own)
        assert torch.equal(whole.expected[-1], numbers)
        assert share.image_size == (2, 2) and share.has_labels and share.n_classes == 3 and share.shared_by is one
        found += numbers.flip(0).tolist()
    assert found == list(range(31))


@pytest.mark.parametrize(
    "asked, gpus, expected", [("auto", 2, "cuda"), ("auto", 0, "cpu"), ("cuda", 3, "cuda"), ("cpu", 2, "cpu")]
)
def test_processes_have_a_gpu_each_where_there_are_any(monkeypatch, asked, gpus, expected):
    """What Fabric is asked for; there is no GPU here."""
    made = []

    class Fabric:
        global_rank, world_size = 0, 2

        def __init__(self, **options):
            made.append(options)

        def launch(self):
            made.append("launched")

    monkeypatch.setattr("lightning_fabric.Fabric", Fabric)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    joined = processes._joined(2, 1, asked)
    assert made[0]["accelerator"] == expected and made[0]["devices"] == 2 and made[1:] == ["launched"]
    assert (joined.rank, joined.count) == (0, 2)


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_fewer_gpus_than_processes_are_refused(monkeypatch, asked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(StegoError, match="2 processes need a GPU each, this machine has 1"):
        processes._joined(2, 1, asked)


def test_a_process_that_reads_its_script_again_starts_no_others(monkeypatch):
    """What Python says of a process while it does."""
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    monkeypatch.setattr(torch.multiprocessing, "start_processes", lambda *_, **__: pytest.fail("others were started"))
    with pytest.raises(
        StegoError, match=r"a script is read again by every process.*put what it does below if __name__"
    ):
        processes.spawn(print, 1, "cpu")


# ---------------------------------------------------------------------------------------------- dropout


def test_dropout_is_that_of_torch_and_shares_have_their_part_of_its_mask():
    features = torch.rand(6, 5, 3, 2) + 0.5
    torch.manual_seed(0)
    expected = torch.nn.Dropout2d(0.4)(features)
    for count in (1, 2, 3):
        parts = []
        for rank, part in enumerate(features.chunk(count)):
            dropout = ChannelDropout(0.4)
            dropout.rank, dropout.count = rank, count
            torch.manual_seed(0)
            parts.append(dropout(part))
        assert torch.equal(torch.cat(parts), expected)
    assert torch.equal(ChannelDropout(0.4).eval()(features), features)


@pytest.mark.parametrize(
    "stands, here, how", [(True, (1, 1), "spawned"), (False, (1, 1), "alone"), (True, (2, 1), "joined")]
)
def test_who_scores_a_run_of_several_devices(tmp_path, monkeypatch, stands, here, how):
    """New processes open the run's folder; one that has none yet, or that all have opened, needs none."""
    if stands:
        (tmp_path / "checkpoint.pt").touch()
    run = SimpleNamespace(
        experiment=Experiment(devices=2, device="cpu"), folder=tmp_path, processes=SimpleNamespace(count=1)
    )
    monkeypatch.setattr(evaluation, "started", lambda: here)
    monkeypatch.setattr(evaluation, "spawn", lambda _, devices, device, folder, *__: ("spawned", devices, folder))
    monkeypatch.setattr(evaluation, "join", lambda devices, device: SimpleNamespace(count=devices))
    monkeypatch.setattr(evaluation, "evaluate_among", lambda run, *_: "joined" if run.processes.count == 2 else "alone")
    assert evaluate(run) == (("spawned", 2, tmp_path) if how == "spawned" else how)
