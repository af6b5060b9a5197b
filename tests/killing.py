"""Kills runs of training, each in a process of its own, and looks at what they leave.

A runner, which has imported torch once, forks a child for each job, so that one kill costs a fraction of a second. Jobs are
one JSON object a line: {"what": NAME, ...}; see the functions of `JOBS`.
"""

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from stego_lib import Experiment, baselines, evaluate, load_run, open_dataset, probes, train, training
from stego_lib.backbone import Backbone
from stego_lib.features import extraction
from stego_lib.features.opening import open_store
from stego_lib.run import read_checkpoint
from stego_lib.utils.files import TEMPORARY, read_json, write_json

SAVE_EVERY = 3
TRACED = {
    "training.py",
    "run.py",
    "files.py",
    "store.py",
    "extraction.py",
    "arrays.py",
    "evaluation.py",
    "intact.py",
}
"""Files of the library at any line of which a run may be killed."""
SAVING = {"atomic", "save_state", "write_json", "save", "keep_weights", "sync", "save_experiment"}
"""Functions in which it is killed while it saves."""
ELSEWHERE = {"_feed", "fingerprint"}
"""Functions of many lines in which nothing can be lost."""
REACH = 0.6
"""How far into a whole run the kills reach. What was resumed is shorter, so they come to its end all the same."""


# ---------------------------------------------------------------------------------------------- in the child


def weights_of(model: torch.nn.Module) -> float:
    """One number that tells models apart."""
    return sum(float(value.double().sum()) for value in model.state_dict().values())


def job_train(experiment: dict[str, Any], runs_dir: str, compare: bool = False, **_: Any) -> dict[str, Any]:
    """Trains, or goes on training, and evaluates; with the baselines if `compare`."""
    seen, forward = [], Backbone.forward
    Backbone.forward = lambda self, images: (seen.append(len(images)), forward(self, images))[1]
    run = train(Experiment.from_dict(experiment), runs_dir=runs_dir, resume=True)
    evaluate(run, baselines=compare)
    return {"folder": str(run.folder), "images": sum(seen), "weights": weights_of(run.model)}


def job_evaluate(folder: str, **_: Any) -> dict[str, Any]:
    """Opens a run that is trained, and evaluates it without the baselines; tells how many images went through the backbone here."""
    seen, forward = [], Backbone.forward
    Backbone.forward = lambda self, images: (seen.append(len(images)), forward(self, images))[1]
    record = evaluate(load_run(folder), baselines=False)
    return {"images": sum(seen), "confusion": record["confusion"], "miou": miou_of(record)}


def miou_of(record: dict[str, Any]) -> dict[str, float]:
    """mIoU of each method of a run record."""
    return {name: scored["miou"] for name, scored in record["scores"].items()}


def job_extract(experiment: dict[str, Any], runs_dir: str, die_after: int = -1, **_: Any) -> dict[str, Any]:
    """Opens the store of the training images; tells how many images went through the backbone here.

    die_after: kills this process when so many batches have gone through it.
    """
    asked = Experiment.from_dict(experiment)
    seen, forward = [], Backbone.forward

    def counted(self: Backbone, images: torch.Tensor) -> torch.Tensor:
        if len(seen) == die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(len(images))
        return forward(self, images)

    Backbone.forward = counted
    dataset = open_dataset(asked.dataset, asked.data_root, "train")
    store = open_store(dataset, Backbone.of(asked), asked.train_size, Path(runs_dir) / "features", batch=4)
    return {"images": sum(seen), "folder": str(store.folder)}


def job_long(experiment: dict[str, Any], runs_dir: str, every: int, **_: Any) -> dict[str, Any]:
    """Trains, and measures resident memory (MB) and open files every so many steps."""
    process, step, memory, files = psutil.Process(), training.train_step, [], []
    training.SAVE_EVERY = every // 2

    def measured(*arguments: Any) -> dict[str, float]:
        values = step(*arguments)
        measured.calls += 1
        if measured.calls % every == 0:
            memory.append(round(process.memory_info().rss / 1e6, 1))
            files.append(process.num_fds())
        return values

    measured.calls = 0
    training.train_step = measured
    run = train(Experiment.from_dict(experiment), runs_dir=runs_dir)
    return {"steps": run.step, "memory_mb": memory, "open_files": files}


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "train": job_train,
    "evaluate": job_evaluate,
    "extract": job_extract,
    "long": job_long,
}


