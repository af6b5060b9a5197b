"""Probes fitted after the head: what they are fitted to, and that they find what is plain to see."""

import gc
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from stego_lib import probes
from stego_lib.baselines import sample_features
from stego_lib.model import Stego
from stego_lib.probes import fit_probes, kmeans, multinomial_regression, sample_codes


def blobs(centers: list[list[float]], each: int = 40, spread: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around centers, and which of them each belongs to."""
    labels = torch.arange(len(centers)).repeat_interleave(each)
    noise = torch.randn(len(labels), len(centers[0]), generator=torch.Generator().manual_seed(0))
    return torch.tensor(centers)[labels] + spread * noise, labels


def predicted(points: torch.Tensor, found: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (points @ found[0].T + found[1]).argmax(1)


THREE, TWO = [[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]], [[3.0, 1.0], [-1.0, 0.0]]


@pytest.mark.parametrize("centers", [THREE, TWO], ids=["three classes", "two classes"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("names", [[0, 1, 2], [4, 1, 3]], ids=str)
def test_regression_finds_the_classes_by_their_own_numbers_at_any_scale(centers, scale, names):
    """Classes that do not occur are never chosen, wherever a point lies."""
    points, which = blobs(centers)
    labels = torch.tensor(names)[which]
    found = multinomial_regression(scale * points, labels, 6)
    assert found[0].shape == (6, 2) and found[1].shape == (6,)
    assert torch.equal(predicted(scale * points, found), labels)
    anywhere = 10 * scale * torch.randn(500, 2, generator=torch.Generator().manual_seed(1))
    assert set(predicted(anywhere, found).tolist()) <= set(labels.tolist())


def test_points_without_a_label_change_nothing():
    points, labels = blobs(THREE)
    expected = multinomial_regression(points, labels, 3)
    misleading = torch.cat([points, points[:40] + 4]), torch.cat([labels, torch.full((40,), -1)])
    for one, other in zip(multinomial_regression(*misleading, 3), expected, strict=True):
        assert torch.equal(one, other)


def test_a_single_class_is_always_chosen():
    points, labels = blobs([[1.0, 2.0]])
    assert predicted(10 * points, multinomial_regression(points, labels + 2, 4)).unique().tolist() == [2]


class Store:
    """Features (N, 3, 2, 4) in which every cell is told from every other, and labels of 8 x 16 pixels that say which cell."""

    def __init__(self, count: int, has_labels: bool = True):
        self.shape, self.has_labels = (count, 3, 2, 4), has_labels
        self.features = torch.rand(self.shape, generator=torch.Generator().manual_seed(0)) - 0.5
        cells = torch.arange(count * 8).view(count, 2, 4)
        self.labels = cells.repeat_interleave(4, 1).repeat_interleave(4, 2)

    def rows(self, index, device="cpu"):
        return self.features[index].to(device)

    def label_rows(self, index):
        return self.labels[index]


@pytest.fixture
def model() -> Stego:
    return Stego(3, 5, 6)


def every_code(model: Stego, store: Store) -> list[list[float]]:
    """Code of every cell, by the number that its label is."""
    with torch.no_grad():
        return model.eval()(store.features).movedim(1, -1).flatten(0, 2).tolist()


def test_few_images_give_every_cell_with_its_own_label(model):
    store = Store(37)
    codes, labels = sample_codes(model, store, 0)
    assert sorted(labels.tolist()) == list(range(37 * 8))
    torch.testing.assert_close(codes, torch.tensor(every_code(model, store))[labels])
    assert labels.tolist() != sorted(labels.tolist()), "in an order of chance"
    assert sample_codes(model, Store(37, has_labels=False), 0)[1] is None


@pytest.mark.parametrize(("samples", "images", "each"), [(74, 37, 2), (40, 37, 1), (20, 20, 1)])
def test_of_many_images_cells_are_drawn(model, monkeypatch, samples, images, each):
    """As many of each image, and of other images by another seed where there are more of them than samples."""
    monkeypatch.setattr(probes, "SAMPLES", samples)
    codes, labels = sample_codes(model, Store(37), 0)
    assert len(codes) == len(labels) == images * each
    assert set(Counter((labels // 8).tolist()).values()) == {each} and len((labels // 8).unique()) == images
    assert not torch.equal(labels, sample_codes(model, Store(37), 1)[1])


@pytest.mark.parametrize(
    "sample",
    [lambda model, store: sample_codes(model, store, 0), lambda _, store: sample_features(store, 0)],
    ids=["codes", "features"],
)
@pytest.mark.parametrize("has_labels", [True, False])
def test_sampling_keeps_no_more_tensors_for_more_images(model, sample, has_labels):
    """Of a batch nothing stays but what is copied into the result, whose room was taken before the first one.

    One small tensor kept of each, between large ones that go, made the process grow with the store: by 4 GB for one of 10 GB.
    How much it grows is up to the system; how many are kept is not.
    """
    alive = []

    class Counting(Store):
        def rows(self, index, device="cpu"):
            alive.append(sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()))
            return super().rows(index, device)

    gc.disable()  # what goes must go by itself
    gc.freeze()  # what was there before is not counted
    try:
        sample(model, Counting(32 * 9, has_labels))
    finally:
        gc.unfreeze()
        gc.enable()
    assert len(alive) in (9, 18) and len(set(alive[1:])) == 1, alive


def test_clusters_are_those_of_normalized_codes_with_and_without_the_linear_probe(model, monkeypatch):
    monkeypatch.setattr(probes, "RESTARTS", 2)
    store = Store(20)
    store.labels %= 6
    expected = kmeans(F.normalize(sample_codes(model, store, 3)[0], dim=1), 6, 3)
    before = model.linear_probe.classifier.weight.clone()
    fit_probes(model, store, 3, linear=False)
    torch.testing.assert_close(model.cluster_probe.clusters.detach(), expected)
    assert torch.equal(model.linear_probe.classifier.weight, before)
    model.cluster_probe.clusters.data.zero_()
    fit_probes(model, store, 3)
    torch.testing.assert_close(model.cluster_probe.clusters.detach(), expected)
    assert not torch.equal(model.linear_probe.classifier.weight, before)


def test_regression_ends_at_the_optimum_also_where_the_way_is_long():
    """Channels that mostly say the same, as features do; the optimum from an optimizer of another library."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(2000, 1, generator=generator)
    points = 5 + common + 0.1 * torch.randn(2000, 20, generator=generator) * torch.logspace(0, -2, 20)
    truth = 100 * torch.randn(20, 4, generator=generator)
    labels = torch.distributions.Categorical(logits=(points - points.mean(0)) @ truth).sample()
    weight, bias = multinomial_regression(points, labels, 4)

    scaled = ((points - points.mean(0)) / points.std(0)).double()
    free = torch.zeros(21, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=3000, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(scaled @ free[:-1] + free[-1], labels) + free[:-1].square().sum() / 2 / len(points)
        value.backward()
        return value

    optimizer.step(loss)
    reached = F.cross_entropy(points @ weight.T + bias, labels)
    best = F.cross_entropy(scaled @ free[:-1] + free[-1], labels)
    assert abs(reached.item() - best.item()) < 0.002
