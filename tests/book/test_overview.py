"""The table of all datasets."""

import standins

from stego_book.overview import LABEL_SPACES, SOURCES, overview
from stego_lib import open_dataset
from stego_lib.datasets import DATASETS


def test_label_spaces_are_those_of_the_opened_datasets_and_the_overview_counts_images(tmp_path, scenes_root):
    assert set(SOURCES) == set(DATASETS) and set(LABEL_SPACES) == set(DATASETS) - {"folder"}
    standins.camvid(tmp_path, {"train": 2, "val": 1}, 36, 48)
    standins.cityscapes(tmp_path, {"train": 1, "val": 1}, 32, 64)
    standins.potsdam_patches(tmp_path, 1, 1)
    standins.labelmefacade(tmp_path, {"barcelona": 1}, 32, 64)
    lists = ("Coco164kFull_Stuff_Coarse_7.txt", "Coco164kFew_Stuff_6.txt")
    standins.cocostuff(tmp_path, {"train": 1, "val": 1}, lists, 48, 64)
    for name, classes in LABEL_SPACES.items():
        root = scenes_root if name == "scenes" else tmp_path
        assert open_dataset(name, root, "val").classes == classes, name
    (tmp_path / "scenes").symlink_to(scenes_root / "scenes")
    rows = {row["dataset"]: row for row in overview(tmp_path)}
    assert (rows["camvid"]["train"], rows["camvid"]["val"], rows["camvid"]["classes"]) == ("2", "1", 11)
    assert rows["scenes"]["train"] == "12"
