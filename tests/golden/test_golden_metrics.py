"""Confusion matrix, matching and scores against the published code's numbers, including its defects."""

import numpy as np
import pytest
import torch
from common import golden

from stego_lib.metrics import assigned, confusion, identity, match, scores

G = golden("metrics")
NAMES = sorted({key.split(".")[0] for key in G})
CASES = {
    name: {key.removeprefix(f"{name}."): value for key, value in G.items() if key.startswith(f"{name}.")}
    for name in NAMES
}
SCORED = [name for name in NAMES if not CASES[name]["raises"]]
DRAWN = [name for name in SCORED if "preds" in CASES[name]]
PERCENT = dict(rtol=0, atol=1e-4)


def sizes(case: dict) -> tuple[int, int]:
    """(clusters, classes)."""
    return int(case["n_classes"] + case["extra_clusters"]), int(case["n_classes"])


def matching_of(case: dict) -> torch.Tensor:
    """Hungarian where the case asks for it, else cluster c is class c."""
    return match(case["stats"]) if case["hungarian"] else identity(int(case["n_classes"]))


def is_unique(case: dict) -> bool:
    """Whether the best assignment is the only one: no class and no (ordinary) cluster without a pixel."""
    stats, n = case["stats"], int(case["n_classes"])
    return bool(stats.any(0).all() and (stats[:n] if "preds" in case else stats).any(1).all())


def test_the_cases_that_matter_are_there():
    assert len(DRAWN) == 18 and sum(name.startswith("direct") for name in NAMES) == 3
    assert [name for name in NAMES if CASES[name]["raises"]] == [
        "plain_e2_h0"
    ]  # the published code cannot do this; nor do we try


@pytest.mark.parametrize("name", DRAWN)
def test_confusion_of_two_halves(name):
    case = CASES[name]
    half = len(case["preds"]) // 2
    halves = [
        confusion(case["preds"][part], case["labels"][part], *sizes(case), published=True)
        for part in (slice(half), slice(half, None))
    ]
    np.testing.assert_array_equal(sum(halves), case["stats"])


@pytest.mark.parametrize("name", DRAWN)
def test_by_default_pixels_of_extra_clusters_are_counted(name):
    case = CASES[name]
    n_pred, n_classes = sizes(case)
    inside = (case["preds"] >= 0) & (case["preds"] < n_pred)
    table = confusion(case["preds"][inside], case["labels"][inside], n_pred, n_classes).numpy()
    naive = np.zeros((n_pred, n_classes), np.int64)
    for pred, label in zip(case["preds"][inside], case["labels"][inside], strict=True):
        if 0 <= label < n_classes:
            naive[pred, label] += 1
    np.testing.assert_array_equal(table, naive)
    np.testing.assert_array_equal(table[:n_classes], case["stats"][:n_classes])  # elsewhere the two agree


@pytest.mark.parametrize("name", SCORED)
def test_published_accuracy_and_miou(name):
    case = CASES[name]
    found = scores(case["stats"], matching_of(case), published=True)
    np.testing.assert_allclose(found["miou"], case["mIoU_f64"], **PERCENT)
    np.testing.assert_allclose(found["accuracy"], case["Accuracy_f64"], **PERCENT)


@pytest.mark.parametrize("name", [name for name in SCORED if is_unique(CASES[name])])
def test_matching_histogram_and_iou_of_each_class(name):
    case = CASES[name]
    n_pred, n_classes = sizes(case)
    matching = matching_of(case)
    if case["hungarian"]:
        # The published map is off by one after a cluster without class; there the ideal one is stored.
        np.testing.assert_array_equal(matching, case.get("map_clusters_ideal", case["map_clusters"]))
        pairs = [(cluster, int(label)) for cluster, label in enumerate(matching) if label >= 0]
        if n_pred == n_classes:
            assert pairs == list(zip(case["assignments_rows"].tolist(), case["assignments_cols"].tolist(), strict=True))
    gathered = assigned(case["stats"], matching).numpy()
    if n_pred > n_classes:  # the published table has a last column too, of zeros
        np.testing.assert_array_equal(gathered, case["histogram"][:, :n_classes])
        assert not case["histogram"][:, n_classes].any()
    else:
        np.testing.assert_array_equal(gathered[:n_classes], case["histogram"])
    iou = scores(case["stats"], matching)["iou"]
    np.testing.assert_allclose(iou, 100 * case["iou_per_class"][:n_classes], **PERCENT)


@pytest.mark.parametrize("name", SCORED)
def test_by_default_no_class_is_not_a_class(name):
    """The mean is over the classes alone; the published code adds one of IoU 0 for clusters without a class."""
    case = CASES[name]
    found = scores(case["stats"], matching_of(case))
    occurring = [value for value in found["iou"] if not np.isnan(value)]
    assert len(found["iou"]) == case["n_classes"]
    np.testing.assert_allclose(found["miou"], np.mean(occurring) if occurring else np.nan)
    published = scores(case["stats"], matching_of(case), published=True)
    assert found["iou"] == pytest.approx(published["iou"], nan_ok=True) and found["accuracy"] == pytest.approx(
        published["accuracy"], nan_ok=True
    )
    if name.startswith("direct"):
        assert found["miou"] > published["miou"], "these cases have pixels in clusters without a class"


def test_nothing_labeled_gives_nan_as_published():
    case = CASES["all_ignored_e0_h1"]
    assert np.isnan(case["mIoU_f64"]) and case["stats"].sum() == 0
    found = scores(case["stats"], matching_of(case))
    assert np.isnan(found["miou"]) and np.isnan(found["accuracy"]) and np.isnan(found["iou"]).all()
