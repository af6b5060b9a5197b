"""Run records, the tables made from them, and the published figures beside them."""

import csv
import math
from io import StringIO
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from common import ROOT
from records import record

from stego_book.studies.benchmark import COLUMNS, missing_rows, own_rows, published_rows, rows_by_miou
from stego_book.studies.results import (
    METHODS,
    PUBLISHED,
    collapses,
    departures,
    fill_tables,
    main,
    markdown_table,
    mean_of_best,
    overview_table,
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


def spread(values) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def test_mean_and_deviation_over_seeds():
    table = summary(RECORDS)
    assert list(table.index) == ["kmeans_features", "cluster", "linear"], "in the order of METHODS, what was measured"
    for method in table.index:
        for score in ("accuracy", "miou"):
            values = [r["scores"][method][score] for r in RECORDS]
            assert table.loc[method, (score, "mean")] == pytest.approx(np.mean(values))
            assert table.loc[method, (score, "std")] == pytest.approx(np.std(values, ddof=1))  # of a sample
    rows = score_table(RECORDS)
    assert len(rows) == 12 and list(rows.columns) == ["method", "seed", "accuracy", "miou"]


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"weights": "b"}, "weights"),
        ({"precision": "bfloat16"}, "precision"),
        ({"store": "compact"}, "store"),
        ({"images": "c"}, "images"),
        ({"labels": "d"}, "labels"),
        ({"start": "e"}, "start"),
    ],
)
@pytest.mark.parametrize("table", [summary, markdown_table], ids=["summary", "markdown_table"])
def test_records_of_another_provenance_are_never_averaged(table, changes, word):
    with pytest.raises(StegoError, match=word):
        table([record(0), record(1, changes)])


@pytest.mark.parametrize(
    "change", [{"steps": 6}, {"dataset": "camvid"}, {"official": {"subtract_mean": True}}], ids=str
)
def test_records_of_different_experiments_are_refused(change):
    word = "subtract_mean" if "official" in change else next(iter(change))
    with pytest.raises(StegoError, match=word):
        summary([record(0), record(1, **change)])


@pytest.mark.parametrize("key", ["split", "data"])
def test_records_of_other_scored_images_are_refused(key):
    with pytest.raises(StegoError, match=key):
        summary([record(0), record(1) | {key: "test"}])


def test_the_table_of_a_folder_refuses_what_cannot_be_averaged(tmp_path):
    for seed in range(2):
        write_json(tmp_path / "mixed" / f"{seed}.json", record(seed, {"images": f"data {seed}"}))
    with pytest.raises(StegoError, match="images"):
        fill_tables("<!-- table: mixed -->\n<!-- end -->", tmp_path)
    with pytest.raises(StegoError, match="images"):
        own_rows([tmp_path / "mixed"])


def test_records_with_and_without_crf_go_together_row_by_row():
    """The CRF touches no row but its own; what is on record both ways counts once."""
    records = [record(seed, crf=seed < 2) for seed in range(4)] + [record(0, crf=False)]
    for seed, one in enumerate(records[:2]):
        one["scores"]["cluster_crf"] = {"accuracy": 50.0 + seed, "miou": 30.0, "iou": []}
    table, plain = summary(records), summary(RECORDS)
    for method in plain.index:
        np.testing.assert_allclose(table.loc[method], plain.loc[method])
    lines = markdown_table(records).splitlines()
    assert sum(f"{METHODS['cluster_crf']}, 2 of 4 seeds | 50.5 ± 0.7" in line for line in lines) == 1
    assert any(line.startswith(f"| {METHODS['cluster']} |") for line in lines)


def test_a_collapse_is_told_of_each_record_that_saw_one():
    sound, wrong = record(0) | {"collapsed": False, "codes": {"seen": None}}, record(3)
    wrong |= {"collapsed": True, "codes": {"seen": "step 75: the codes are nearly all alike"}}
    assert collapses([sound, wrong, record(1)]) == ["seed 3: step 75: the codes are nearly all alike"]


@pytest.mark.parametrize("count", range(1, 6))
def test_the_expected_best_is_the_mean_over_all_choices(count):
    values = [3.0, 9.0, 1.0, 4.0, 4.0]
    assert mean_of_best(values, count) == pytest.approx(np.mean([max(some) for some in combinations(values, count)]))
    with pytest.raises(ValueError, match="best of"):
        mean_of_best(values, 6)


