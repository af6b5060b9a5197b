"""Files that are complete or absent, fingerprints that tell things apart, errors of disk and memory."""

import errno
import json
import math
import os
import stat

import numpy as np
import pytest
import torch

from stego_lib import StegoError
from stego_lib.utils import files
from stego_lib.utils.errors import enough_memory
from stego_lib.utils.log import TrainingLog


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.atomic(path) as temporary:
        temporary.write_text("half of the new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_the_file_and_makes_its_folder(tmp_path):
    path = tmp_path / "new" / "folder" / f"{'n' * 250}.txt"
    for text in ("first", "second"):
        with files.atomic(path) as temporary:
            temporary.write_text(text)
            assert temporary.parent == path.parent, "on the same disk"
        assert path.read_text() == text and list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="needs fcntl")
def test_files_are_synced_through_handles_that_windows_accepts(tmp_path, monkeypatch):
    import fcntl

    modes = []
    monkeypatch.setattr(os, "fsync", lambda file: modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE))
    files.write_json(tmp_path / "a.json", 1)
    with TrainingLog(tmp_path / "log.csv", 0, ["loss"]) as log:
        log.sync()
    assert len(modes) == 3 and os.O_RDONLY not in modes


def test_a_write_that_is_lost_when_it_is_synced_is_an_error(tmp_path, monkeypatch):
    """As on network disks with a quota."""

    def full(_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StegoError, match="quota"):
        files.write_json(tmp_path / "a.json", 1)
    assert not list(tmp_path.iterdir())


def test_a_file_has_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_json(tmp_path / "a.json", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640


def test_what_a_killed_write_leaves_is_removed(tmp_path):
    for name in (f"{files.TEMPORARY}a.12.txt", "a.txt", "unfinished.txt", ".hidden"):
        (tmp_path / name).write_text("text")
    files.remove_temporary(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "a.txt", "unfinished.txt"]


def test_json(tmp_path):
    value = {"a": [1, 2.5, None], "ü": "ä"}
    files.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert files.read_json(tmp_path / "a.json") == value == json.loads(text)
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", [math.nan])
    assert files.read_json(tmp_path / "a.json") == value
    assert files.without_nan({"a": [math.nan, 1.0]}) == {"a": [None, 1.0]}
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(StegoError, match="JSON"):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(StegoError, match="does not exist"):
        files.read_json(tmp_path / "none.json")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
def test_text_is_utf_8_with_or_without_a_mark(tmp_path, encoding):
    (tmp_path / "a.txt").write_text("Straße", encoding=encoding)
    if encoding.startswith("utf-8"):
        assert files.read_text(tmp_path / "a.txt") == "Straße"
    else:
        with pytest.raises(StegoError, match="UTF-8"):
            files.read_text(tmp_path / "a.txt")


def test_fingerprints_tell_things_apart_and_repeat():
    zeros = torch.zeros(2)
    values = [
        1, 2, 1.0, "1", b"1", (1, 2), ([1], 2), ("ab", "c"), ("a", "bc"), True, None, (b"ab", b"c"), (b"a", b"bc"),
        zeros, torch.zeros(3), torch.zeros(2, 1), zeros.int(), torch.ones(2), zeros.bfloat16(),
    ]  # fmt: skip
    marks = [files.fingerprint(value) for value in values]
    assert len(set(marks)) == len(marks) and marks == [files.fingerprint(value) for value in values]
    assert files.fingerprint([1, "a"]) == files.fingerprint((1, "a")), "JSON turns tuples into lists"
    matrix = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 4)))
    assert files.fingerprint(matrix) == files.fingerprint(matrix.T.contiguous().T)


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EROFS", "ENOTDIR", "ENAMETOOLONG", "EIO"])
def test_errors_of_the_disk_name_the_path(tmp_path, name):
    with pytest.raises(StegoError, match="other"), files.disk_errors(tmp_path / "other"):
        raise OSError(getattr(errno, name), "reason")


def test_a_name_that_is_taken_or_too_long_is_an_error_with_the_path(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("folder", "file/a.json", f"{'n' * 251}.json"):
        with pytest.raises(StegoError, match=name.split("/")[0]):
            files.write_json(tmp_path / name, 1)
    with pytest.raises(StegoError, match="file"):
        files.check_folder(tmp_path / "file" / "runs")
    files.check_folder(tmp_path / "new" / "runs")
    assert not list((tmp_path / "new" / "runs").iterdir()) and not list(tmp_path.glob(f"{files.TEMPORARY}*"))


def test_errors_that_are_not_of_the_disk_stay(tmp_path):
    with pytest.raises(OSError, match="encoder") as caught, files.disk_errors(tmp_path):
        raise OSError("encoder error")
    assert not isinstance(caught.value, StegoError)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), None], ids=["GPU", "CPU"])
def test_a_lack_of_memory_is_an_error_with_a_remedy(error):
    with pytest.raises(StegoError, match="batch_size"), enough_memory("a step", "Lower batch_size."):
        if error:
            raise error
        torch.empty(2**55)
    with pytest.raises(RuntimeError, match="sizes do not match"), enough_memory("a step", "-"):
        raise RuntimeError("sizes do not match")


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
    with open(tmp_path / "log.csv", "a") as file:
        file.write("5,0.")
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
