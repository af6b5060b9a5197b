"""The balance of the loss before training: against autograd and naive counting."""

import pytest
import torch

from stego_lib.calibration import balance, percentile
from stego_lib.loss import correspondence, correspondence_loss

WEIGHTS, SHIFTS = (1.0, 0.5, 2.0), (0.1, -0.2, 0.3)


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 5, 3, 3, generator=generator) for _ in range(4)]


def test_the_net_force_is_the_slope_of_the_loss_at_equal_codes(maps):
    """Minus the derivative of the weighted mean loss when every code correspondence above zero rises alike."""
    f, g, code, _ = maps
    code = code.abs()  # so that all correspondences are above zero, and the clamp lets all through
    for weight, shift in zip(WEIGHTS, SHIFTS, strict=True):
        scale = torch.ones((), requires_grad=True)
        loss, codes = correspondence_loss(f, g, code, code, shift, centering=False)
        assert (codes > 0).all()
        weighted = weight * (loss / codes * (codes.detach() + scale)).mean()  # S + scale in the place of S
        (slope,) = torch.autograd.grad(weighted, scale)
        found = balance({"self": correspondence(f, g).flatten()}, (shift,), (weight,))["self"]
        assert found["net"] == pytest.approx(-slope.item(), abs=1e-6)


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
