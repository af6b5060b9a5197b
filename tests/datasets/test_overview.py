"""The table of all datasets, and the lists that notebooks take as text."""

import pytest
import standins

from stego_book.studies.seeds import whole_numbers
from stego_lib import StegoError, open_dataset
from stego_lib.datasets import DATASETS
from stego_lib.datasets.overview import LABEL_SPACES, SOURCES, overview


def test_every_data_set_has_a_source_and_a_label_space_or_takes_yours():
    assert set(SOURCES) == set(DATASETS) and set(LABEL_SPACES) == set(DATASETS) - {"folder"}
    assert "NAME" not in "".join(SOURCES.values())


def test_label_spaces_are_those_of_the_opened_data_sets(tmp_path, scenes_root):
    standins.camvid(tmp_path, {"train": 1, "val": 1}, 36, 48)
    standins.cityscapes(tmp_path, {"train": 1, "val": 1}, 32, 64)
    standins.potsdam_patches(tmp_path, 1, 1)
    lists = ("Coco164kFull_Stuff_Coarse_7.txt", "Coco164kFew_Stuff_6.txt")
    standins.cocostuff(tmp_path, {"train": 1, "val": 1}, lists, 48, 64)
    for name, classes in LABEL_SPACES.items():
        root = scenes_root if name == "scenes" else tmp_path
        assert open_dataset(name, root, "val").classes == classes, name


def test_the_overview_tells_what_is_there(tmp_path, scenes_root):
    standins.camvid(tmp_path, {"train": 2, "val": 1}, 36, 48)
    (tmp_path / "scenes").symlink_to(scenes_root / "scenes")
    rows = {row["dataset"]: row for row in overview(tmp_path)}
    assert (rows["camvid"]["train"], rows["camvid"]["val"], rows["camvid"]["classes"]) == ("2", "1", 11)
    assert rows["scenes"]["train"] == "12" and rows["cityscapes"]["train"] == "not here"


@pytest.mark.parametrize("text", ["0 1 2", "0, 1,2", "0\n1 2"])
def test_whole_numbers_are_read_as_a_shell_gives_them(text):
    assert whole_numbers(text, "dims") == [0, 1, 2]


def test_a_single_number_comes_as_a_number_from_a_shell():
    assert whole_numbers(3, "dims") == [3]


@pytest.mark.parametrize("text", ["", "1 1", "a", "1.5", "-1", None])
def test_anything_else_is_refused(text):
    with pytest.raises(StegoError, match=r"dims = .* whole numbers"):
        whole_numbers(text, "dims")
