"""One experiment with several seeds."""

from pathlib import Path
from typing import Any

from stego_lib.evaluation import evaluate
from stego_lib.experiment import Experiment
from stego_lib.run import Run
from stego_lib.training import train
from stego_lib.utils.errors import StegoError
from stego_lib.utils.files import write_json
from stego_lib.utils.paths import user_path

from .results import read_record


def read_seeds(text: str | int) -> list[int]:
    """'0 1 2', '0, 1, 2' or 3 -> the seeds. Raises StegoError for anything else and for a seed that is named twice."""
    return whole_numbers(text, "seeds")


def whole_numbers(text: str | int, name: str) -> list[int]:
    """The same for any parameter that is a list of numbers; `name` is what an error calls it."""
    words = str(text).replace(",", " ").split()
    if not words or not all(word.isdigit() for word in words) or len({int(word) for word in words}) < len(words):
        raise StegoError(f"{name} = {text!r}: give whole numbers, each once, such as '0 1 2'")
    return [int(word) for word in words]


def run_seeds(
    experiment: Experiment,
    seeds: list[int],
    records: str | Path,
    *,
    split: str = "val",
    runs_dir: str | Path | None = None,
    resume: bool = False,
) -> list[dict[str, Any]]:
    """Trains `experiment` with each seed and scores it on `split`; returns the run records, a copy of each in `records`.

    The features are computed for the first seed and read back for the others. With `resume`, a seed whose newest run of
    an equal experiment below `runs_dir` is finished and scored is not run again, and an interrupted one is resumed.
    """
    found = []
    for one in [experiment.but(seed=seed) for seed in seeds]:  # an invalid seed raises before any work
        run = train(one, runs_dir=runs_dir, resume=resume)
        record = finished_record(run, split) if resume else None
        if record is None:
            record = evaluate(run, split)
        write_json(user_path(records) / f"{one.name}.json", record)
        found.append(record)
    return found


def finished_record(run: Run, split: str = "val") -> dict[str, Any] | None:
    """The run record of a finished run on `split`, or None if it is not scored with these settings."""
    path = run.folder / ("metrics.json" if split == "val" else f"metrics-{split}.json")
    if not path.exists():
        return None
    record = read_record(path)
    same = (record["step"], record["experiment"]) == (run.experiment.steps, run.experiment.to_record())
    return record if same and record["scores"] else None
