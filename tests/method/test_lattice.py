"""The permutohedral lattice against sums over all pairs of points, and its own rules."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from stego_lib.lattice import Lattice, NormalizedLattice, corners


def points(count: int, dims: int, spread: float) -> np.ndarray:
    return np.random.default_rng(dims).normal(size=(count, dims)) * spread


@pytest.mark.parametrize("dims", [1, 2, 3, 5])
def test_corners_hold_their_point(dims):
    """Shares are not negative and sum to 1; the corners' mean by shares is the point; corners have different colors."""
    given = points(200, dims, 2.0)
    keys, shares = corners(given)
    assert keys.shape == (200, dims + 1, dims) and shares.shape == (200, dims + 1)
    assert shares.min() > -1e-5
    assert_allclose(shares.sum(1), 1, atol=1e-5)
    whole = np.concatenate([keys, -keys.sum(2, keepdims=True)], 2)
    assert (whole % (dims + 1) == np.arange(dims + 1)[None, :, None]).all(), "coordinates of corner k leave a rest of k"
    lifted = (shares[:, :, None] * whole).sum(1)
    distances = np.linalg.norm(given[:, None] - given, axis=2)
    scale = np.sqrt(2 / 3) * (dims + 1)
    lifted_distances = np.linalg.norm(lifted[:, None] - lifted, axis=2)
    assert_allclose(lifted_distances, scale * distances, atol=1e-3, err_msg="lifted with distortion")


@pytest.mark.parametrize(("dims", "spread"), [(2, 1.5), (3, 1.0), (5, 0.7)])
def test_it_is_close_to_the_gaussian_sum_over_all_pairs(dims, spread):
    given = points(300, dims, spread)
    values = np.random.default_rng(0).random((300, 4)).astype(np.float32)
    weights = np.exp(-((given[:, None] - given) ** 2).sum(2) / 2)
    means = weights @ values / weights.sum(1, keepdims=True)
    lattice = Lattice(given)
    filtered = lattice(values) / lattice(np.ones((300, 1), np.float32))
    errors = np.abs(filtered - means)
    assert errors.mean() < 0.02 and np.quantile(errors, 0.95) < 0.06  # points with few others are off by more
    assert np.corrcoef(filtered.ravel(), means.ravel())[0, 1] > 0.9


def test_far_points_do_not_meet_and_equal_ones_share_everything():
    given = np.array([[0.0, 0.0], [0.0, 0.0], [100.0, 0.0]])
    found = Lattice(given)(np.array([[1.0], [0.0], [0.0]], np.float32))
    assert found[0] == found[1] > 0 and found[2] == 0


def test_it_is_linear_and_columns_do_not_mix():
    given, rng = points(50, 3, 1.0), np.random.default_rng(1)
    first, second = rng.random((2, 50, 2)).astype(np.float32)
    lattice = NormalizedLattice(given)
    assert_allclose(lattice(first + 2 * second), lattice(first) + 2 * lattice(second), rtol=1e-4)
    assert_allclose(lattice(np.concatenate([first, second], 1))[:, :2], lattice(first), rtol=1e-5)


def test_normalization_makes_the_weights_of_a_point_and_its_norm_cancel():
    given = points(40, 2, 1.0)
    plain, ones = Lattice(given), np.ones((40, 1), np.float32)
    n = (plain(ones) + 1e-20) ** -0.5
    values = np.random.default_rng(2).random((40, 3)).astype(np.float32)
    assert_allclose(NormalizedLattice(given)(values), n * plain(n * values), rtol=1e-4)
