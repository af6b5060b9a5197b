"""The benchmark's table: published numbers as they stand in the file, ours from records, and what is missing."""

import csv

import numpy as np
import pytest
from records import record

from stego_book.studies.benchmark import COLUMNS, missing_rows, own_rows, published_rows, rows_by_miou
from stego_book.studies.results import METHODS, PUBLISHED, paper_rows, published_results
from stego_lib import StegoError
from stego_lib.utils.files import write_json


def lines() -> list[dict[str, str]]:
    with open(PUBLISHED, newline="") as file:
        return list(csv.DictReader(file))


def test_every_published_number_has_a_source_and_says_whether_it_was_verified():
    assert len(published_results()) == len(lines()) > 20
    for line in lines():
        assert line["source"] and line["verified"] in ("yes", "no"), line
        assert line["accuracy"] or line["miou"], line


def test_published_rows_are_the_lines_of_the_file():
    rows = published_rows()
    assert list(rows.columns) == COLUMNS
    for row, line in zip(rows.to_dict("records"), lines(), strict=True):
        expected = [line[key] for key in ("method", "dataset", "backbone", "protocol", "source", "verified")]
        assert [row[key] for key in ("method", "dataset", "backbone", "protocol", "source", "verified")] == expected
        for shown, stored in ((row["accuracy"], line["accuracy"]), (row["mIoU"], line["miou"])):
            assert (shown == stored == "") or float(shown) == float(stored)


def test_own_rows_are_means_and_spreads_of_the_records(tmp_path):
    folder = tmp_path / "records" / "scenes"
    records = [record(seed, backbone="dino_vits8") for seed in range(3)]
    for i, one in enumerate(records):
        write_json(folder / f"{i}.json", one)
    rows = own_rows([folder])
    row = rows[rows["method"] == METHODS["cluster"]].iloc[0]
    values = [one["scores"]["cluster"]["miou"] for one in records]
    assert row["mIoU"] == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    assert row["source"] == "records/scenes, 3 seeds" and row["backbone"] == "ViT-S/8"
    assert set(rows["protocol"]) == {"cluster", "linear"}


def test_recipes_without_a_record_say_what_they_need(tmp_path):
    nothing = own_rows([])
    missing = missing_rows(nothing)
    assert len(missing) == 4 and missing["not run"].str.startswith("not run: needs ").all()
    for line in missing["the line that runs it"]:
        assert line.split("ROW=")[1].split()[0] in paper_rows()
    write_json(tmp_path / "potsdam" / "0.json", record(0, dataset="potsdam3", backbone="dino_vits8"))
    left = missing_rows(own_rows([tmp_path / "potsdam"]))
    assert len(left) == 3 and "potsdam3" not in set(left["dataset"])


def test_comparable_rows_are_of_one_protocol_the_best_first():
    rows = rows_by_miou(published_rows(), "potsdam3", "linear")
    assert set(rows["protocol"]) == {"linear"} and rows["miou"].is_monotonic_decreasing and len(rows) >= 1
    with pytest.raises(StegoError, match="scenes"):
        rows_by_miou(published_rows(), "scenes")
