"""Runs that are killed, interrupted, short of disk or not alone: nothing is lost, and nothing comes out otherwise."""

import math
import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import torch
from common import tiny_experiment
from killing import flat, refuse_half_files, runs_in, same, survive, wait_for

from stego_lib import Experiment, StegoError, load_run, train, training
from stego_lib.backbone import Backbone
from stego_lib.run import read_checkpoint
from stego_lib.utils.files import TEMPORARY

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
KILLS = 20
LONG = 400


@pytest.fixture(scope="module")
def experiment(scenes_root, backbone_file) -> Experiment:
    return tiny_experiment(scenes_root, backbone_file, steps=10, probes="after", validate_every=4)


@pytest.fixture(scope="module")
def reference(runner, experiment, tmp_path_factory) -> Path:
    """The folder of a run that nobody touched."""
    return Path(
        runner.do("train", experiment=experiment.to_dict(), runs_dir=str(tmp_path_factory.mktemp("ref")))["folder"]
    )


def test_killed_runs_go_on_to_the_same_weights_log_and_scores(runner, experiment, tmp_path):
    found = survive(runner, experiment, tmp_path, KILLS, seed=7)
    assert found["kills"] >= KILLS and all(found["ways"].values()), found


def session(pid: int) -> list[int]:
    """The processes of the session that process `pid` began."""
    found = []
    for other in psutil.pids():
        try:
            if os.getsid(other) == pid:
                found.append(other)
        except (ProcessLookupError, PermissionError):
            continue
    return found


@pytest.mark.parametrize("during", ["extraction", "training", "evaluation"])
def test_an_interrupted_run_can_be_resumed_and_leaves_no_process(runner, experiment, reference, tmp_path, during):
    """Ctrl-C: the process ends by itself, its temporary files are gone, and a resumed run gives the same."""
    reached = {
        "extraction": lambda: list(tmp_path.glob("features/.*train*.part")),
        "training": lambda: list(tmp_path.glob("*/kept/0000004.pt")),
        "evaluation": lambda: list(tmp_path.glob("features/.*val*.part")),
    }[during]
    job = dict(experiment=experiment.to_dict(), runs_dir=str(tmp_path))
    (pid,) = runner.start("train", slow=0.2, **job)
    wait_for(lambda: reached() or not psutil.pid_exists(pid))
    os.kill(pid, signal.SIGINT)
    (status,), (found,) = runner.wait(), runner.results()
    assert (status, found["error"]) == (1, "KeyboardInterrupt")
    wait_for(
        lambda: not session(pid), 10
    )  # it leaves no process; Python's own helper sees a moment later that it ended
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob(".unfinished*"))
    refuse_half_files(tmp_path)
    same(Path(runner.do("train", **job)["folder"]), reference)


