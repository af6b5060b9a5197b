"""The page on fidelity has all fourteen lines, and every test that it names exists."""

import ast
import re

import pytest
from common import ROOT

from stego_lib import Experiment

PAGE = (ROOT / "book" / "fidelity.md").read_text()
ROWS = {int(found[1]): found[0] for found in re.finditer(r"^\| (\d+) \|.*$", PAGE, re.MULTILINE)}
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)))


def test_every_line_is_there_and_names_a_test():
    assert list(ROWS) == list(range(1, 15))
    for number, row in ROWS.items():
        assert "`tests/" in row.rsplit("|", 2)[1], number
        assert row.count("|") == 7 and all(cell.strip() for cell in row.split("|")[1:-1]), number


@pytest.mark.parametrize("file, name", NAMED, ids=map("::".join, NAMED))
def test_a_named_test_exists(file, name):
    tree = ast.parse((ROOT / file).read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert name in functions if name else any(function.startswith("test_") for function in functions)


def test_the_named_parameters_exist():
    named = set(re.findall(r"`(\w+_weight|published|keys|mirror|start_from|keep_every)\b", PAGE))
    known = Experiment().to_dict()
    assert {"rec_weight", "crf_weight", "aug_alignment_weight", "keys"} <= named <= {*known, *known["official"]}
