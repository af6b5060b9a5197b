"""log.csv, line by line."""

import os

import pytest

from stego_lib import StegoError
from stego_lib.utils.log import TrainingLog

COLUMNS = ["loss", "loss_self", "code_self"]


def values(step: int) -> dict[str, float]:
    return {name: step + i / 10 for i, name in enumerate(COLUMNS)}


def written(path, steps: range, first: int = 0) -> list[str]:
    with TrainingLog(path, first, COLUMNS) as log:
        for step in steps:
            log.add(step, values(step))
    return path.read_text().splitlines()


def test_lines_before_the_first_step_stay_and_later_ones_go(tmp_path):
    whole = written(tmp_path / "whole.csv", range(6))
    assert [line.split(",")[0] for line in whole] == ["step", *map(str, range(6))]
    written(tmp_path / "log.csv", range(5))
    assert written(tmp_path / "log.csv", range(3, 6), first=3) == whole
    assert written(tmp_path / "log.csv", range(0)) == whole[:1], "a run that begins anew"


def test_columns_are_in_the_order_that_is_asked_for(tmp_path):
    with TrainingLog(tmp_path / "log.csv", 0, [*COLUMNS, "loss_crf"]) as log:
        log.add(0, {"loss_crf": 7.5} | values(0))
    head, line = (tmp_path / "log.csv").read_text().splitlines()
    assert head.split(",") == ["step", *COLUMNS, "loss_crf"] and line.endswith(",7.5")


def test_lines_are_on_the_disk_before_it_is_said_so(tmp_path, monkeypatch):
    """A checkpoint counts them; neither a kill nor a power cut may take them afterwards."""
    seen = []
    with TrainingLog(tmp_path / "log.csv", 0, COLUMNS) as log:
        log.add(0, values(0))
        monkeypatch.setattr(os, "fsync", lambda handle: seen.append((tmp_path / "log.csv").read_text()))
        log.sync()
    assert seen == [(tmp_path / "log.csv").read_text()] and len(seen[0].splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"step,loss\r\n0,1\r\n2,1\r\n", r"lacks lines of the 2 steps"),
        (b"step,loss\r\n0,1\r\n", r"lacks lines of the 2 steps"),
        (b"loss\r\n1\r\n1\r\n", r"cannot be read \(KeyError"),
        (b"step,loss\r\n0,\xff\xfe\r\n1,1\r\n", r"cannot be read \(UnicodeDecodeError"),
        (None, r"cannot be read \(FileNotFoundError"),
    ],
)
def test_a_log_that_cannot_be_gone_on_with_is_refused_and_stays(tmp_path, content, said):
    if content is not None:
        (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(StegoError, match=rf"log\.csv {said}.*train without resume"):
        TrainingLog(tmp_path / "log.csv", 2, COLUMNS)
    assert content is None or (tmp_path / "log.csv").read_bytes() == content
