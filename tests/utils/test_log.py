"""log.csv, line by line."""

import pytest

from stego_lib import StegoError
from stego_lib.utils.log import TrainingLog

COLUMNS = ["loss", "loss_self"]


def written(path, steps: range, first: int = 0) -> list[str]:
    with TrainingLog(path, first, COLUMNS) as log:
        for step in steps:
            log.add(step, {"loss_self": step / 3, "loss": step})
        log.sync()
        return path.read_text().splitlines()


def test_lines_before_the_first_step_stay_and_later_ones_go(tmp_path):
    whole = written(tmp_path / "whole.csv", range(6))
    assert whole[0] == "step,loss,loss_self" and [line.split(",")[0] for line in whole[1:]] == list("012345")
    written(tmp_path / "log.csv", range(5))
    assert written(tmp_path / "log.csv", range(3, 6), first=3) == whole
    assert written(tmp_path / "log.csv", range(0)) == whole[:1]


@pytest.mark.parametrize("content", ["step,loss\n0,1\n2,1\n", "step,loss\n0,1\n", "loss\n1\n1\n", None])
def test_a_log_without_the_steps_before_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "log.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(StegoError, match=r"log\.csv"):
        TrainingLog(path, 2, COLUMNS)
    assert content is None or path.read_text() == content
