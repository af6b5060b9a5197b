"""One experiment with several seeds."""

from pathlib import Path
from typing import Any

from stego_lib.backbone import Backbone, fit_sizes
from stego_lib.batches import fit_to_data
from stego_lib.datasets import open_training_set
from stego_lib.evaluation import evaluate
from stego_lib.experiment import MACHINE, Experiment
from stego_lib.run import data_ids, find_run
from stego_lib.training import train
from stego_lib.utils.errors import StegoError
from stego_lib.utils.files import write_json
from stego_lib.utils.paths import runs_root, user_path

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
        record = finished_record(one, runs_dir, split) if resume else None
        if record is None:
            run = train(one, runs_dir=runs_dir, resume=resume)
            record = evaluate(run, split)
        write_json(user_path(records) / f"{one.name}.json", record)
        found.append(record)
    return found


def finished_record(
    experiment: Experiment, runs_dir: str | Path | None = None, split: str = "val"
) -> dict[str, Any] | None:
    """The run record on `split` of the newest run of exactly this experiment, or None if it is not trained and scored."""
    where = user_path(runs_dir, runs_root())
    dataset = open_training_set(experiment)
    backbone = Backbone.of(experiment)
    experiment = fit_sizes(fit_to_data(experiment, dataset), backbone.geometry, quiet=True)
    folder = find_run(where, experiment, backbone, data_ids(dataset, where), quiet=True)  # training shows the notices
    path = folder and folder / ("metrics.json" if split == "val" else f"metrics-{split}.json")
    if path is None or not path.exists():
        return None
    record = read_record(path)
    if not record["scores"]:
        return None
    theirs, ours = (
        {key: value for key, value in values.items() if key not in (*MACHINE, "backbone")}
        for values in (record["experiment"], experiment.to_record())
    )
    return record if (record["step"], record["split"], theirs) == (experiment.steps, split, ours) else None
