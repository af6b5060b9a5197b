"""Scores after a few labels: those of `evaluate`, and places as naive loops choose them; the stored rows."""

import numpy as np
import pandas as pd
import pytest
import torch
from common import ROOT, tiny_experiment

from stego_book.studies import few_labels
from stego_lib import Backbone, evaluate, open_dataset, train
from stego_lib.suggest import sample_places

RECORDS = ROOT / "book" / "records"
SCORES = ("accuracy", "miou", "border_f", "own_miou")


@pytest.fixture(scope="module")
def run(scenes_root, backbone_file, tmp_path_factory):
    experiment = tiny_experiment(scenes_root, backbone_file, steps=2, crf=False)
    return train(experiment, runs_dir=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def training(scenes_root):
    return open_dataset("scenes", scenes_root, "train")


def test_rows_are_scores_of_evaluate(run, training):
    rows = few_labels.measure(run, draw=3, images=(2, 5), clicks=(40,))
    rows = rows.set_index(["method", "labels", "count", "places"])
    assert run.taught is None and len(rows) == 1 + 6 + 6
    order = np.random.default_rng(3).permutation(12)
    for count, method in ((2, "neighbors"), (5, "logistic")):
        images, labels = zip(*(training[int(number)] for number in order[:count]), strict=True)
        run.teach(list(images), [np.where(label < 0, 255, label) for label in labels], method)
        scored = evaluate(run, baselines=False)["scores"]
        run.teach(None)
        for key, name in (((method, "images", count, ""), "taught"), (("clusters", "split", 6, ""), "cluster")):
            for score in SCORES:
                assert rows.loc[key, score] == pytest.approx(scored[name][score], abs=0.01), (key, score)
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
    chosen = few_labels.uncertain(run, training, places, points, start, 15)
    run.teach(training.images, places.iloc[start])
    two = run.taught.scores(points.T[None, :, :, None]).grid[0, :, :, 0].softmax(0).sort(dim=0).values[-2:]
    margins = {row: float(two[1, row] - two[0, row]) for row in range(len(places)) if row not in start}
    best = {}
    for row in sorted(margins, key=margins.__getitem__):
        best.setdefault(places["image"][row], row)
    run.teach(None)
    assert chosen.tolist() == [*start, *list(best.values())[:5]]


def test_features_of_training_images_are_read_from_the_store(run, training, monkeypatch):
    backbone, image = few_labels.stored(run), training.image(5)[None]
    views = torch.cat([image, image.flip(-1)])
    expected = run.backbone(views)
    monkeypatch.setattr(Backbone, "forward", lambda *_: pytest.fail("computed"))
    torch.testing.assert_close(backbone(views), expected, atol=2e-3, rtol=2e-3)


def test_the_rows_of_the_figures_and_tables_have_several_draws():
    recorded = few_labels.read(RECORDS)
    assert recorded.groupby(["dataset", "count"], observed=True)["draw"].nunique().min() >= 3
    counts = recorded[recorded["labels"] == "images"]["count"].cat.remove_unused_categories()
    assert list(counts.cat.categories) == ["none", "1", "5", "20", "all"]


def test_the_record_has_five_draws_of_each_row():
    rows = pd.read_csv(RECORDS / "studies" / "few_labels.csv", keep_default_na=False)
    about = ["dataset", "split", "on", "method", "labels", "places", "count"]
    assert set(rows.groupby(about)["draw"].agg(tuple)) == {(0, 1, 2, 3, 4)}
    assert not rows[list(SCORES)].isna().any(axis=None)
