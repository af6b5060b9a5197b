"""The long tests, whose results are kept: `make torture` writes kills.json, tables.json and long.json to tests/reports.

Kills runs of training at random moments, tries every bad input and every attack of the tables, and trains 5,000 steps while
memory and open files are watched.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from common import ROOT, tiny_experiment, write_backbone
from killing import flat, serving, survive

from stego_lib import Experiment
from stego_lib.datasets.scenes import draw_scenes
from stego_lib.utils.environment import environment
from stego_lib.utils.files import write_json

REPORTS = ROOT / "tests" / "reports"
TABLES = {
    "bad inputs, each refused with one clear error": "tests/robustness/test_bad_input.py::test_bad_input_is_one_clear_error",
    "parameters out of range, each refused": "tests/method/test_experiment.py::test_a_wrong_value_is_an_error_that_names_its_key",
    "odd and valid inputs, each of which works": "tests/robustness/test_bad_input.py::test_odd_input_works",
    "attacks refused": "tests/robustness/test_hostile.py::test_an_attack_is_refused",
    "damaged feature stores noticed": "tests/features/test_stores.py::test_a_damaged_store_is_noticed_and_computed_anew",
}
"""What is counted -> the test whose cases are counted."""
SLACK_MB = 8
"""By which memory may grow from the second quarter of the steps to the second half."""


class Counter:
    """A pytest plugin that counts the cases of a test."""

    def __init__(self) -> None:
        self.passed = self.failed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Counts a case when it has run; one that broke off before counts as failed."""
        self.passed += report.when == "call" and report.passed
        self.failed += report.failed


def cases(test: str) -> dict[str, int]:
    """Runs every case of a test."""
    counter = Counter()
    pytest.main([test, "-q", "--no-header", "-p", "no:cacheprovider", "--durations=0"], plugins=[counter])
    return {"passed": counter.passed, "failed": counter.failed}


@contextmanager
def prepared() -> Iterator[tuple[Path, Experiment]]:
    """A folder that is gone afterwards, and a tiny experiment on a few scenes in it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        draw_scenes(folder / "data" / "scenes", train=12, val=6, size=64)
        yield folder, tiny_experiment(folder / "data", write_backbone(folder / "tiny.safetensors"))


def kills(count: int = 200, seed: int = 0) -> dict[str, Any]:
    """Kills runs, see `killing.survive`; it raises AssertionError where anything is lost."""
    with prepared() as (folder, experiment), serving(folder) as runner:
        experiment = experiment.but(steps=10, probes="after", validate_every=4)
        return survive(runner, experiment, folder, count, seed) | {"seed": seed, "steps_a_run": experiment.steps}


def tables() -> dict[str, Any]:
    """Tries every case of the tables; AssertionError unless all pass."""
    found = {what: cases(str(ROOT / test)) for what, test in TABLES.items()}
    assert all(each["passed"] and not each["failed"] for each in found.values()), found
    return {what: each["passed"] for what, each in found.items()}


def long(steps: int = 5000) -> dict[str, Any]:
    """Trains for many steps; AssertionError if memory or the number of open files grows."""
    with prepared() as (folder, experiment), serving(folder) as runner:
        values = experiment.but(steps=steps).to_dict()
        found = runner.do("long", experiment=values, runs_dir=str(folder / "runs"), every=steps // 20)
    assert flat(found["memory_mb"], SLACK_MB) and flat(found["open_files"], 0), found
    return found


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"kills": kills, "tables": tables, "long": long}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"which of {', '.join(PARTS)}; all if none is named")
    asked = parser.parse_args().parts or list(PARTS)
    if unknown := set(asked) - set(PARTS):
        parser.error(f"unknown: {', '.join(unknown)}")
    for name in asked:
        began = time.monotonic()
        found = PARTS[name]()
        minutes = round((time.monotonic() - began) / 60, 1)
        report = {"written by": f"make torture ARGS={name}", **found, "minutes": minutes, "environment": environment()}
        write_json(REPORTS / f"{name}.json", report)
        print(f"{name}: {found}\nwritten: {REPORTS / name}.json", flush=True)


if __name__ == "__main__":
    main()
