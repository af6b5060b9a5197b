"""Criteria for the number of clusters, on codes whose number of groups is known."""

import pytest
import torch
import torch.nn.functional as F

from stego_book.studies.cluster_counts import CRITERIA, choices, chosen_counts, criteria, linkages, losses
from stego_lib import StegoError


def test_every_criterion_finds_groups_that_are_far_apart():
    """Six groups of unit codes: a wrong choice on codes of STEGO is no mistake of ours."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.eye(6, 12)[torch.arange(6).repeat(200)]
    codes = F.normalize(centers + 0.05 * torch.randn(1200, 12, generator=generator), dim=1)
    images, counts = torch.arange(1200) // 30, (4, 5, 6, 8, 12)
    values = criteria(codes, images, counts)
    assert choices({"criteria": values, "counts": counts}) == dict.fromkeys(CRITERIA, 6)
    assert values == criteria(codes, images, counts), "seeded"
    with pytest.raises(StegoError, match="counts"):
        criteria(codes, images, (1, 4))


def test_the_tables_say_what_was_chosen_and_what_it_lost():
    """By hand: of counts 4, 6, 8 with mIoU 10, 30, 20 and 10, 20, 30."""

    rising = {name: [1, 2, 3] if way == "max" else [3, 2, 1] for name, way in CRITERIA.items()}
    records = [
        {
            "experiment": {"dataset": "d", "seed": seed},
            "classes": 6,
            "counts": [4, 6, 8],
            "miou": miou,
            "criteria": rising,
        }
        for seed, miou in enumerate(([10, 30, 20], [10, 20, 30]))
    ]
    chosen = chosen_counts(records)
    assert chosen.loc["best mIoU"].tolist() == [6, 8] and (chosen.loc[list(CRITERIA)] == 8).all(axis=None)
    lost = losses(records)
    assert lost.loc["silhouette"].tolist() == [10, 0, 5] and lost.loc["number of classes"].tolist() == [0, 10, 5]
    assert [name for name in lost.index if name.startswith("always")] == ["always 6"]
    records[0]["classes"] = 27
    untried = losses(records).loc["number of classes"]
    assert untried.isna().tolist() == [True, False, True] and untried.iloc[1] == 10, "no loss is known, nor a mean"


def test_every_linkage_joins_the_clusters_of_groups_that_are_far_apart():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(torch.tensor([40, 60, 80, 120]))
    codes = F.normalize(torch.eye(4, 8)[labels] + 0.05 * torch.randn(300, 8, generator=generator), dim=1)
    table = linkages((codes, labels), (codes[::2], labels[::2]), 4, n_clusters=20, counts=(1, 4, 10))
    assert len(table) == 12 and (table[table["branches"] >= 4]["miou"] == 100).all()
    alone = table[table["branches"] == 1]
    assert alone["accuracy"].tolist() == pytest.approx([40] * 4), "all have the name of the largest group"
    assert alone["miou"].tolist() == pytest.approx([10] * 4)
