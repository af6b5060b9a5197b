"""Criteria for the number of clusters, on codes whose number of groups is known."""

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from stego_book.studies.cluster_counts import CRITERIA, chosen_counts, criteria, linkages
from stego_lib import StegoError


def test_every_criterion_finds_groups_that_are_far_apart():
    """Six groups of unit codes: a wrong choice on codes of STEGO is no mistake of ours."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.eye(6, 12)[torch.arange(6).repeat(200)]
    codes = F.normalize(centers + 0.05 * torch.randn(1200, 12, generator=generator), dim=1)
    images, counts = torch.arange(1200) // 30, (4, 5, 6, 8, 12)
    values = criteria(codes, images, counts)
    table = pd.concat({"a": pd.DataFrame(values, counts).assign(classes=6, miou=1)}, names=["record", "clusters"])
    assert chosen_counts(table).loc[[*CRITERIA], "a"].tolist() == [6] * len(CRITERIA)
    assert values == criteria(codes, images, counts), "seeded"
    with pytest.raises(StegoError, match="counts"):
        criteria(codes, images, (1, 4))


def test_every_linkage_joins_the_clusters_of_groups_that_are_far_apart():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(torch.tensor([40, 60, 80, 120]))
    codes = F.normalize(torch.eye(4, 8)[labels] + 0.05 * torch.randn(300, 8, generator=generator), dim=1)
    table = linkages((codes, labels), (codes[::2], labels[::2]), 4, n_clusters=20, counts=(1, 4, 10))
    assert len(table) == 12 and (table[table["branches"] >= 4]["miou"] == 100).all()
    alone = table[table["branches"] == 1]
    assert alone["accuracy"].tolist() == pytest.approx([40] * 4), "all have the name of the largest group"
    assert alone["miou"].tolist() == pytest.approx([10] * 4)
