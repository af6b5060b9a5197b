"""Run records, the tables made from them, and the published figures beside them."""

import math
from io import StringIO
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from common import ROOT
from records import record

from stego_book.studies import results
from stego_book.studies.benchmark import own_rows
from stego_lib import Experiment, StegoError
from stego_lib.backbone import EMBEDDED
from stego_lib.provenance import Provenance
from stego_lib.utils.files import write_json

RECORDS = [record(seed) for seed in range(4)]


def spread(values) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def test_mean_and_deviation_over_seeds():
    lines = results.markdown_table(RECORDS).splitlines()
    assert lines[0] == "| method | accuracy | mIoU |" and len(lines) == 2 + 3
    for line, method in zip(lines[2:], ("kmeans_features", "cluster", "linear"), strict=True):  # in order of METHODS
        values = {score: [r["scores"][method][score] for r in RECORDS] for score in ("accuracy", "miou")}
        assert line == f"| {results.METHODS[method]} | {spread(values['accuracy'])} | {spread(values['miou'])} |"
    alone = results.markdown_table([record(0)])
    assert "nan" not in alone and "±" not in alone


@pytest.mark.parametrize("key", ["weights", "precision", "store", "images", "labels", "start"])
def test_records_of_another_provenance_are_never_averaged(key):
    with pytest.raises(StegoError, match=key):
        results.markdown_table([record(0), record(1, {key: "other"})])


def test_records_of_different_experiments_or_images_are_never_averaged(tmp_path):
    for key, change in {"steps": {"steps": 6}, "subtract_mean": {"official": {"subtract_mean": True}}}.items():
        with pytest.raises(StegoError, match=key):
            results.check_comparable([record(0), record(1, **change)])
    for key in ("split", "data"):
        with pytest.raises(StegoError, match=key):
            results.check_comparable([record(0), record(1) | {key: "test"}])
    for seed in range(2):
        write_json(tmp_path / "mixed" / f"{seed}.json", record(seed, {"images": f"data {seed}"}))
    with pytest.raises(StegoError, match="images"):
        results.fill_tables("<!-- table: mixed -->\n<!-- end -->", tmp_path)
    with pytest.raises(StegoError, match="images"):
        own_rows([tmp_path / "mixed"])


def test_records_with_and_without_crf_go_together_row_by_row():
    """The CRF touches no row but its own; what is on record both ways counts once."""
    records = [record(seed, crf=seed < 2) for seed in range(4)] + [record(0, crf=False)]
    for seed, scored in enumerate(records[:2]):
        scored["scores"]["cluster_crf"] = {"accuracy": 50.0 + seed, "miou": 30.0, "iou": []}
    assert set(results.markdown_table(RECORDS).splitlines()) < set(results.markdown_table(records).splitlines())
    assert f"{results.METHODS['cluster_crf']}, 2 of 4 seeds | 50.5 ± 0.7" in results.markdown_table(records)


@pytest.mark.parametrize("count", range(1, 6))
def test_the_expected_best_is_the_mean_over_all_choices(count):
    values = [3.0, 9.0, 1.0, 4.0, 4.0]
    assert results.mean_of_best(values, count) == pytest.approx(
        np.mean([max(some) for some in combinations(values, count)])
    )


def paper_record(images: int = 500, provenance=None, **changes) -> dict:
    """A record of the paper's row on Cityscapes, the scores made up."""
    changes = {"official": {"published": True}} | changes
    experiment = Experiment.preset("cityscapes-vitb8", **changes).to_record()
    return record(0, provenance) | {"experiment": experiment, "images": images}


def test_a_run_as_the_paper_has_it_departs_from_nothing():
    free = {"seed": 5, "n_classes": 27, "official": {"published": True, "keep_every": 400}}
    for store in ("full", "online"):
        assert results.departures(paper_record(500, {"store": store}, **free), "cityscapes-vitb8") == []


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"provenance": {"precision": "bfloat16"}}, "precision is bfloat16"),
        ({"provenance": {"store": "compact"}}, "store is compact"),
        ({"official": {}}, "published is False"),
        ({"images": 3}, "scored on 3 images"),
        ({"steps": 20}, "steps is 20"),
        ({"backbone": "/somewhere/tiny.pth"}, "backbone is tiny.pth"),
    ],
)
def test_what_departs_from_the_row_is_listed(changes, line):
    (departure,) = results.departures(paper_record(**changes), "cityscapes-vitb8")
    assert departure.startswith(line)


