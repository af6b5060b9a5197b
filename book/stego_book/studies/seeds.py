"""One experiment with several seeds."""

from pathlib import Path
from typing import Any

from stego_lib.evaluation import evaluate
from stego_lib.experiment import Experiment
from stego_lib.provenance import Provenance
from stego_lib.run import Run
from stego_lib.training import train
from stego_lib.utils.errors import StegoError
from stego_lib.utils.files import fingerprint, write_json
from stego_lib.utils.paths import user_path

from .results import read_record


def whole_numbers(text: str | int, name: str = "seeds") -> list[int]:
    """Parses '0 1 2', '0, 1, 2' or 3. Raises StegoError with the parameter's `name` for other values."""
    words = str(text).replace(",", " ").split()
    if not words or not all(word.isdigit() for word in words) or len({int(word) for word in words}) < len(words):
        raise StegoError(f"{name}={text!r} is not a list of different whole numbers. Write '0 1 2'.")
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
    """Trains and scores `experiment` with each seed. Returns the run records and writes copies to `records`.

    With `resume`, finished and scored runs of the same experiment and provenance in `runs_dir` are skipped, and
    interrupted ones are resumed. The file names contain a digest of experiment, provenance, split and data, so that
    runs on other data or weights do not overwrite each other.
    """
    kept = []
    for seeded in [experiment.but(seed=seed) for seed in seeds]:  # an invalid seed raises before any work
        run = train(seeded, runs_dir=runs_dir, resume=resume)
        record = finished_record(run, split) if resume else None
        record = record or evaluate(run, split)
        origin = Provenance.from_dict(record["provenance"]).key()
        settings = repr(sorted(record["experiment"].items()))
        digest = fingerprint(settings, origin, record["split"], str(record.get("data")))
        write_json(user_path(records) / f"{seeded.name}-{digest[:8]}.json", record)
        kept.append(record)
    return kept


def finished_record(run: Run, split: str = "val") -> dict[str, Any] | None:
    """The run record of a finished run on `split`, or None if it was not scored with these settings."""
    path = run.folder / ("metrics.json" if split == "val" else f"metrics-{split}.json")
    if not path.exists():
        return None
    record = read_record(path)
    same = (record["step"], record["experiment"]) == (run.experiment.steps, run.experiment.to_record())
    return record if same and record["scores"] else None
