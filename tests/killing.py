"""Trains in processes of their own, which are killed, interrupted or started together."""

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from stego_lib.utils.files import read_json

# Forks children from a server that has imported torch once.
CONTEXT = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
CONTEXT.set_forkserver_preload(["stego_lib.training", "stego_lib.evaluation"])
SAVE_EVERY = 3


def train_and_score(experiment: dict[str, Any], runs_dir: str, result: str, options: dict[str, Any]) -> None:
    """In the child: trains or resumes, evaluates, and writes the folder and the record, or the error, to `result`.

    options: "environ"; "slow", seconds that a step takes; "largest_file", bytes; "baselines"; "resume"; "run", a run to
    evaluate instead; "meeting", seconds that processes wait for each other.
    """
    os.environ |= options.get("environ", {})
    import torch

    from stego_lib import Experiment, evaluate, load_run, probes, train, training
    from stego_lib.utils import devices

    torch.set_num_threads(1)
    training.SAVE_EVERY, probes.RESTARTS = SAVE_EVERY, 1
    devices.JOIN_TIMEOUT = timedelta(seconds=options.get("meeting", 600))
    if limit := options.get("largest_file"):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    step = training.train_step
    training.train_step = lambda *args: (time.sleep(options.get("slow", 0)), step(*args))[1]
    try:
        if options.get("run"):
            run = load_run(options["run"])
        else:
            run = train(Experiment.from_dict(experiment), runs_dir=runs_dir, resume=options.get("resume", True))
        outcome = {"folder": str(run.folder), "record": evaluate(run, baselines=options.get("baselines", False))}
    except BaseException as error:
        outcome = {"error": type(error).__name__, "message": str(error)}
    Path(result).write_text(json.dumps(outcome))


class Job:
    """One such process."""

    def __init__(self, experiment: Any, runs_dir: Path, **options: Any):
        runs_dir.mkdir(parents=True, exist_ok=True)
        self.result = runs_dir / f".result-{time.monotonic_ns()}.json"
        arguments = (experiment.to_dict(), str(runs_dir), str(self.result), options)
        self.process = CONTEXT.Process(target=train_and_score, args=arguments)
        self.process.start()

    def outcome(self) -> dict[str, Any]:
        """Waits for the process; what it has written, empty if it was killed."""
        self.process.join()
        return read_json(self.result) if self.result.exists() else {}

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.join()


def launched(count: int, slurm: bool = False) -> list[dict[str, str]]:
    """Variables that torchrun or srun gives to each of several processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    if slurm:
        shared = {"MASTER_PORT": port, "SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_NUM_NODES": "1"}
        ranks = ("SLURM_PROCID", "SLURM_LOCALID")
    else:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "1"}
        shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        ranks = ("RANK", "LOCAL_RANK")
    return [shared | dict.fromkeys(ranks, str(rank)) for rank in range(count)]


def in_two(experiment: Any, runs_dir: Path, others: Any = None, slurm: bool = False, **options: Any) -> list[dict]:
    """Outcomes of two processes as torchrun or srun starts them.

    others: what is different for the second process, an experiment or the options of `train_and_score`.
    """
    second = (experiment, options | others) if isinstance(others, dict) else (others or experiment, options)
    jobs = [
        Job(wanted, runs_dir, environ=environ, **own)
        for environ, (wanted, own) in zip(launched(2, slurm), ((experiment, options), second), strict=True)
    ]
    return [job.outcome() for job in jobs]


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """The value of `condition` as soon as it is true; AssertionError if it never is."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"nothing came in {seconds} s"
        time.sleep(0.01)
    return value


def runs_in(runs_dir: Path) -> list[Path]:
    """The run folders that can be found."""
    return [path.parent for path in runs_dir.glob("*/experiment.json")]


def same(run: Path, reference: Path) -> None:
    """AssertionError unless both runs have the same weights, optimizer state, shifts, log and scores, bit for bit."""
    names = ["log.csv", "experiment.json", "classes.json", "correspondences.json", "checkpoint.safetensors"]
    names += [str(path.relative_to(reference)) for path in reference.glob("kept/*")]
    for name in names:
        assert (run / name).read_bytes() == (reference / name).read_bytes(), f"{run / name} differs"
    ours, theirs = (read_json(folder / "metrics.json") for folder in (run, reference))
    for key in ("scores", "matching", "confusion", "shifts", "step"):
        assert ours[key] == theirs[key], f"{key} differs in {run}"
