"""The balance of the loss before training and the rule for shifts: against autograd, naive counting and naive loops."""

import pytest
import torch

from stego_lib import Experiment
from stego_lib.calibration import AUTO_SHIFTS, balance, calibrate, measure_correspondences, percentile

WEIGHTS, SHIFTS = (1.0, 0.5, 2.0), (0.1, -0.2, 0.3)


def test_counts_and_forces_are_those_of_a_loop():
    measured = {
        kind: torch.rand(50, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i, kind in enumerate("abc")
    }
    found = balance(measured, SHIFTS, WEIGHTS)
    assert list(found) == ["a", "b", "c"]
    for (kind, values), shift, weight in zip(measured.items(), SHIFTS, WEIGHTS, strict=True):
        attracting = sum(v > shift for v in values.tolist()) / 50
        pull = weight * sum(max(v - shift, 0) for v in values.tolist()) / 50
        push = weight * sum(max(shift - v, 0) for v in values.tolist()) / 50
        expected = {"shift": shift, "attracting": attracting, "pull": pull, "push": push, "net": pull - push}
        assert found[kind] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("percent", [0, 17, 50, 99.5, 100])
def test_a_percentile_is_a_value_with_that_share_below(percent):
    values = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    found = percentile(values, percent)
    assert found in values.tolist()
    assert (values < found).float().mean().item() == pytest.approx(percent / 100, abs=1e-3)


class Store:
    """Features of a few images in memory: (N, C, h, w)."""

    def __init__(self, features):
        self.features = features

    def __len__(self):
        return len(self.features)

    def rows(self, index):
        return self.features[index]


@pytest.fixture
def measuring():
    generator = torch.Generator().manual_seed(5)
    store = Store(torch.randn(9, 6, 4, 5, generator=generator) + 1)
    neighbors = (torch.arange(9)[:, None] + torch.tensor([1, 2])) % 9
    experiment = Experiment(batch_size=3, points=4, neighbors=2)
    return store, neighbors, torch.zeros(1, 6, 1, 1), experiment


def test_auto_is_its_percentiles_by_brute_force(measuring):
    found = calibrate(*measuring)
    measured = measure_correspondences(*measuring)
    assert measuring[-1].shifts == "auto" and found["images"] == 9
    assert found["rule"] == AUTO_SHIFTS == ("p75", "p75", "p97")
    for shift, asked, share, values in zip(
        found["shifts"], AUTO_SHIFTS, found["attracting"], measured.values(), strict=True
    ):
        ordered = sorted(values.tolist())
        assert shift == ordered[round((len(ordered) - 1) * float(asked[1:]) / 100)]
        assert share == pytest.approx(sum(value > shift for value in ordered) / len(ordered))
        assert share == pytest.approx(1 - float(asked[1:]) / 100, abs=0.002)
        assert f"{asked}: {100 * share:.1f} %" in found["reason"]


def test_the_mean_is_subtracted_before(measuring):
    """So that a constant added to all features is not seen."""
    store, neighbors, _, experiment = measuring
    shifts = [
        calibrate(one, neighbors, one.features.mean((0, 2, 3)).view(1, -1, 1, 1), experiment)["shifts"]
        for one in (store, Store(store.features + 3))
    ]
    assert shifts[0] == pytest.approx(shifts[1], abs=1e-5)
    assert shifts[0] != pytest.approx(calibrate(*measuring)["shifts"], abs=0.01)


def test_numbers_are_kept_and_percentiles_looked_up(measuring):
    *others, experiment = measuring
    found = calibrate(*others, experiment.but(shifts=(0.25, "p50", -1)))
    assert found["shifts"][0] == 0.25 and found["shifts"][2] == -1
    assert found["attracting"][1:] == [pytest.approx(0.5, abs=0.01), 1]
    assert {"edges", "self", "knn", "rand", "reason"} <= set(found)
    widths = torch.tensor(found["edges"]).diff()
    assert (torch.tensor(found["self"]) * widths).sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("published", [False, True])
def test_the_negatives_are_those_that_the_loss_uses(published):
    """By default every image of a batch is a negative once; the published code repeats some and leaves out others."""
    angles = 2 ** torch.arange(8.0) / 128  # so that the difference of two angles tells which they are of
    features = torch.stack([angles.cos(), angles.sin()], 1)[:, :, None, None].expand(-1, -1, 2, 2)
    pairs = {round(torch.cos(angles[i] - angles[j]).item(), 5): (i, j) for i in range(8) for j in range(i)}
    repeated = 0
    for seed in range(6):
        experiment = Experiment(points=2, batch_size=8, seed=seed, official={"published": published})
        neighbors = torch.arange(8).roll(1)[:, None]
        measured = measure_correspondences(Store(features), neighbors, torch.zeros(1, 2, 1, 1), experiment)["rand"]
        used = [
            pairs[min(pairs, key=lambda value: abs(value - mean))] for mean in measured.view(8, -1).mean(1).tolist()
        ]
        counts = torch.bincount(torch.tensor(used).flatten(), minlength=8)
        repeated += int((counts != 2).any())
    assert (repeated > 0) == published, "each image is in two pairs of a cycle: with its negative, and as one"
