"""Scores of the studies of labels, sizes and segments: those of `evaluate` and `predict`; their stored rows."""

import numpy as np
import pandas as pd
import pytest
import torch
from common import ROOT, tiny_experiment

from stego_book.studies import few_labels, regularization, resolution
from stego_book.studies.segments import best_and_worst, image_accuracies, segments
from stego_lib import evaluate, open_dataset, train
from stego_lib.metrics import confusion, identity, scores
from stego_lib.suggest import sample_places
from stego_lib.teach import RULE_OF_CLICKS, RULE_OF_MAPS

pytestmark = pytest.mark.usefixtures("few_samples")

RECORDS = ROOT / "book" / "records" / "studies"
SCORES = ("accuracy", "miou", "border_f", "own_miou")


@pytest.fixture(scope="module")
def scored(scenes_root, backbone_file, tmp_path_factory):
    """A run with two spare clusters, its split and its record."""
    experiment = tiny_experiment(scenes_root, backbone_file, steps=2, extra_clusters=2, crf=True)
    run = train(experiment, runs_dir=tmp_path_factory.mktemp("runs"))
    return run, open_dataset("scenes", scenes_root, "val"), evaluate(run)


@pytest.fixture
def run(scored):
    return scored[0]


@pytest.fixture(scope="module")
def training(scenes_root):
    return open_dataset("scenes", scenes_root, "train")


def chosen(training, draw: int, numbers: slice) -> tuple[list, list]:
    """Images and label maps of some training images in the order of a draw."""
    order = np.random.default_rng(draw).permutation(12)[numbers]
    images, labels = zip(*(training[int(number)] for number in order), strict=True)
    return list(images), list(labels)


def as_maps(labels) -> list[np.ndarray]:
    return [np.where(label < 0, 255, label) for label in labels]


def test_scores_after_few_labels(run, training):
    rows = few_labels.measure(run, draw=3, images=(2, 5), clicks=(40,))
    rows = rows.set_index(["method", "labels", "count", "places"])
    assert run.taught is None and len(rows) == 1 + 6 + 6
    for count, method in ((2, "neighbors"), (5, "logistic")):
        images, labels = chosen(training, 3, slice(count))
        run.teach(images, as_maps(labels), method)
        recorded = evaluate(run, baselines=False)["scores"]
        run.teach(None)
        for key, name in (((method, "images", count, ""), "taught"), (("clusters", "split", 6, ""), "cluster")):
            for score in SCORES:
                assert rows.loc[key, score] == pytest.approx(recorded[name][score], abs=0.01), (key, score)
        key = ("clusters", "images", count, "")
        assert rows.loc[key, "accuracy"] <= rows.loc[("clusters", "split", 6, ""), "accuracy"]


def test_a_click_has_the_name_of_its_pixel(run, training):
    places, _ = sample_places(run, training.images)
    names = few_labels.names_at(training, places)
    for number in (0, 100, 700):
        image, x, y = places.loc[number]
        label = training.label([path.name for path in training.images].index(image))
        assert names[number] == training.classes.names[label[y, x]]


def test_uncertain_places_have_the_smallest_margins_of_their_images(run, training):
    places, points = sample_places(run, training.images)
    places["name"] = few_labels.names_at(training, places)
    start = np.arange(0, 700, 70)
    found = few_labels.uncertain(run, training, places, points, start, 15)
    run.teach(training.images, places.iloc[start])
    two = run.taught.scores(points.T[None, :, :, None]).grid[0, :, :, 0].softmax(0).sort(dim=0).values[-2:]
    run.teach(None)
    margins = {row: float(two[1, row] - two[0, row]) for row in range(len(places)) if row not in start}
    best = {}
    for row in sorted(margins, key=margins.__getitem__):
        best.setdefault(places["image"][row], row)
    assert found.tolist() == [*start, *list(best.values())[:5]]


def test_the_record_of_few_labels_has_five_draws_of_each_row():
    rows = pd.read_csv(RECORDS / "few_labels.csv", keep_default_na=False)
    about = ["dataset", "split", "on", "method", "labels", "places", "count"]
    assert set(rows.groupby(about)["draw"].agg(tuple)) == {(0, 1, 2, 3, 4)}
    assert not rows[list(SCORES)].isna().any(axis=None)


def test_the_rows_of_the_figures_and_tables_have_several_draws():
    recorded = few_labels.read(RECORDS.parent)
    assert recorded.groupby(["dataset", "count"], observed=True)["draw"].nunique().min() >= 3
    counts = recorded[recorded["labels"] == "images"]["count"].cat.remove_unused_categories()
    assert list(counts.cat.categories) == ["none", "1", "5", "20", "all"]


