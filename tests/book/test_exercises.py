"""The check of the exercises, and its use in the chapters."""

import re

import nbformat
import pytest
from common import ROOT

from stego_book.exercises import check


@pytest.mark.parametrize(
    "answer, solution, verdict",
    [
        (0.5, 0.52, "Correct"), (0.4, 0.52, "small"), (-0.4, -0.52, "large"), (float("nan"), 0.52, "number"),
        (None, 0.52, "Replace"), (0.5, None, "no solution"), (0.5, float("nan"), "no solution"),
    ],
)  # fmt: skip
def test_an_answer_is_judged_without_giving_the_solution_away(answer, solution, verdict, capsys):
    check(answer, solution, within=0.03)
    printed = capsys.readouterr().out
    assert verdict in printed and "0.52" not in printed


def test_no_chapter_is_stored_with_an_answer():
    sources = [cell.source for path in (ROOT / "notebooks").glob("*.ipynb") for cell in nbformat.read(path, 4).cells]
    answers = [answer for source in sources for answer in re.findall(r"^check\(([^,]+),", source, re.MULTILINE)]
    assert set(answers) == {"None"} and len(answers) >= 10
