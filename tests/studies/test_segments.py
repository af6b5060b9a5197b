"""Segments of chosen images by every method, and the choice of the best and the worst."""

import numpy as np
import pytest
import torch
from common import tiny_experiment

from stego_book.studies.segments import best_and_worst, image_accuracies, segments
from stego_lib import evaluate, open_dataset, train


@pytest.fixture(scope="module")
def scored(scenes_root, backbone_file, tmp_path_factory):
    """A run with two spare clusters, its split and its record."""
    experiment = tiny_experiment(scenes_root, backbone_file, steps=2, extra_clusters=2, crf=True)
    run = train(experiment, runs_dir=tmp_path_factory.mktemp("runs"))
    return run, open_dataset("scenes", scenes_root, "val"), evaluate(run)


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
        assert ids.max() < len(run.segments), "spare clusters are named too"
        assert set(np.unique(ids)) - set(range(classes)) <= {classes, classes + 1}


def test_accuracies_of_images_average_to_the_record(scored):
    run, dataset, record = scored
    accuracies = image_accuracies(run, dataset, record)
    table = segments(run, dataset, record, [1])
    ids, label = table["STEGO"][0], table["label"][0]
    assert accuracies[1] == pytest.approx(100 * (ids == label)[label >= 0].mean(), abs=1e-3)
    assert len(accuracies) == len(dataset)
    assert accuracies.mean() == pytest.approx(record["scores"]["cluster"]["accuracy"], abs=0.5)


def test_the_best_come_first_and_the_worst_last_and_neighbors_count_once():
    assert best_and_worst(torch.tensor([5.0, 1.0, 9.0, 3.0, float("nan")]), 1) == [2, 1]
    assert best_and_worst(torch.tensor([5.0, 1.0, 9.0, 3.0]), 2) == [2, 0, 3, 1]
    film = torch.arange(60.0)  # no two chosen may be three or fewer apart
    assert best_and_worst(film, 2) == [59, 55, 4, 0]
    assert best_and_worst(torch.tensor([7.0]), 3) == [0]