@pytest.mark.parametrize("what", ["store", "checkpoint", "log"])
def test_a_full_disk_is_said_and_what_was_good_is_kept(runner, experiment, reference, tmp_path, what):
    """No file may grow above some bytes, as on a disk that is full. With room again the run goes on to the same result."""
    checkpoint = (reference / "checkpoint.pt").stat().st_size
    largest, steps = {"store": (60_000, 10), "checkpoint": (checkpoint // 2, 10), "log": (checkpoint + 500, 600)}[what]
    if what != "store":
        shutil.copytree(reference.parent / "features", tmp_path / "features")
    job = dict(experiment=experiment.but(steps=steps).to_dict(), runs_dir=str(tmp_path))
    runner.start("train", largest_file=largest, **job)
    (status,), (found,) = runner.wait(), runner.results()
    assert (status, found["error"]) == (1, "StegoError"), found
    assert "the disk is full or a limit is reached" in found["message"] and str(tmp_path) in found["message"]
    assert {"store": "features", "checkpoint": "checkpoint.pt", "log": "log.csv"}[what] in found["message"]
    refuse_half_files(tmp_path)
    if what == "log":
        (folder,) = runs_in(tmp_path)
        assert read_checkpoint(folder)["step"] > 0
    else:
        same(Path(runner.do("train", **job)["folder"]), reference)


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(experiment, tmp_path, monkeypatch):
    """Training resumes there once there is room."""
    monkeypatch.setattr(training, "SAVE_EVERY", 3)
    write, calls = Path.write_bytes, []

    def full(self, content):
        if self.suffix == ".pt":
            calls.append(self)
            if len(calls) == 4:
                raise OSError(28, "No space left on device")
        return write(self, content)

    changed = experiment.but(validate_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(StegoError, match=r"checkpoint\.pt cannot be written: the disk is full"):
            train(changed, runs_dir=tmp_path)
    (folder,) = runs_in(tmp_path)
    assert read_checkpoint(folder)["step"] == 6
    assert train(changed, runs_dir=tmp_path, resume=True).folder == folder


@pytest.mark.parametrize("harm, again", [(None, 4), ("rows", 8), ("record", 8), ("file", 12)])
def test_a_killed_extraction_goes_on_after_the_last_chunk(runner, experiment, tmp_path, harm, again):
    """Of three batches of four images two are safe; what did not reach the disk whole is computed anew, and no more."""
    job = dict(experiment=experiment.to_dict(), runs_dir=str(tmp_path / "killed"), keep_every=0.0)
    runner.start("extract", die_after=2, **job)
    assert runner.wait() == [-signal.SIGKILL]
    (part,) = (tmp_path / "killed" / "features").glob(".*.part")
    records = sorted((part / "chunks").iterdir())
    assert len(records) == 2
    if harm == "rows":  # of the first chunk
        content = bytearray((part / "features.npy").read_bytes())
        content[200] ^= 1
        (part / "features.npy").write_bytes(content)
    elif harm == "record":
        records[1].write_text(records[1].read_text()[:30])
    elif harm == "file":
        (part / "pooled.npy").unlink()
    found = runner.do("extract", **job)
    assert found["images"] == again and not part.exists()
    untouched = runner.do("extract", **(job | {"runs_dir": str(tmp_path / "untouched")}))
    assert untouched["images"] == 12
    for path in Path(untouched["folder"]).iterdir():
        assert path.read_bytes() == (Path(found["folder"]) / path.name).read_bytes()
    assert len(list(Path(found["folder"]).iterdir())) == 5


def test_two_runs_at_once_share_the_work_of_one_store(runner, experiment, tmp_path):
    runner.start("extract", slow=0.3, keep_every=0.0, experiment=experiment.to_dict(), runs_dir=str(tmp_path), copies=2)
    assert runner.wait() == [0, 0]
    assert sorted(found["images"] for found in runner.results()) == [4, 8], "each batch is computed once"
    assert len({found["folder"] for found in runner.results()}) == 1
    assert len(list((tmp_path / "features").glob("[!.]*"))) == 1


def test_the_batches_of_a_process_that_dies_are_computed_by_the_other(runner, experiment, tmp_path):
    """What it had recorded stays; what it had claimed is free again without a time limit."""
    job = dict(slow=0.3, keep_every=0.0, experiment=experiment.to_dict(), runs_dir=str(tmp_path), copies=2)
    pids = runner.start("extract", **job)
    wait_for(lambda: list(tmp_path.glob("features/.*.part/chunks/[!.]*.json")))
    os.kill(pids[0], signal.SIGKILL)
    assert runner.answers_within(120) and runner.wait() == [-signal.SIGKILL, 0]
    (survivor,) = runner.results()
    assert survivor["images"] in (4, 8, 12)
    alone = runner.do("extract", **(job | dict(slow=0, copies=1, runs_dir=str(tmp_path / "alone"))))
    for path in Path(alone["folder"]).iterdir():
        assert path.read_bytes() == (Path(survivor["folder"]) / path.name).read_bytes()


def test_two_runs_in_one_folder_do_not_mix(runner, experiment, reference, tmp_path):
    """Both begin at the same second in the same results folder: each gets a folder of its own, or says that one is taken."""
    runner.start("train", experiment=experiment.to_dict(), runs_dir=str(tmp_path), copies=2)
    statuses = runner.wait()
    found = runner.results()
    for status, result in zip(statuses, found, strict=True):
        assert status == 0 or "is being trained by another process" in result["message"], result
    assert 0 in statuses
    for folder in runs_in(tmp_path):
        same(folder, reference)


def test_a_run_that_is_being_trained_is_not_resumed_by_another(experiment, tmp_path, monkeypatch):
    """The second would write into the first one's log."""
    step, tried = training.train_step, []

    def meanwhile(*arguments):
        if not tried:
            tried.append(True)
            with pytest.raises(StegoError, match="is being trained by another process"):
                train(experiment, runs_dir=tmp_path, resume=True)
        return step(*arguments)

    monkeypatch.setattr(training, "train_step", meanwhile)
    train(experiment, runs_dir=tmp_path)
    assert tried and len(runs_in(tmp_path)) == 1


def test_memory_and_open_files_stay_flat(runner, experiment, tmp_path):
    values = experiment.but(steps=LONG, validate_every=0).to_dict()
    found = runner.do("long", experiment=values, runs_dir=str(tmp_path), every=20)
    assert found["steps"] == LONG and len(found["memory_mb"]) == 20
    assert flat(found["memory_mb"], 8), found["memory_mb"]
    assert flat(found["open_files"], 0), found["open_files"]


def test_flat_tells_a_leak():
    """512 bytes per step would be 200 kB here; this test leaks 1 MB every 20 steps, which must be seen."""
    assert flat([100.0] * 20, 8) and flat([50.0, 90.0, *[100.0] * 18], 8)
    assert not flat([100.0 + i for i in range(20)], 8) and not flat([7.0] * 19 + [8.0], 0)


# ---------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "term, value",
    [("loss_self", math.nan), ("loss_knn", math.inf), ("loss_rand", -math.inf), ("loss_cluster", math.nan), ("loss_linear", math.inf)],
)  # fmt: skip
def test_a_loss_that_is_no_number_stops_the_run(experiment, reference, tmp_path, monkeypatch, term, value):
    """The error names the step, the term and the last good checkpoint, which can be resumed from."""
    monkeypatch.setattr(training, "SAVE_EVERY", 3)
    step, calls = training.train_step, []

    def spoilt(*arguments):
        calls.append(arguments)
        values = step(*arguments)
        return values | {"loss": value, term: value} if len(calls) == 6 else values

    features = reference.parent / "features"
    shutil.copytree(features, tmp_path / "features")
    changed = experiment.but(validate_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", spoilt)
        with pytest.raises(
            StegoError, match=rf"{term} is not a finite number at step 5.*last checkpoint, of step 3, is good"
        ):
            train(changed, runs_dir=tmp_path)
    (folder,) = runs_in(tmp_path)
    assert read_checkpoint(folder)["step"] == 3
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", lambda *arguments: step(*arguments) | {term: value})
        with pytest.raises(StegoError, match=r"at step 3.*last checkpoint, of step 3, is good"):
            train(changed, runs_dir=tmp_path, resume=True)
    resumed = train(changed, runs_dir=tmp_path, resume=True)
    assert resumed.folder == folder and len(resumed.log) == 10


def test_weights_that_are_no_numbers_are_never_saved(experiment, tmp_path, monkeypatch):
    """The loss of the step before may still be finite."""
    monkeypatch.setattr(training, "SAVE_EVERY", 3)
    step, calls = training.train_step, []

    def spoilt(model, *arguments):
        calls.append(arguments)
        values = step(model, *arguments)
        if len(calls) == 6:
            model.head.linear.weight.data[0, 0] = torch.inf
        return values

    monkeypatch.setattr(training, "train_step", spoilt)
    with pytest.raises(StegoError, match=r"weight head\.linear\.weight is not a finite number at step 6.*of step 3"):
        train(experiment.but(validate_every=0), runs_dir=tmp_path)
    (folder,) = runs_in(tmp_path)
    assert read_checkpoint(folder)["step"] == 3


@pytest.mark.parametrize("where", ["training", "features"])
def test_running_out_of_memory_says_which_knob(experiment, tmp_path, monkeypatch, where):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    if where == "training":
        monkeypatch.setattr(training, "train_step", full)
    else:
        monkeypatch.setattr(Backbone, "forward", full)
    knobs = {"training": "batch_size, code_dim", "features": "train_size"}[where]
    with pytest.raises(StegoError, match=rf"needs more memory than there is.*20\.00 GiB.*{knobs}"):
        train(experiment, runs_dir=tmp_path)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_gives_the_same_with_other_numbers_of_threads_that_read(
    experiment, reference, tmp_path, monkeypatch, threads
):
    """There are no loader workers: batches come from the store. What reads images in threads gives the same however many."""
    monkeypatch.setattr(os, "cpu_count", lambda: threads)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(training, "SAVE_EVERY", 3)
    try:
        run = train(experiment, runs_dir=tmp_path)
    finally:
        torch.set_num_threads(before)
    assert (run.folder / "log.csv").read_text() == (reference / "log.csv").read_text()
    weights = load_run(reference).model.state_dict()
    heads = {name: value for name, value in run.model.state_dict().items() if "cluster_probe" not in name}
    assert all(torch.equal(value, weights[name]) for name, value in heads.items())


# ---------------------------------------------------------------------------------------------- the log


def broken_off(experiment, runs_dir, monkeypatch) -> Path:
    monkeypatch.setattr(training, "SAVE_EVERY", 3)
    step, calls = training.train_step, []

    def breaks(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", breaks)
        with pytest.raises(KeyboardInterrupt):
            train(experiment, runs_dir=runs_dir)
    (folder,) = runs_in(runs_dir)
    return folder


def test_a_line_of_the_log_that_was_cut_short_is_no_step(experiment, reference, tmp_path, monkeypatch):
    """The beginning of "2..." may look like step 2."""
    folder = broken_off(experiment, tmp_path, monkeypatch)
    with open(folder / "log.csv", "a") as file:
        file.write("2")
    run = train(experiment, runs_dir=tmp_path, resume=True)
    assert run.folder == folder and run.log.index.tolist() == list(range(10)) and run.log.notna().all(axis=None)


def test_a_log_that_lacks_steps_is_refused(experiment, tmp_path, monkeypatch):
    folder = broken_off(experiment, tmp_path, monkeypatch)
    lines = (folder / "log.csv").read_text().splitlines(keepends=True)
    (folder / "log.csv").write_text("".join(lines[:2] + lines[3:]))
    with pytest.raises(StegoError, match=r"log\.csv lacks lines of the 3 steps.*without resume"):
        train(experiment, runs_dir=tmp_path, resume=True)


def test_what_a_killed_write_left_is_removed(experiment, tmp_path, monkeypatch):
    folder = broken_off(experiment, tmp_path, monkeypatch)
    for half in (folder / f"{TEMPORARY}checkpoint.1.pt", folder / "kept" / f"{TEMPORARY}0000004.1.pt"):
        assert half.parent.is_dir()
        half.write_bytes(b"half")
    train(experiment, runs_dir=tmp_path, resume=True)
    assert not list(folder.rglob(f"{TEMPORARY}*"))


def test_a_run_can_be_resumed_from_its_first_step_on(experiment, tmp_path, monkeypatch):
    """A run that is killed before its first regular checkpoint goes on in its own folder."""
    monkeypatch.setattr(training, "train_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(experiment, runs_dir=tmp_path)
    monkeypatch.undo()
    (folder,) = runs_in(tmp_path)
    assert read_checkpoint(folder)["step"] == 0
    assert train(experiment, runs_dir=tmp_path, resume=True).folder == folder


def test_another_run_that_cannot_be_read_is_passed_over(experiment, tmp_path):
    (tmp_path / "zzz").mkdir()
    (tmp_path / "zzz" / "experiment.json").write_text("{")
    with pytest.warns(match="zzz/experiment.json is passed over"):
        assert train(experiment, runs_dir=tmp_path, resume=True).step == 10
