"""Every way to cluster finds blobs that lie far apart, and repeats; agreement against scikit-learn's definition and by hand."""

import pytest
import torch
import torch.nn.functional as F

from stego_book.studies.clusterers import WAYS, agreement, assign, cluster
from stego_lib import StegoError


def blobs(counts, dim: int = 12, noise: float = 0.05, seed: int = 0):
    """Unit vectors around random directions at right angles, and which each belongs to."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0][: len(counts)]
    truth = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    points = directions[truth] + noise * torch.randn(len(truth), dim, generator=generator)
    return F.normalize(points, dim=1), truth, directions


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("counts", [(150, 150, 150), (300, 120, 60, 40, 30)], ids=["alike", "of many sizes"])
def test_blobs_far_apart_are_found(way, counts):
    points, truth, directions = blobs(counts)
    found = cluster(points, len(counts), seed=0, way=way)
    assert found.shape == directions.shape and torch.allclose(found.norm(dim=1), torch.ones(len(counts)), atol=1e-5)
    labels = assign(points, found)
    assert len({(own, true) for own, true in zip(labels.tolist(), truth.tolist(), strict=True)}) == len(counts)
    assert (directions @ found.T).amax(1).min() > 0.99, "each direction of a blob is that of a cluster"


@pytest.mark.parametrize("way", WAYS)
def test_the_same_seed_gives_the_same_clusters_and_leaves_torchs_generator_alone(way):
    points, _, _ = blobs((60, 60, 60), noise=0.5)  # blurred, so that seeds matter
    state = torch.get_rng_state()
    assert torch.equal(cluster(points, 3, 4, way), cluster(points, 3, 4, way))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("way", WAYS)
def test_one_cluster_is_the_mean_direction(way):
    points, _, _ = blobs((40, 10))
    assert torch.allclose(cluster(points, 1, 0, way), F.normalize(points.mean(0), dim=0)[None], atol=1e-4)


def test_what_cannot_be_clustered_is_refused():
    points, _, _ = blobs((5, 5))
    with pytest.raises(StegoError, match=r"unknown way to cluster 'k-mean'; ways: k-means, "):
        cluster(points, 2, 0, "k-mean")
    for count in (0, 11):
        with pytest.raises(StegoError, match=rf"{count} clusters of 10 codes"):
            cluster(points, count, 0)


def test_agreement_is_one_for_clusters_in_another_order_and_near_zero_by_chance():
    points, _, directions = blobs((100, 80, 60))
    assert agreement(points, directions, 3 * directions[[2, 0, 1]]) == 1
    generator = torch.Generator().manual_seed(1)
    spread = F.normalize(torch.randn(4000, 12, generator=generator), dim=1)
    halves = torch.eye(12)[:1], torch.eye(12)[1:2]
    assert abs(agreement(spread, *(torch.cat([half, -half]) for half in halves))) < 0.01
    pairs = torch.combinations(torch.arange(60))  # by hand: pairs that are together, or apart, in both, less chance
    some, one, other = spread[:60], torch.eye(12)[:3], torch.eye(12)[1:5]
    a, b = (assign(some, directions)[pairs] for directions in (one, other))
    a, b = ((labels[:, 0] == labels[:, 1]).double() for labels in (a, b))
    both, chance, most = (a * b).sum(), a.sum() * b.sum() / len(pairs), (a.sum() + b.sum()) / 2
    assert agreement(some, one, other) == pytest.approx(((both - chance) / (most - chance)).item())
