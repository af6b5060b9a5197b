"""The committed reports of the long tests: they reach what they promise, and count every case that there is now."""

import math
import runpy

import pytest
from common import ROOT
from torture import REPORTS, SLACK_MB, TABLES, flat

from stego_lib.utils.files import read_json


@pytest.mark.parametrize(("what", "test"), TABLES.items())
def test_the_table_counts_every_case(what, test):
    """If this fails, cases came or went since: `make torture ARGS=tables`."""
    path, name = test.split("::")
    function = runpy.run_path(str(ROOT / path))[name]
    cases = math.prod(len(mark.args[1]) for mark in function.pytestmark if mark.name == "parametrize")
    assert read_json(REPORTS / "tables.json")[what] == cases


def test_killed_runs_and_the_long_one_reach_what_they_promise():
    kills, long = read_json(REPORTS / "kills.json"), read_json(REPORTS / "long.json")
    assert kills["kills"] >= 200 and sum(kills["ways"].values()) == kills["kills"] and kills["runs_compared"] > 0
    assert long["steps"] == 5000 and flat(long["memory_mb"], SLACK_MB) and flat(long["open_files"], 0)
