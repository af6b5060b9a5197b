"""Rows of arrays on disk, against NumPy's own file."""

import os
import sys

import numpy as np
import psutil
import pytest
from common import write_backbone

from stego_lib import StegoError, open_dataset
from stego_lib.backbone import Backbone
from stego_lib.features import extraction
from stego_lib.features.arrays import create, read_rows, write_rows
from stego_lib.features.opening import open_store


@pytest.fixture
def path(tmp_path):
    create(tmp_path / "rows.npy", np.float16, (6, 3, 2))
    return tmp_path / "rows.npy"


def test_rows_written_by_number_are_those_that_numpy_reads(path):
    expected, values = np.zeros((6, 3, 2), np.float16), np.random.default_rng(0).normal(size=(3, 3, 2))
    assert np.array_equal(np.load(path), expected)
    write_rows(path, 2, values.astype(np.float16))
    expected[2:5] = values
    assert np.array_equal(np.load(path), expected)
    assert np.array_equal(read_rows(path, [5, 4, 4, 0]), expected[[5, 4, 4, 0]])
    assert np.array_equal(read_rows(path, range(1, 4)), expected[1:4])
    assert read_rows(path, []).shape == (0, 3, 2)
    for part in (slice(None), slice(1, 4), slice(4, 99), slice(3, 3), slice(0, 6, 2), slice(-2, None)):
        assert np.array_equal(read_rows(path, part), expected[part]), part
    assert np.array_equal(read_rows(path, [-1]), expected[[-1]])
    np.save(path, np.arange(10.0))
    assert read_rows(path, [3, 4]).tolist() == [3, 4] and read_rows(path, slice(8, None)).tolist() == [8, 9]


def test_a_row_that_is_not_there_is_an_error(path):
    with pytest.raises(IndexError):
        read_rows(path, [0, 6])


@pytest.mark.parametrize(
    "change", [lambda path: path.write_bytes(path.read_bytes()[:-1]), os.unlink], ids=["cut", "removed"]
)
def test_a_file_that_changes_while_it_is_in_use_is_noticed(path, change):
    assert read_rows(path, [4]).shape == (1, 3, 2)
    change(path)
    with pytest.raises(StegoError, match=r"rows\.npy was changed while it was in use .*; start again"):
        read_rows(path, [4])


def test_the_space_of_a_new_file_is_taken_at_once(tmp_path):
    """So that a disk which is too small says so before hours of work; a file of holes would not."""
    create(tmp_path / "large.npy", np.float32, (1000, 1000))
    assert (tmp_path / "large.npy").stat().st_blocks * 512 >= 4_000_000


def test_rows_that_were_read_do_not_count_as_memory_of_the_process(tmp_path):
    """Pages of a map that stays open would: 200 MB here."""
    create(tmp_path / "large.npy", np.float32, (200, 250_000))
    process = psutil.Process()
    before = process.memory_info().rss
    for row in range(200):
        assert not read_rows(tmp_path / "large.npy", [row]).any()
    assert process.memory_info().rss - before < 50e6


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_rows_are_on_the_disk_before_a_record_says_so(scenes_root, tmp_path, monkeypatch):
    """A power cut in between must not leave the record alone."""
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(extraction, "CHECKPOINT_EVERY", 0.0)
    network = Backbone(str(write_backbone(tmp_path / "vit.safetensors")), device="cpu", precision="float32")
    open_store(open_dataset("scenes", scenes_root, "val"), network, 64, tmp_path / "stores", batch=4)
    names = [path.rpartition("/")[2] for path in synced if ".part/" in path and "about" not in path]
    assert len(names) == 10, "two batches: 4 arrays and a record each"
    for chunk in (names[:5], names[5:]):
        assert sorted(chunk[:4]) == ["features.npy", "images.npy", "labels.npy", "pooled.npy"] and "000000" in chunk[4]
