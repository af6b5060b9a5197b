"""Run records and the tables made from them."""

import copy

import numpy as np
import pytest
from common import ROOT

from stego_lib import StegoError
from stego_lib.files import write_json
from stego_lib.results import METHODS, fill_tables, markdown_table, read_record, read_records, score_table, summary


def record(seed: int, **experiment: object) -> dict:
    """A run record with scores drawn from the seed."""
    rng = np.random.default_rng(seed)
    names = ("linear", "cluster", "kmeans_features")  # not in the order of tables
    scores = {
        name: {"accuracy": float(rng.uniform(30, 90)), "miou": float(rng.uniform(10, 60)), "iou": [1.0, None]}
        for name in names
    }
    return {
        "experiment": {"dataset": "scenes", "steps": 5, "seed": seed} | experiment,
        "step": 5,
        "split": "val",
        "scores": scores,
    }


RECORDS = [record(seed) for seed in range(4)]


def test_score_table_has_one_row_a_method_and_record():
    table = score_table(RECORDS)
    assert len(table) == 12 and list(table.columns) == ["method", "seed", "accuracy", "miou"]
    row = table[(table.method == "cluster") & (table.seed == 2)].iloc[0]
    assert row.miou == RECORDS[2]["scores"]["cluster"]["miou"]


def test_mean_and_deviation_over_seeds():
    table = summary(RECORDS)
    assert list(table.index) == ["kmeans_features", "cluster", "linear"], (
        "in the order of METHODS, and only what was measured"
    )
    for method in table.index:
        for score in ("accuracy", "miou"):
            values = [r["scores"][method][score] for r in RECORDS]
            assert table.loc[method, (score, "mean")] == pytest.approx(np.mean(values))
            assert table.loc[method, (score, "std")] == pytest.approx(np.std(values, ddof=1))  # of a sample


def test_records_of_different_experiments_are_refused():
    with pytest.raises(StegoError, match="steps"):
        summary([record(0), record(1, steps=6)])


def test_a_key_that_only_one_record_has_is_a_difference():
    with pytest.raises(StegoError, match="zoom"):
        summary([record(0, zoom=2), record(1)])
    with pytest.raises(StegoError, match="zoom"):
        summary([record(0), record(1, zoom=2)])


def test_records_of_different_splits_are_refused():
    other = copy.deepcopy(record(1))
    other["split"] = "test"
    with pytest.raises(StegoError, match="split"):
        summary([record(0), other])


def test_markdown_table():
    lines = markdown_table(RECORDS).splitlines()
    assert lines[0] == "| method | accuracy | mIoU |" and len(lines) == 2 + 3
    values = {score: [r["scores"]["cluster"][score] for r in RECORDS] for score in ("accuracy", "miou")}
    cells = [f"{np.mean(v):.1f} ± {np.std(v, ddof=1):.1f}" for v in values.values()]
    assert f"| {METHODS['cluster']} | {cells[0]} | {cells[1]} |" in lines


def test_one_record_has_a_mean_and_no_deviation():
    """With one seed nothing is known of the spread, and the table must not say nan."""
    text = markdown_table([record(0)])
    assert f"{RECORDS[0]['scores']['cluster']['miou']:.1f}" in text and "nan" not in text


def test_records_are_read_in_the_order_of_their_names(tmp_path):
    for name, seed in (("b", 1), ("a", 0), ("c", 2)):
        write_json(tmp_path / f"{name}.json", record(seed))
    assert [r["experiment"]["seed"] for r in read_records(tmp_path)] == [0, 1, 2]


def test_a_folder_without_records_is_an_error_that_names_it(tmp_path):
    with pytest.raises(StegoError, match=str(tmp_path)):
        read_records(tmp_path)


@pytest.mark.parametrize("value", [[], {"experiment": {}}, {"scores": {}, "step": 1}, 3], ids=str)
def test_a_file_that_is_no_record_is_named(tmp_path, value):
    write_json(tmp_path / "other.json", value)
    with pytest.raises(StegoError, match=r"other\.json is not a run record"):
        read_record(tmp_path / "other.json")
    with pytest.raises(StegoError, match=r"other\.json"):
        read_records(tmp_path)


def test_tables_of_a_page_are_made_anew_and_the_rest_is_kept(tmp_path):
    (tmp_path / "records" / "two").mkdir(parents=True)
    (tmp_path / "records" / "four").mkdir()
    for seed in range(4):
        write_json(tmp_path / "records" / "four" / f"{seed}.json", RECORDS[seed])
        if seed < 2:
            write_json(tmp_path / "records" / "two" / f"{seed}.json", RECORDS[seed])
    page = "# Title\n\n<!-- table: records/two -->\nold\n<!-- end -->\nbetween\n<!-- table: records/four -->\n<!-- end -->\nafter\n"
    found = fill_tables(page, tmp_path)
    two, four = markdown_table(RECORDS[:2]), markdown_table(RECORDS)
    expected = f"# Title\n\n<!-- table: records/two -->\n{two}\n<!-- end -->\nbetween\n<!-- table: records/four -->\n{four}\n<!-- end -->\nafter\n"
    assert found == expected
    assert fill_tables(found, tmp_path) == found, "filling twice changes nothing"


def test_the_tables_of_the_readme_are_those_of_the_records():
    """Mended by: python -m stego_lib.results README.md"""
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- table: ") == 2
    assert fill_tables(text, ROOT) == text
