"""Rows of arrays on disk, against NumPy's own file."""

import os
import zlib

import numpy as np
import pytest

from stego_lib import StegoError
from stego_lib.features.arrays import ArrayFile, crc, create


@pytest.fixture
def path(tmp_path):
    create(tmp_path / "rows.npy", np.float16, (6, 3, 2))
    return tmp_path / "rows.npy"


def test_rows_written_by_number_are_those_that_numpy_reads(path):
    expected, values = np.zeros((6, 3, 2), np.float16), np.random.default_rng(0).normal(size=(3, 3, 2))
    assert np.array_equal(np.load(path), expected)
    ArrayFile(path, write=True).write([4, 0, 2], values)
    expected[[4, 0, 2]] = values
    assert np.array_equal(np.load(path), expected)
    opened = ArrayFile(path)
    assert (opened.shape, opened.dtype) == ((6, 3, 2), np.float16)
    assert np.array_equal(opened.read(iter([5, 4, 4, 0])), expected[[5, 4, 4, 0]])
    assert opened.read([]).shape == (0, 3, 2)


@pytest.mark.parametrize("row", [-1, 6])
def test_a_row_that_is_not_there_is_an_error(path, row):
    with pytest.raises(IndexError, match=rf"rows\.npy has 6 rows, no row {row}"):
        ArrayFile(path).read([0, row])


def test_a_file_that_becomes_shorter_while_it_is_open_is_noticed(path):
    opened = ArrayFile(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert opened.read([4]).shape == (1, 3, 2)
    with pytest.raises(StegoError, match=r"rows\.npy was cut short while it was in use; start again"):
        opened.read([5])


def test_the_room_of_a_new_file_is_taken_at_once(tmp_path):
    """So that a disk which is too small says so before hours of work; a file of holes would not."""
    create(tmp_path / "large.npy", np.float32, (1000, 1000))
    assert (tmp_path / "large.npy").stat().st_blocks * 512 >= 4_000_000


def test_the_checksum_of_pieces_is_that_of_the_whole():
    values = np.arange(60, dtype=np.int32).reshape(5, 12)
    assert crc(values[3:], crc(values[:3])) == crc(values) == zlib.crc32(values.tobytes())
    assert crc(values.T) == zlib.crc32(values.T.copy().tobytes()) != crc(values)


def test_rows_are_on_the_disk_before_it_is_said_so(path, monkeypatch):
    """A chunk is recorded after its rows; a power cut in between must not leave the record alone."""
    opened, seen = ArrayFile(path, write=True), []
    opened.write([1], np.ones((1, 3, 2)))
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append((os.fstat(handle).st_ino, np.load(path)[1].sum())))
    opened.sync()
    assert seen == [(path.stat().st_ino, 6)]
