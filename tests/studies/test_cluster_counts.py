"""Criteria for the number of clusters, on codes whose number of groups is known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import tiny_experiment

from stego_book.studies import cluster_counts
from stego_book.studies.cluster_counts import CRITERIA, chosen_counts, criteria, losses, scored_counts, study
from stego_lib import StegoError, train


@pytest.fixture(scope="module")
def groups():
    """Unit codes in six groups, each as far from all others, of 40 images, and their groups."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.eye(6, 12)
    labels = torch.arange(6).repeat(200)
    codes = F.normalize(centers[labels] + 0.05 * torch.randn(1200, 12, generator=generator), dim=1)
    return codes, torch.arange(1200) // 30, labels


def test_every_criterion_finds_groups_that_are_far_apart(groups):
    """So that a wrong choice on codes of STEGO is no mistake of ours."""
    codes, images, _ = groups
    counts = (4, 5, 6, 8, 12)
    found = criteria(codes, images, counts)
    for name, way in CRITERIA.items():
        assert counts[int((np.argmax if way == "max" else np.argmin)(found[name]))] == 6, (name, found[name])
    assert found == criteria(codes, images, counts), "seeded"
    with pytest.raises(StegoError, match="counts"):
        criteria(codes, images, (1, 4))


def test_spare_clusters_are_errors_one_to_one_and_none_when_named(groups):
    codes, _, labels = groups
    found = scored_counts(codes, codes, labels, 6, (3, 6, 12))
    assert found["miou"][1] == found["miou_named"][1] == 100
    assert found["miou_named"][2] == 100 > found["miou"][2] + 20 and found["miou"][0] <= 50


def test_the_tables_say_what_was_chosen_and_what_it_lost():
    """By hand: of counts 4, 6, 8 with mIoU 10, 30, 20 and 10, 20, 30."""

    def one(seed, miou):
        rising = {name: [1, 2, 3] if way == "max" else [3, 2, 1] for name, way in CRITERIA.items()}
        return {
            "experiment": {"dataset": "d", "seed": seed},
            "classes": 6,
            "counts": [4, 6, 8],
            "miou": miou,
            "criteria": rising,
        }

    records = [one(0, [10, 30, 20]), one(1, [10, 20, 30])]
    chosen = chosen_counts(records)
    assert chosen.loc["best mIoU"].tolist() == [6, 8] and (chosen.loc[list(CRITERIA)] == 8).all(axis=None)
    lost = losses(records)
    assert lost.loc["silhouette"].tolist() == [10, 0, 5] and lost.loc["number of classes"].tolist() == [0, 10, 5]
    assert [name for name in lost.index if name.startswith("always")] == ["always 6"]


def test_a_study_of_a_run_has_every_number(scenes_root, backbone_file, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_counts, "POINTS", 300)
    run = train(tiny_experiment(scenes_root, backbone_file, steps=2), runs_dir=tmp_path)
    record = study(run, (3, 8))
    assert record["counts"] == [3, 8] and record["classes"] == 8 and record["points"] == 300
    assert all(len(values) == 2 for values in (record["miou"], record["miou_named"], *record["criteria"].values()))
    assert set(record["criteria"]) == set(CRITERIA)
