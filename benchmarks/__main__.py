"""Measures, prints a table, and writes benchmarks/results/MACHINE-DATE.json.

make bench                                    # every row: about half an hour on two cores
make bench ARGS="step evaluation"             # only these rows
make bench ARGS="--photos FOLDER evaluation"  # the CRF also on photographs
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .evaluation_rows import crf_engines, evaluation, predict
from .export_rows import exports
from .limits import limits
from .material import Settings
from .measuring import RESULTS, machine, save
from .scale_rows import memory, neighbors, raster, segment
from .training_rows import compact, extraction, pretraining, probes, recipe, rest, step

ROWS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    row.__name__: row
    for row in (
        limits,
        rest,
        step,
        extraction,
        compact,
        evaluation,
        crf_engines,
        predict,
        neighbors,
        probes,
        memory,
        raster,
        segment,
        exports,
        recipe,
        pretraining,
    )
}


def main(arguments: list[str] | None = None) -> Path:
    """The command line. Returns the file that was written."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"rows to measure (default: all): {', '.join(ROWS)}")
    parser.add_argument("--tiny", action="store_true", help="minimal sizes, to test that it runs")
    parser.add_argument("--repeats", type=int, default=5, help="maximal number of repetitions (5)")
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit for the repetitions of a row (60)")
    parser.add_argument("--threads", type=int, default=2, help="number of torch threads (2)")
    parser.add_argument("--photos", type=Path, help="folder of photographs for the CRF (default: synthetic scenes)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--scratch", type=Path, help="folder for up to 12 GB of temporary files (default: the system's)"
    )
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.rows if name not in ROWS]:
        parser.error(f"unknown rows {', '.join(unknown)}; rows: {', '.join(ROWS)}")
    torch.set_num_threads(given.threads)
    record: dict[str, Any] = {
        "machine": machine(),
        "settings": {key: getattr(given, key) for key in ("tiny", "repeats", "seconds", "threads", "seed")},
        "rows": {},
    }
    path = given.out
    for name in given.rows or ROWS:
        torch.manual_seed(given.seed)
        with tempfile.TemporaryDirectory(dir=given.scratch, prefix="stego-bench-") as folder:
            settings = Settings(Path(folder), given.tiny, given.repeats, given.seconds, given.photos, given.seed)
            what = (ROWS[name].__doc__ or "").splitlines()[0]
            record["rows"][name] = {"what": what, **ROWS[name](settings)}
        path = save(record, given.out)  # after each row, so that an interrupted run keeps its results
        show(name, record["rows"][name])
    print(f"\n{path}")
    return path


def show(name: str, row: dict[str, Any]) -> None:
    """Prints a row: description, seconds of each variant, and its speed-up over the first."""
    print(f"\n{name}: {row['what']}")
    for key, value in row.items():
        if key == "ways":
            _show_ways(value)
        elif key == "kinds":
            for kind, found in value.items():
                print(f"  {kind}")
                _show_ways(found["ways"])
        elif key != "what":
            print(f"  {key}: {_short(value)}")
    sys.stdout.flush()


def _show_ways(ways: dict[str, dict[str, float]]) -> None:
    first = next(iter(ways.values()))["median_s"]
    for name, way in ways.items():
        spread = f"{way['min_s']:.4f} to {way['max_s']:.4f}, n = {way['n']}"
        print(f"    {name:28} {way['median_s']:10.4f} s  {first / way['median_s']:7.2f} x  ({spread})")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