def test_markdown_table():
    lines = markdown_table(RECORDS).splitlines()
    assert lines[0] == "| method | accuracy | mIoU |" and len(lines) == 2 + 3
    accuracy, miou = (spread([r["scores"]["cluster"][score] for r in RECORDS]) for score in ("accuracy", "miou"))
    assert f"| {METHODS['cluster']} | {accuracy} | {miou} |" in lines
    alone = markdown_table([record(0)])
    assert f"{RECORDS[0]['scores']['cluster']['miou']:.1f}" in alone and "nan" not in alone and "±" not in alone


def paper_record(images: int = 500, provenance=None, **changes) -> dict:
    """A record of the paper's row on Cityscapes, the scores made up."""
    changes = {"official": {"published": True}} | changes
    experiment = Experiment.preset("cityscapes-vitb8", **changes).to_record()
    return record(0, provenance) | {"experiment": experiment, "images": images}


def test_a_run_as_the_paper_has_it_departs_from_nothing():
    free = {"seed": 5, "n_classes": 27, "official": {"published": True, "keep_every": 400}}
    for store in ("full", "online"):
        assert departures(paper_record(500, {"store": store}, **free), "cityscapes-vitb8") == []


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"provenance": {"precision": "bfloat16"}}, "precision is bfloat16"),
        ({"provenance": {"precision": None}}, "precision is None"),
        ({"provenance": {"store": "compact"}}, "store is compact"),
        ({"official": {}}, "published is False"),
        ({"official": {"published": True, "stabilize": True}}, "stabilize is True"),
        ({"images": 3}, "scored on 3 images, the published figures are of 500"),
        ({"steps": 20}, "steps is 20, the recipe's 7000"),
        ({"backbone": "/somewhere/tiny.pth"}, "backbone is tiny.pth, the recipe's dino_vitb8"),
        ({"weights": (1, 2, 3)}, "weights is [1.0, 2.0, 3.0]"),
    ],
)
def test_what_departs_from_the_row_is_listed(changes, line):
    (found,) = departures(paper_record(**changes), "cityscapes-vitb8")
    assert found.startswith(line)


def test_the_rows_of_the_paper_are_the_four():
    assert paper_rows() == ["cocostuff27-vits8", "cocostuff27-vitb8", "cityscapes-vitb8", "potsdam3-vits8"]
    for row in ("scenes", "cityscape-vitb8", None):
        with pytest.raises(StegoError, match="its rows"):
            published_figures(row)


@pytest.mark.parametrize(
    "row, method, figures",
    [
        ("cocostuff27-vits8", "cluster_crf", (None, 24.5)),
        ("cocostuff27-vitb8", "linear_crf", (76.1, 41.1)),
        ("cityscapes-vitb8", "cluster_crf", (73.2, 21.0)),
        ("potsdam3-vits8", "cluster_crf", (77.0, 62.6)),
        ("potsdam3-vits8", "kmeans_features", (56.6, 33.6)),
    ],
)
def test_published_figures_are_those_of_the_table_and_name_their_source(row, method, figures):
    found = published_figures(row).loc[method]
    assert [None if math.isnan(found[key]) else found[key] for key in ("accuracy", "miou")] == list(figures)
    assert len(found["source"]) > 10


def test_the_table_of_published_results_is_the_reference(shared):
    assert PUBLISHED.read_bytes() == (shared / "reference" / PUBLISHED.name).read_bytes()


def test_published_figures_stand_beside_the_measured_ones():
    """Measured: k-means, the cluster probe and the linear probe, none of them with a CRF."""
    lines = markdown_table(RECORDS, published_figures("cityscapes-vitb8")).splitlines()
    cells = {line.split(" | ")[0].removeprefix("| "): [c.strip() for c in line.split("|")[2:-1]] for line in lines[2:]}
    assert list(cells) == [METHODS[m] for m in ("kmeans_features", "cluster", "cluster_crf", "linear")]
    assert cells[METHODS["cluster"]][2:] == ["", "", ""], "nothing is published of it"
    assert cells[METHODS["cluster_crf"]][:4] == ["", "", "73.2", "21.0"], "it was not measured"
    measured = cells[METHODS["kmeans_features"]]
    assert f"| {METHODS['kmeans_features']} | {measured[0]} | {measured[1]} |" in markdown_table(RECORDS)
    assert measured[2:] == ["49.2", "15.5", "visinf/primaps README"]


