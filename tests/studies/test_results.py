"""Run records and the tables made from them."""

import copy
import math
import runpy
import sys
from io import StringIO
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from common import ROOT
from records import record

from stego_book.studies.results import (
    METHODS,
    PUBLISHED,
    collapses,
    departures,
    fill_tables,
    markdown_table,
    mean_of_best,
    paper_rows,
    published_figures,
    read_record,
    read_records,
    results_table,
    score_table,
    summary,
)
from stego_lib import Experiment, StegoError
from stego_lib.utils.files import write_json

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


def test_records_with_and_without_crf_go_together_row_by_row():
    """The CRF touches no row but its own; what is on record both ways counts once."""
    records = [record(seed, crf=seed < 2) for seed in range(4)] + [record(0, crf=False)]
    for one in records[:2]:
        one["scores"]["cluster_crf"] = {"accuracy": 50.0 + one["experiment"]["seed"], "miou": 30.0, "iou": []}
    table, plain = summary(records), summary(RECORDS)
    for method in plain.index:
        np.testing.assert_allclose(table.loc[method], plain.loc[method])
    assert table.loc["cluster_crf", ("accuracy", "mean")] == pytest.approx(50.5)
    lines = markdown_table(records).splitlines()
    assert sum(f"{METHODS['cluster_crf']}, 2 of 4 seeds | 50.5 ± 0.7" in line for line in lines) == 1
    assert any(line.startswith(f"| {METHODS['cluster']} |") for line in lines)


def test_a_collapse_is_told_of_each_record_that_saw_one():
    sound, wrong = record(0) | {"collapsed": False, "codes": {"seen": None}}, record(3)
    wrong |= {"collapsed": True, "codes": {"seen": "step 75: the codes are nearly all alike"}}
    assert collapses([sound, wrong, record(1)]) == ["seed 3: step 75: the codes are nearly all alike"]


def test_records_of_other_backbone_weights_are_refused():
    """The embedded backbone is made anew now and then under the same name."""
    with pytest.raises(StegoError, match="backbone_weights"):
        summary([record(0) | {"backbone_weights": "a"}, record(1) | {"backbone_weights": "b"}])


@pytest.mark.parametrize("count", range(1, 6))
def test_the_expected_best_is_the_mean_over_all_choices(count):
    values = [3.0, 9.0, 1.0, 4.0, 4.0]
    choices = [max(choice) for choice in combinations(values, count)]
    assert mean_of_best(values, count) == pytest.approx(np.mean(choices))


@pytest.mark.parametrize("count", [0, 4])
def test_the_best_of_more_than_there_are_is_refused(count):
    with pytest.raises(ValueError, match=f"best of {count} of 3"):
        mean_of_best([1.0, 2.0, 3.0], count)


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


def paper_record(seed: int = 0, images: int = 500, **changes: object) -> dict:
    """A record of the paper's row on Cityscapes, the scores made up."""
    experiment = Experiment.preset("cityscapes-vitb8", seed=seed, **changes).to_record()
    return record(seed) | {"experiment": experiment, "images": images}


def test_the_rows_of_the_paper_are_the_four():
    assert paper_rows() == ["cocostuff27-vits8", "cocostuff27-vitb8", "cityscapes-vitb8", "potsdam3-vits8"]


@pytest.mark.parametrize(
    "row, method, figures",
    [
        ("cocostuff27-vits8", "cluster_crf", (None, 24.5)),
        ("cocostuff27-vitb8", "cluster_crf", (56.9, 28.2)),
        ("cocostuff27-vitb8", "linear_crf", (76.1, 41.1)),
        ("cityscapes-vitb8", "cluster_crf", (73.2, 21.0)),
        ("potsdam3-vits8", "cluster_crf", (77.0, 62.6)),
        ("potsdam3-vits8", "kmeans_features", (56.6, 33.6)),
    ],
)
def test_published_figures_are_those_of_the_table_and_name_their_source(row, method, figures):
    """As the paper's abstract of results has them; the baselines' backbone must be the row's."""
    found = published_figures(row).loc[method]
    assert [None if math.isnan(found[key]) else found[key] for key in ("accuracy", "miou")] == list(figures)
    assert len(found["source"]) > 10


