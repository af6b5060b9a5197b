"""Probes fitted after the head: what they are fitted to, and that they find what is plain to see."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from stego_lib import probes
from stego_lib.baselines import kmeans_on_components, kmeans_on_features, linear_on_features, sample_features
from stego_lib.model import Stego
from stego_lib.probes import fit_probes, kmeans, labels_at, multinomial_regression, sample_codes


def blobs(centers: list[list[float]], each: int = 40, spread: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around centers, and which of them each belongs to."""
    labels = torch.arange(len(centers)).repeat_interleave(each)
    noise = torch.randn(len(labels), len(centers[0]), generator=torch.Generator().manual_seed(0))
    return torch.tensor(centers)[labels] + spread * noise, labels


def predicted(points: torch.Tensor, found: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (points @ found[0].T + found[1]).argmax(1)


THREE, TWO = [[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]], [[3.0, 1.0], [-1.0, 0.0]]


@pytest.mark.parametrize("centers", [THREE, TWO], ids=["three classes", "two classes"])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_regression_finds_the_classes_by_their_own_numbers_at_any_scale(centers, scale):
    """Classes that do not occur are never chosen, wherever a point lies."""
    points, which = blobs(centers)
    labels = torch.tensor([4, 1, 3])[which]
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


class Store:
    """Features (N, 3, 2, 4) that differ in every cell, and label maps of 8 x 16 pixels with the number of the cell."""

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


def test_labels_are_read_at_the_centers_of_cells():
    label = torch.arange(2 * 12 * 20).view(2, 12, 20)
    middle = [label[:, 4 * row + 2, 4 * column + 2] for row in range(3) for column in range(5)]
    assert torch.equal(labels_at(label, torch.arange(15), (3, 5)), torch.stack(middle, 1))


def test_the_kmeans_baseline_names_the_nearest_center(monkeypatch):
    monkeypatch.setattr(probes, "RESTARTS", 1)
    store = Store(37)
    scorer = kmeans_on_features(store, 5, 0)
    unit = F.normalize(store.features, dim=1)
    scores = scorer(unit).movedim(1, -1).flatten(0, 2)
    expected = kmeans(F.normalize(sample_features(store, 0)[0], dim=1), 5, 0)
    nearest = torch.cdist(unit.movedim(1, -1).flatten(0, 2), expected).argmin(1)
    assert torch.equal(scores.argmax(1), nearest)
    for fit in (kmeans_on_features, lambda *values: kmeans_on_components(values[0], 3, *values[1:])):
        first, second = (fit(store, 5, 0).weight for _ in range(2))
        assert torch.equal(first, second), "the same seed gives the same centers"


def test_the_linear_baseline_reads_the_label_of_each_cell():
    store = Store(20)
    store.n_classes = 6
    store.labels = store.features.argmax(1).repeat_interleave(4, 1).repeat_interleave(4, 2)
    scorer = linear_on_features(store, 0)
    predicted = scorer(F.normalize(store.features, dim=1)).argmax(1)
    assert (predicted == store.features.argmax(1)).float().mean() > 0.95