def test_records_are_read_in_the_order_of_their_names(tmp_path):
    with pytest.raises(StegoError, match="no run record"):
        read_records(tmp_path)
    for name, seed in (("b", 1), ("a", 0), ("c", 2)):
        write_json(tmp_path / f"{name}.json", record(seed))
    assert [r["experiment"]["seed"] for r in read_records(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("value", [[], {"experiment": {}}, {"scores": {}, "step": 1}], ids=str)
def test_a_file_that_is_no_record_is_named(tmp_path, value):
    write_json(tmp_path / "other.json", value)
    with pytest.raises(StegoError, match=r"other\.json"):
        read_record(tmp_path / "other.json")


def test_tables_of_a_page_are_made_anew_and_the_rest_is_kept(tmp_path):
    for seed in range(4):
        write_json(tmp_path / "records" / "four" / f"{seed}.json", RECORDS[seed])
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- table: records/four -->\nold\n<!-- end -->\nafter\n")
    for _ in range(2):  # filling twice changes nothing
        main([str(page)])
        table = markdown_table(RECORDS)
        assert page.read_text() == f"# Title\n\n<!-- table: records/four -->\n{table}\n<!-- end -->\nafter\n"


def test_the_tables_of_the_readme_are_those_of_the_records():
    """Update with python -m stego_book.studies.results README.md."""
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- table: ") == 1 and fill_tables(text, ROOT) == text
    lines = overview_table(ROOT / "book" / "records").splitlines()
    assert lines[0].startswith("| mIoU (%) | scenes val, `scenes_vit_tiny8`") and len(lines) == 2 + 5


def test_the_table_of_all_results_is_that_of_the_records():
    """Update with python -m stego_book.studies.results book/records/results.csv."""
    root = ROOT / "book" / "records"
    table = pd.read_csv(root / "results.csv", dtype=str, keep_default_na=False)
    made = pd.read_csv(StringIO(results_table(root).to_csv(index=False)), dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(table, made)
    miou = table[(table.study == "scenes") & (table.method == "cluster")].miou.astype(float)
    mean = float(summary(read_records(root / "scenes")).loc["cluster", ("miou", "mean")])
    assert len(miou) == 5 and miou.mean() == pytest.approx(mean, abs=1e-3)
    told = ["dataset", "backbone", "weights", "precision", "store", "seed", "miou", "torch", "machine"]
    assert not (table[told] == "").any(axis=None)


def test_published_rows_are_the_lines_of_the_file_and_each_has_a_source():
    rows = published_rows()
    with open(PUBLISHED, newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(rows.columns) == COLUMNS and len(rows) == len(lines) > 20
    for row, line in zip(rows.to_dict("records"), lines, strict=True):
        assert line["source"] and line["verified"] in ("yes", "no") and (line["accuracy"] or line["miou"])
        assert all(row[key] == line[key] for key in COLUMNS if key in line and key != "accuracy")
        for shown, stored in ((row["accuracy"], line["accuracy"]), (row["mIoU"], line["miou"])):
            assert (shown == stored == "") or float(shown) == float(stored)


def test_own_rows_are_means_and_spreads_and_missing_ones_say_what_they_need(tmp_path):
    assert len(missing_rows(own_rows([]))) == 4
    records = [record(seed, dataset="potsdam3", backbone="dino_vits8") for seed in range(3)]
    for seed, one in enumerate(records):
        write_json(tmp_path / "records" / "potsdam" / f"{seed}.json", one)
    rows = own_rows([tmp_path / "records" / "potsdam"])
    row = rows[rows["method"] == METHODS["cluster"]].iloc[0]
    assert row["mIoU"] == spread([one["scores"]["cluster"]["miou"] for one in records])
    assert row["source"] == "records/potsdam, 3 seeds" and row["backbone"] == "ViT-S/8"
    assert set(rows["protocol"]) == {"cluster", "linear"}
    left = missing_rows(rows)
    assert len(left) == 3 and "potsdam3" not in set(left["dataset"])
    assert all(line.split("ROW=")[1].split()[0] in paper_rows() for line in left["the line that runs it"])


def test_comparable_rows_are_of_one_protocol_the_best_first():
    rows = rows_by_miou(published_rows(), "potsdam3", "linear")
    assert set(rows["protocol"]) == {"linear"} and rows["miou"].is_monotonic_decreasing and len(rows) >= 1
    with pytest.raises(StegoError, match="scenes"):
        rows_by_miou(published_rows(), "scenes")