def test_the_table_of_published_results_is_the_reference(shared):
    assert PUBLISHED.read_bytes() == (shared / "reference" / PUBLISHED.name).read_bytes()


@pytest.mark.parametrize("row", ["scenes", "cityscape-vitb8", "", None])
def test_what_is_no_row_of_the_paper_is_refused(row):
    with pytest.raises(StegoError, match=r"no row .*its rows: cocostuff27-vits8, .*potsdam3-vits8"):
        published_figures(row)


def test_published_figures_stand_beside_the_measured_ones():
    """Measured: k-means, the cluster probe and the linear probe, none of them with a CRF."""
    lines = markdown_table(RECORDS, published_figures("cityscapes-vitb8")).splitlines()
    assert {line.count("|") for line in lines} == {7}
    alone = markdown_table(RECORDS).splitlines()
    cells = {line.split(" | ")[0].removeprefix("| "): [c.strip() for c in line.split("|")[2:-1]] for line in lines[2:]}
    assert list(cells) == [METHODS[m] for m in ("kmeans_features", "cluster", "cluster_crf", "linear")]
    assert cells[METHODS["cluster"]][2:] == ["", "", ""], "nothing is published of it"
    assert cells[METHODS["cluster_crf"]][:4] == ["", "", "73.2", "21.0"], "it was not measured"
    measured = cells[METHODS["kmeans_features"]]
    assert f"| {METHODS['kmeans_features']} | {measured[0]} | {measured[1]} |" in alone
    assert measured[2:] == ["49.2", "15.5", "visinf/primaps README"]


def test_a_run_of_the_recipe_departs_from_nothing():
    free = dict(seed=5, device="cpu", precision="float32", published=True, n_classes=27, validate_every=400)
    assert departures(paper_record(**free), "cityscapes-vitb8") == []


def test_what_departs_from_the_row_is_told():
    told = departures(
        paper_record(images=3, steps=20, backbone="/somewhere/tiny.pth", weights=(1, 2, 3)), "cityscapes-vitb8"
    )
    assert told == [
        "backbone is tiny.pth, the recipe's dino_vitb8",
        "steps is 20, the recipe's 7000",
        "weights is [1.0, 2.0, 3.0], the recipe's [1.0, 0.577453483136995, 0.9058762625226623]",
        "scored on 3 images, the published figures are of 500",
    ]


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


def test_the_module_fills_the_tables_of_pages(tmp_path, monkeypatch):
    write_json(tmp_path / "records" / "0.json", RECORDS[0])
    page = tmp_path / "page.md"
    page.write_text("<!-- table: records -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(sys, "argv", ["results", str(page)])
    monkeypatch.delitem(sys.modules, "stego_book.studies.results")
    runpy.run_module("stego_book.studies.results", run_name="__main__")
    assert page.read_text() == f"<!-- table: records -->\n{markdown_table(RECORDS[:1])}\n<!-- end -->\n"


def test_the_tables_of_the_readme_are_those_of_the_records():
    """Mended by: python -m stego_book.studies.results README.md"""
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- table: ") == 1
    assert fill_tables(text, ROOT) == text


def test_the_table_of_all_results_is_that_of_the_records():
    """If this fails: python -m stego_book.studies.results book/records/results.csv."""
    root = ROOT / "book" / "records"
    table = pd.read_csv(root / "results.csv", dtype=str, keep_default_na=False)
    made = pd.read_csv(StringIO(results_table(root).to_csv(index=False)), dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(table, made)
    of_seeds = table[(table.study == "scenes") & (table.method == "cluster")].miou.astype(float)
    mean = float(summary(read_records(root / "scenes")).loc["cluster", ("miou", "mean")])
    assert len(of_seeds) == 5 and of_seeds.mean() == pytest.approx(mean, abs=1e-3)
    assert not (table[["dataset", "backbone", "seed", "miou", "torch", "machine"]] == "").any(axis=None)
