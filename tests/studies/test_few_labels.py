"""Scores after a few labels: those of `evaluate`, and places as naive loops choose them."""

import numpy as np
import pytest
import torch
from common import ROOT, tiny_experiment

from stego_book.plots import study as plots
from stego_book.studies import few_labels
from stego_lib import Backbone, evaluate, open_dataset, train
from stego_lib.suggest import sample_places

RECORD = ROOT / "book" / "records" / "studies" / "few_labels.csv"


@pytest.fixture(scope="module")
def run(scenes_root, backbone_file, tmp_path_factory):
    experiment = tiny_experiment(scenes_root, backbone_file, steps=2, crf=False)
    return train(experiment, runs_dir=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def training(scenes_root):
    return open_dataset("scenes", scenes_root, "train")


def test_rows_are_scores_of_evaluate(run, training):
    rows = few_labels.measure(run, draw=3, images=(2,), clicks=(40,)).set_index(["method", "labels", "places"])
    assert run.taught is None and len(rows) == 1 + 3 + 6
    order = np.random.default_rng(3).permutation(12)[:2]
    images, labels = zip(*(training[int(number)] for number in order), strict=True)
    run.teach(list(images), [np.where(label < 0, 255, label) for label in labels], "neighbors")
    scores = evaluate(run, baselines=False)["scores"]
    run.teach(None)
    for key, method in ((("neighbors", "images", ""), "taught"), (("clusters", "split", ""), "cluster")):
        for score in ("accuracy", "miou"):
            assert rows.loc[key, score] == pytest.approx(scores[method][score], abs=0.2), key
    assert rows.loc[("clusters", "images", ""), "accuracy"] <= rows.loc[("clusters", "split", ""), "accuracy"]


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
    expected = run.backbone(image)
    monkeypatch.setattr(Backbone, "forward", lambda *_: pytest.fail("computed"))
    torch.testing.assert_close(backbone(image), expected, atol=2e-3, rtol=2e-3)


def test_the_figures_show_the_record():
    folder = ROOT / "book" / "records"
    recorded = few_labels.read(RECORD, {"scenes": folder / "scenes", "camvid": folder / "camvid_photos_d6"})
    assert recorded.groupby(["dataset", "count"])["draw"].nunique().min() >= 5
    for labels, hue in (("images", "method"), ("clicks", "places")):
        figure = plots.few_labels(recorded[recorded["labels"] == labels], hue)
        assert len(figure.axes) == 2 * recorded["dataset"].nunique()
