"""`check`: the published numbers of images, and what is said of samples of label maps."""

import re

import numpy as np
import pytest
import standins

from stego_lib.datasets import check as checking
from stego_lib.datasets.check import COUNTS, check
from stego_lib.datasets.potsdam_tiles import TILES
from stego_lib.datasets.prepare import FINE_LISTS


def test_the_numbers_are_those_of_the_notes_on_the_paper(shared):
    notes = (shared / "reference" / "paper.md").read_text()
    numbers = {number.replace(",", "") for number in re.findall(r"\d[\d,]*", notes)}
    from_notes = [COUNTS["cityscapes"], COUNTS["camvid"], COUNTS["cocostuff15"]]
    for counts in from_notes:
        assert {str(count) for split in counts.values() for count in split} <= numbers
    assert {str(COUNTS["potsdam3"][split][0]) for split in ("train", "val")} <= numbers
    assert all(source.sha256 in notes for source in FINE_LISTS)


def test_the_numbers_agree_with_each_other():
    assert all(counts.keys() == {"train", "val"} for name, counts in COUNTS.items() if name != "cocostuff3")
    assert COUNTS["cocostuff3"].keys() == {"val"}
    assert COUNTS["cocostuff27"]["val"] == COUNTS["cocostuff15"]["val"]
    assert COUNTS["cocostuff27"]["train"][1:] == COUNTS["cocostuff15"]["train"]
    assert sum(COUNTS["potsdam3"][split][0] for split in ("train", "val")) == 24 * 225
    assert {split: COUNTS["potsdam3"][split][1] for split in ("train", "val")} == {
        split: 225 * len(TILES[split]) for split in ("train", "val")
    }


def test_a_published_number_needs_no_remark(tmp_path, capsys, monkeypatch):
    standins.camvid(tmp_path, {"train": 3, "val": 2}, 12, 24)
    monkeypatch.setitem(COUNTS, "camvid", {"train": (5, 3), "val": (1234, 7)})
    assert check("camvid", tmp_path)
    said = capsys.readouterr().out
    assert "train: 3 images, the first 24 x 12" in said
    assert "val: 2 images (published: 1,234 or 7), the first 24 x 12" in said


def test_a_sample_is_spread_over_the_split(tmp_path, capsys, monkeypatch):
    """Three of seven label maps: the first, the middle one, the last; what the others hold is not looked at."""
    standins.camvid(tmp_path, {"train": 7, "val": 1}, 12, 24)
    for i, path in enumerate(sorted((tmp_path / "camvid/trainannot").iterdir())):
        standins.save(path, np.full((12, 24), {0: 1, 3: 2, 6: 11}.get(i, 5), np.uint8))
    monkeypatch.setattr(checking, "SAMPLE", 3)
    check("camvid", tmp_path)
    said = capsys.readouterr().out
    assert "2 of 11 classes in a sample of 3 label maps, 33.3 % of the pixels ignored" in said
    assert re.search(r"building +33\.3 %   pole +33\.3 %\n", said) and re.search(r"sky +0\.0 %", said)


def test_a_single_class_will_not_do(tmp_path, capsys):
    """Every score would be 100."""
    standins.camvid(tmp_path, {"train": 1, "val": 1}, 12, 24)
    standins.save(tmp_path / "camvid/valannot/0001TP_000000.png", np.full((12, 24), 3, np.uint8))
    assert not check("camvid", tmp_path)
    said = capsys.readouterr().out
    assert "1 of 11 classes in 1 label map," in said
    assert "WRONG: camvid val: 'road' is the only class in 1 label map (ids seen: 3)" in said


@pytest.mark.parametrize("broken", ["train", "val"])
def test_one_broken_split_is_enough_to_fail_and_the_other_is_told(tmp_path, capsys, broken):
    standins.camvid(tmp_path, {"train": 1, "val": 1}, 12, 24)
    next((tmp_path / "camvid" / broken).iterdir()).write_bytes(b"no image")
    assert not check("camvid", tmp_path)
    said = capsys.readouterr().out
    other = {"train": "val", "val": "train"}[broken]
    assert f"{broken}: MISSING or broken" in said and f"{other}: 1 images" in said
