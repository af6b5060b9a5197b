"""Files that are whole or not there, and fingerprints that tell things apart."""

import errno
import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from filelock import FileLock, Timeout

from stego_lib import StegoError
from stego_lib.utils import files
from stego_lib.utils.files import (
    atomic,
    disk_errors,
    fingerprint,
    load_state,
    locked,
    read_json,
    remove_temporary,
    save_state,
    write_json,
)


def test_a_write_that_breaks_off_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic(path) as temporary:
        temporary.write_text("half of the new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_the_file_in_one_step_and_makes_its_folder(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    for text in ("first", "second"):
        with atomic(path) as temporary:
            temporary.write_text(text)
            assert temporary.parent == path.parent, "on the same disk, else it could not be moved in one step"
        assert path.read_text() == text and list(path.parent.iterdir()) == [path]


def test_a_name_as_long_as_the_system_allows_can_be_written(tmp_path):
    """The temporary one beside it must not be longer."""
    path = tmp_path / f"{'n' * 250}.json"
    write_json(path, 1)
    assert read_json(path) == 1 and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_write_leaves_is_swept_up_and_nothing_else(tmp_path, monkeypatch):
    for name in ("a.txt", "unfinished.txt", ".hidden"):
        (tmp_path / name).write_text("good")
    with monkeypatch.context() as killed:
        killed.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "a.txt"):
            raise KeyboardInterrupt
    assert len(list(tmp_path.iterdir())) == 4
    remove_temporary(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "a.txt", "unfinished.txt"]


def test_writing_leaves_no_file_open_and_the_mask_of_permissions_as_it_is(tmp_path):
    before, mask = psutil.Process().num_fds(), os.umask(0o022)
    try:
        for number in range(20):
            write_json(tmp_path / "a.json", number)
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(mask)
    assert psutil.Process().num_fds() == before


def test_a_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    """Else a power cut could leave the new name without its content."""
    done, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(f"sync {os.fstat(handle).st_size}"), fsync(handle)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (done.append("replace"), replace(path, to)))
    with atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("12345")
    assert done == ["sync 5", "replace"]


def test_a_written_file_can_be_read_by_whom_the_system_lets(tmp_path):
    """Temporary files are made for their owner alone."""
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640


def test_json_there_and_back(tmp_path):
    value = {"a": [1, 2.5, None], "ü": "ä"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value == json.loads((tmp_path / "a.json").read_text())


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_json_lacks_is_refused_and_the_old_file_stays(tmp_path, number):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", [number])
    assert read_json(tmp_path / "a.json") == 1


def test_state_there_and_back(tmp_path):
    state = {"step": 3, "model": {"w": torch.arange(4.0)}, "list": [1.5, "text"]}
    save_state(tmp_path / "a.pt", state)
    found = load_state(tmp_path / "a.pt")
    assert (
        found["step"] == 3 and torch.equal(found["model"]["w"], state["model"]["w"]) and found["list"] == state["list"]
    )


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(2), 3], ids=str)
def test_a_state_that_is_no_dictionary_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(StegoError, match=r"a\.pt cannot be read as a checkpoint.*no dictionary"):
        load_state(tmp_path / "a.pt")


def test_a_state_that_is_not_there_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "nowhere.pt")


def test_fingerprints_tell_things_apart_and_repeat():
    parts = [
        (1,), (2,), (1.0,), ("1",), (b"1",), (1, 2), ((1, 2),), ([1], 2), ("ab", "c"), ("a", "bc"), (True,), (None,), (b"ab", b"c"), (b"a", b"bc"),
        (torch.zeros(2),), (torch.zeros(3),), (torch.zeros(2, 1),), (torch.zeros(2, dtype=torch.int32),), (torch.ones(2),), (torch.zeros(2).bfloat16(),),
    ]  # fmt: skip
    marks = [fingerprint(*part) for part in parts]
    assert len(set(marks)) == len(marks)
    assert marks == [fingerprint(*part) for part in parts] and all(
        len(mark) == 16 and set(mark) <= set("0123456789abcdef") for mark in marks
    )
    assert fingerprint([1, "a"]) == fingerprint((1, "a")), "JSON turns tuples into lists"


def test_a_tensors_fingerprint_is_that_of_its_values():
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 4)))
    assert fingerprint(values) == fingerprint(values.T.contiguous().T) == fingerprint(values.clone().requires_grad_())


def test_what_no_user_can_mend_stays_as_it_is(tmp_path):
    """A fault of the disk itself, say."""
    with pytest.raises(OSError) as caught, disk_errors(tmp_path):
        raise OSError(errno.EIO, "Input/output error")
    assert caught.value.errno == errno.EIO and not isinstance(caught.value, StegoError)


NO_ROOM = ("ENOSPC", "EDQUOT", "EFBIG")
"""A full disk, a full quota, a file that may not grow."""
NO_ENTRY = ("EACCES", "EPERM", "EROFS", "ENOTDIR", "EEXIST", "ELOOP")
"""No permission (two kinds), a disk to read only, a file where a folder should be (two kinds), links in a circle."""


@pytest.mark.parametrize("name", NO_ROOM + NO_ENTRY)
def test_what_the_disk_refuses_is_an_error_that_names_the_path(tmp_path, name):
    number = getattr(errno, name)
    expected = "the disk is full or a limit is reached" if name in NO_ROOM else "name a folder that can"
    with pytest.raises(StegoError, match=expected) as caught, disk_errors(tmp_path / "asked"):
        raise OSError(number, "as the system says it")
    assert str(tmp_path / "asked") in str(caught.value) and "as the system says it" in str(caught.value)


def test_a_lock_is_waited_for_or_refused_as_asked(tmp_path, monkeypatch):
    path, said = tmp_path / ".lock", []
    other = FileLock(path)
    other.acquire()
    monkeypatch.setattr(files, "notice", lambda text: (said.append(text), other.release()))
    with pytest.raises(StegoError, match="in use"), locked(path, "in use", wait=False):
        pytest.fail("two hold it")
    assert not said
    with locked(path, "in use", wait=True):
        assert said == ["in use"]
        with pytest.raises(Timeout):
            FileLock(path).acquire(timeout=0)
    FileLock(path).acquire(timeout=0)