def die_at(line: int, saving: bool) -> None:
    """Kills this process before the `line`-th line that it runs in the library, or in what it saves by; counts `die_at.lines`."""
    die_at.lines = 0

    def in_function(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            die_at.lines += 1
            if die_at.lines == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return in_function

    def called(frame: Any, event: str, _: Any) -> Any:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        own = path.name in TRACED and "stego_lib" in path.parts
        return in_function if own and (name in SAVING if saving else name not in ELSEWHERE) else None

    sys.settrace(called)


def quicken() -> None:
    """Makes this process save often, fit clusters once, take few samples and compute in one thread, as every job here does."""
    torch.set_num_threads(1)
    training.SAVE_EVERY, probes.RESTARTS, baselines.SAMPLES = SAVE_EVERY, 1, 500


def slow_down(pause: float) -> None:
    """Makes each step of training and each batch of the backbone last some seconds, so that one can come in between."""
    step, forward = training.train_step, Backbone.forward
    training.train_step = lambda *arguments: (time.sleep(pause), step(*arguments))[1]
    Backbone.forward = lambda *arguments: (time.sleep(pause), forward(*arguments))[1]


def child(job: dict[str, Any]) -> int:
    """Does the job; returns the exit status. What came of it, or the error, is in job["result"]."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    quicken()
    if "keep_every" in job:  # of a store as well, in which each batch of four images is then a chunk of its own
        extraction.CHECKPOINT_EVERY, extraction.usual_batch = job["keep_every"], lambda backbone: 4
    if limit := job.get("largest_file"):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if join := job.get("join"):
        os.environ |= {key: value.format(rank=job["result"].rpartition(".")[2]) for key, value in join.items()}
    if pause := job.get("slow"):
        slow_down(pause)
    if line := job.get("line"):
        die_at(line, bool(job.get("saving")))
    try:
        found = JOBS[job["what"]](**job)
    except BaseException as error:
        found, status = {"error": type(error).__name__, "message": str(error)}, 1
    else:
        status = 0
    sys.settrace(None)
    if line:
        found["lines"] = die_at.lines
    write_json(job["result"], found)
    return status


def serve() -> None:
    """Forks a child for each of job["copies"], says their process ids, waits, says their statuses; until the input ends."""
    for text in sys.stdin:
        job = json.loads(text)
        pids = []
        for copy in range(job.get("copies", 1)):
            if (pid := os.fork()) == 0:
                os._exit(child(job | {"result": f"{job['result']}.{copy}"}))
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


# ---------------------------------------------------------------------------------------------- outside


class Runner:
    """The parent of the processes that are killed."""

    def __init__(self, folder: Path):
        self.result = folder / "result.json"
        path = os.pathsep.join([str(Path(training.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def start(self, what: str, **job: Any) -> list[int]:
        """Sends a job; returns the process ids of its children."""
        for old in self.result.parent.glob(f"{self.result.name}.*"):
            old.unlink()
        self.process.stdin.write(json.dumps({"what": what, "result": str(self.result)} | job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def wait(self) -> list[int]:
        """Exit statuses of the children, -9 where killed."""
        return json.loads(self.process.stdout.readline())

    def answers_within(self, seconds: float) -> bool:
        """Whether all children have ended in that time."""
        return bool(select.select([self.process.stdout], [], [], seconds)[0])

    def results(self) -> list[dict[str, Any]]:
        """What the children found."""
        return [read_json(path) for path in sorted(self.result.parent.glob(f"{self.result.name}.*"))]

    def do(self, what: str, **job: Any) -> dict[str, Any]:
        """A job from beginning to end; AssertionError if it fails."""
        self.start(what, **job)
        statuses, (found,) = self.wait(), self.results()
        assert statuses == [0], found
        return found

    def close(self) -> None:
        """Ends the runner."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@contextmanager
def serving(folder: Path) -> Iterator[Runner]:
    """A runner for as long as the block lasts."""
    runner = Runner(folder)
    try:
        yield runner
    finally:
        runner.close()


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    """Returns as soon as `condition` is true; AssertionError if it never is."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it never came to that"
        time.sleep(0.005)


def runs_in(runs_dir: Path) -> list[Path]:
    """The run folders that can be found, which a kill must leave whole."""
    return [path.parent for path in runs_dir.glob("*/experiment.json")]


def refuse_half_files(runs_dir: Path) -> None:
    """AssertionError unless every run that can be found has a checkpoint that can be read, and a log that reaches it."""
    for folder in runs_in(runs_dir):
        step = read_checkpoint(folder)["step"]
        if step:
            lines = (folder / "log.csv").read_text().split("\n")[1 : step + 1]
            assert [line.split(",")[0] for line in lines] == [str(i) for i in range(step)], folder
        for path in (folder / "kept").glob("[0-9]*.pt"):
            torch.load(path, weights_only=True)


def same(run: Path, reference: Path) -> None:
    """AssertionError unless both runs have the same weights, optimizer state, shifts, log and scores, bit for bit."""
    for name in ("log.csv", "experiment.json", "classes.json", "correspondences.json"):
        assert (run / name).read_bytes() == (reference / name).read_bytes(), f"{run / name} differs"
    equal(read_checkpoint(run), read_checkpoint(reference), "checkpoint")
    kept, expected = (dict(load_run(folder).kept_weights()) for folder in (run, reference))
    equal(kept, expected, "kept")
    ours, theirs = (read_json(folder / "metrics.json") for folder in (run, reference))
    for key in ("scores", "matching", "confusion", "shifts", "step"):
        assert ours[key] == theirs[key], f"{key} differs in {run}"


def equal(a: Any, b: Any, where: str) -> None:
    """AssertionError that says where two nested values differ."""
    if isinstance(b, torch.Tensor):
        assert torch.equal(a, b), f"{where} differs"
    elif isinstance(b, dict):
        assert a.keys() == b.keys(), f"{where}: other keys"
        for key in b:
            equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(b, list):
        assert len(a) == len(b), f"{where}: another length"
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            equal(x, y, f"{where}.{i}")
    else:
        assert a == b, f"{where}: {a!r} is not {b!r}"


def survive(runner: Runner, experiment: Experiment, folder: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kills runs of `experiment` until `kills` kills have hit, and compares each finished run with one that nobody touched.

    In turn: at a line of the library drawn at random, at a line of the code that writes files, and from outside at a
    random time. Returns the counts. AssertionError where anything is lost or differs.
    """
    draw, values = random.Random(seed), experiment.to_dict()
    reference = runner.do("train", experiment=values, runs_dir=str(folder / "reference"), keep_every=0.0)["folder"]
    seconds = 1.0  # that a run takes; put right when one was faster than its killer
    lines = {
        saving: runner.do(
            "train",
            experiment=values,
            runs_dir=str(folder / f"counted{saving}"),
            keep_every=0.0,
            line=10**9,
            saving=saving,
        )["lines"]
        for saving in (False, True)
    }
    for counted in (False, True):
        same(runs_in(folder / f"counted{counted}")[0], Path(reference))
    hits = {"at a line of the library": 0, "while writing files": 0, "from outside": 0}
    rounds, half_written = 0, set()
    while sum(hits.values()) < kills:
        rounds += 1
        runs_dir = folder / f"round{rounds}"
        finished = False
        while not finished:
            way = list(hits)[draw.randrange(3)]
            job: dict[str, Any] = {"experiment": values, "runs_dir": str(runs_dir), "keep_every": 0.0}
            if way != "from outside":
                saving = way == "while writing files"
                job |= {"line": draw.randint(1, int(REACH * lines[saving])), "saving": saving}
            (pid,), began = runner.start("train", **job), time.perf_counter()
            if way == "from outside" and not runner.answers_within(draw.uniform(0, seconds)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            (status,) = runner.wait()
            hits[way] += status == -signal.SIGKILL
            finished = status == 0
            if finished and way == "from outside":
                seconds = time.perf_counter() - began
            elif way == "from outside":
                seconds *= 1.1
            assert finished or status == -signal.SIGKILL, f"seed {seed}, round {rounds}: {runner.results()}"
            half_written |= set(runs_dir.rglob(f"{TEMPORARY}*"))
            refuse_half_files(runs_dir)
        done = [path for path in runs_in(runs_dir) if (path / "metrics.json").exists()]
        assert len(done) == 1, f"seed {seed}, round {rounds}: {done}"
        same(done[0], Path(reference))
        stores = [path for path in (runs_dir / "features").iterdir() if not path.name.startswith(".")]
        assert len(stores) == len(list((folder / "reference" / "features").glob("[!.]*"))), stores
        shutil.rmtree(runs_dir)
    return {
        "kills": sum(hits.values()),
        "ways": hits,
        "runs_compared": rounds,
        "half_written_files_left_by_kills": len(half_written),
    }


def flat(values: list[float], slack: float) -> bool:
    """Whether the values of the second half lie no more than `slack` above those of the first (less its first quarter)."""
    half = len(values) // 2
    return float(np.max(values[half:])) <= float(np.max(values[half // 2 : half])) + slack


if __name__ == "__main__":
    serve()
