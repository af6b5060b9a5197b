"""The table of all datasets, and the listings of source code."""

import ast
import inspect
import textwrap

import pytest
import standins

from stego_book.listing import source_without_sections
from stego_book.overview import LABEL_SPACES, SOURCES, overview
from stego_book.studies.speed import Costs
from stego_lib import Run, open_dataset
from stego_lib.datasets import DATASETS
from stego_lib.metrics import match, scores


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


@pytest.mark.parametrize("part", [match, scores, Run.predict, Costs])
def test_a_listing_is_the_source_without_the_sections_of_its_docstring(part):
    text = source_without_sections(part)
    whole, shown = (ast.parse(source).body[0] for source in (textwrap.dedent(inspect.getsource(part)), text))
    assert "----" not in text
    assert ast.get_docstring(whole).startswith(ast.get_docstring(shown))
    assert [ast.unparse(node) for node in whole.body[1:]] == [ast.unparse(node) for node in shown.body[1:]]