def test_scores_by_regularization(scenes_root, backbone_file, training, tmp_path):
    run = train(tiny_experiment(scenes_root, backbone_file, steps=2, mirror=False), runs_dir=tmp_path)
    rows = regularization.measure(run, 3, images=(2,), clicks=((4, 4), (6, 2)), n_scored=5)
    assert len(rows) == 4 * 3 + 3 + 4 * 3 and run.taught is None
    images, labels = chosen(training, 3, slice(5, 7))
    taught = run.teach(images, as_maps(labels))
    ids, n = torch.tensor([run.classes.names.index(name) for name in taught.names]), len(run.classes)
    pairs = zip(*chosen(training, 3, slice(5)), strict=True)
    counts = sum(confusion(ids[torch.from_numpy(run.predict(image)).long()], label, n, n) for image, label in pairs)
    row = rows[rows["labels"] == "images"].set_index(["observations", "balance"]).loc[RULE_OF_MAPS]
    for key in ("accuracy", "miou"):
        assert row[key] == pytest.approx(scores(counts, identity(n))[key], abs=0.2), key


def test_the_rules_of_regularization_have_the_highest_means_of_the_record():
    rows = pd.read_csv(RECORDS / "regularization.csv")
    about = ["dataset", "labels", "count", "images", "observations", "balance"]
    assert set(rows["dataset"]) == {"scenes", "camvid", "labelmefacade"} and not rows.duplicated([*about, "draw"]).any()
    for labels, (observations, balance) in (("images", RULE_OF_MAPS), ("clicks", RULE_OF_CLICKS)):
        means = rows[rows["labels"] == labels].groupby(about)["miou"].mean()
        by_rule = means.unstack(["observations", "balance"]).dropna()
        assert by_rule.mean().idxmax() == (str(observations), balance)


def test_scores_at_several_resolutions(scored, tmp_path):
    run, dataset, record = scored
    options = [dict(size=64, refine="none"), dict(refine="crf"), dict(tile=32, refine="none")]
    rows = resolution.measure(run, dataset, options)
    for row, method in zip(rows.itertuples(), ("cluster", "cluster_crf"), strict=False):
        for key in SCORES:
            assert getattr(row, key) == pytest.approx(record["scores"][method][key], abs=0.3), (method, key)
    assert rows["size"].tolist() == [64] * 3 and rows["tile"].dropna().tolist() == [32]
    assert (rows["seconds"] >= 0).all() and rows["images"].unique().tolist() == [6]
    rows.to_csv(tmp_path / "rows.csv", index=False)
    assert resolution.table(resolution.read(tmp_path / "rows.csv")) == resolution.table(rows)


def test_segments_of_all_images_give_the_scores_of_the_record(scored):
    """Counted image by image, as someone would who has nothing but the images."""
    run, dataset, record = scored
    found = segments(run, dataset, record, range(len(dataset)))
    names = {"k-means": "kmeans_features", "k-means + CRF": "kmeans_features_crf"}
    names |= {"STEGO": "cluster", "STEGO + CRF": "cluster_crf"}
    assert list(found) == ["image", "label", *names]
    label, classes = np.stack(found["label"]), len(dataset.classes)
    for name, method in names.items():
        ids = np.stack(found[name])
        accuracy = 100 * (ids == label)[label >= 0].mean()
        assert accuracy == pytest.approx(record["scores"][method]["accuracy"], abs=1e-4), name
        assert set(np.unique(ids)) - set(range(classes)) <= {classes, classes + 1}, "spare clusters are named too"
    accuracies = image_accuracies(run, dataset, record)
    pairs = zip(found["STEGO"], found["label"], strict=True)
    expected = [100 * (ids == label)[label >= 0].mean() for ids, label in pairs]
    np.testing.assert_allclose(accuracies, expected, atol=1e-3)


def test_the_best_come_first_and_the_worst_last_and_neighbors_count_once():
    assert best_and_worst(torch.tensor([5.0, 1.0, 9.0, 3.0, float("nan")]), 1) == [2, 1]
    assert best_and_worst(torch.tensor([5.0, 1.0, 9.0, 3.0]), 2) == [2, 0, 3, 1]
    film = torch.arange(60.0)  # no two chosen may be three or fewer apart
    assert best_and_worst(film, 2) == [59, 55, 4, 0]
    assert best_and_worst(torch.tensor([7.0]), 3) == [0]