def test_published_figures_are_those_of_the_reference_and_name_their_source(shared):
    ours, reference = (pd.read_csv(path) for path in (results.PUBLISHED, shared / "reference" / results.PUBLISHED.name))
    pd.testing.assert_frame_equal(ours.drop(columns="source"), reference.drop(columns="source"))
    changed = ours[ours["source"] != reference["source"]]
    assert set(changed["method"]) == {"STEGO"} and changed["source"].str.contains("[Tt]able").all()
    assert results.paper_rows() == ["cocostuff27-vits8", "cocostuff27-vitb8", "cityscapes-vitb8", "potsdam3-vits8"]
    for row, method, figures in (
        ("cocostuff27-vits8", "cluster_crf", (None, 24.5)),
        ("cityscapes-vitb8", "cluster_crf", (73.2, 21.0)),
        ("potsdam3-vits8", "kmeans_features", (56.6, 33.6)),
    ):
        published = results.published_figures(row).loc[method]
        assert tuple(None if math.isnan(published[key]) else published[key] for key in ("accuracy", "miou")) == figures
    assert (ours["source"] != "").all() and set(ours["verified"]) == {"yes", "no"}


def test_other_files_are_no_records(tmp_path):
    with pytest.raises(StegoError, match="no run record"):
        results.read_records(tmp_path)
    write_json(tmp_path / "other.json", {"scores": {}, "step": 1})
    with pytest.raises(StegoError, match="other"):
        results.read_record(tmp_path / "other.json")


def test_the_tables_of_the_readme_and_of_all_results_are_those_of_the_records():
    """Update with python -m stego_book.studies.results README.md book/records/results.csv."""
    text, root = (ROOT / "README.md").read_text(), ROOT / "book" / "records"
    assert text.count("<!-- table: ") == 1 and results.fill_tables(text, ROOT) == text
    table = pd.read_csv(root / "results.csv", dtype=str, keep_default_na=False)
    made = pd.read_csv(StringIO(results.results_table(root).to_csv(index=False)), dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(table, made)
    miou = table[(table.study == "scenes") & (table.method == "cluster")].miou.astype(float)
    values = [scored["scores"]["cluster"]["miou"] for scored in results.read_records(root / "scenes")]
    assert miou.tolist() == pytest.approx(values, abs=1e-3)


def test_the_first_page_shows_shipped_backbones_and_its_text_has_the_gains_of_the_records():
    root = ROOT / "book" / "records"
    scores = results.main_scores(root)
    lines = results.front_table(root).splitlines()
    assert lines[0].replace("&shy;", "") == f"| mIoU (%) | {' | '.join(results.FRONT)} |" and len(lines) == 2 + len(
        results.OVERVIEW
    )
    assert set(results.FRONT.values()) <= set(EMBEDDED) and "CamVid val" not in results.FRONT
    means = scores.groupby(["data", "backbone", "method"])["miou"].mean()
    for data in ("CamVid val", "CamVid test", "LabelMeFacade test"):
        gain = (
            means[data, results.FRONT["CamVid test"], "cluster"]
            - means[data, results.FRONT["CamVid test"], "kmeans_features"]
        )
        for page in ("README.md", "book/index.md"):
            assert f" {gain:.1f} points" in (ROOT / page).read_text(), (page, data)
    table = results.overview_table(scores, "accuracy")
    values = scores.query("data == 'scenes val' and method == 'linear'")["accuracy"]
    assert table.loc[results.METHODS["linear"], ("scenes val", "scenes_vit_tiny8")] == spread(values)


def test_scores_on_the_test_split_are_those_of_the_reference(shared):
    ours, reference = (pd.read_csv(path / results.TEST) for path in (ROOT / "book" / "records", shared / "reference"))
    pd.testing.assert_frame_equal(ours[reference.columns], reference)
    assert ours[["precision", "commit"]].notna().all().all()


@pytest.mark.parametrize(
    "folder", ["scenes", "camvid", "camvid_photos_d6", "camvid_photos", "labelmefacade", "labelmefacade_test"]
)
def test_records_of_the_front_tables_have_complete_provenance(folder):
    for scored in results.read_records(ROOT / "book" / "records" / folder):
        provenance = Provenance.from_dict(scored["provenance"])
        assert provenance.images and provenance.labels and provenance.weights
        assert (provenance.precision, provenance.store) == ("float32", "full")
        assert all({"border_f", "own_miou"} <= set(scored["scores"][name]) for name in ("cluster", "kmeans_features"))
