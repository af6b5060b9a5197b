"""The correspondence loss against the published code's numbers."""

import pytest
import torch
from common import golden_tensors
from torch.testing import assert_close

from stego_lib.loss import correspondence_loss, sample, stego_loss

G = golden_tensors("correlation_loss")
LOSS = dict(rtol=1e-4, atol=1e-6)
CONFIGURATIONS = [(centering, clamp, stabilize) for centering in (1, 0) for clamp in (1, 0) for stabilize in (0, 1)]
# The project's order is (self, knn, rand); the published names of the three are these.
PUBLISHED = {"self": "pos_intra", "knn": "pos_inter", "rand": "neg_inter"}
WEIGHTS = tuple(G[f"w_{name}_weight_f64"].item() for name in PUBLISHED.values())
SHIFTS = tuple(G[f"w_{name}_shift_f64"].item() for name in PUBLISHED.values())


def outputs(centering: int, clamp: int, stabilize: int) -> tuple[dict[str, torch.Tensor], dict[str, bool]]:
    """The golden outputs of one configuration, and the project's switches for it."""
    prefix = f"pw{centering}_zc{clamp}_st{stabilize}."
    found = {key.removeprefix(prefix): value for key, value in G.items() if key.startswith(prefix)}
    return found, dict(centering=bool(centering), zero_clamp=bool(clamp), stabilize=bool(stabilize))


def test_weights_and_shifts_are_read_in_the_order_self_knn_rand():
    assert WEIGHTS == pytest.approx((1, 0.577453483136995, 0.9058762625226623))
    assert SHIFTS == pytest.approx((0.45828472207, 0.1754346515479633, 0.31361241889448443))


def test_sample_equals_the_published_lookup():
    assert_close(sample(G["feats"], G["coords1"]), G["sampled_feats_coords1"], **LOSS)
    assert_close(sample(G["code"], G["coords2"]), G["sampled_code_coords2"], **LOSS)


def test_sample_of_a_map_that_is_not_square_with_points_outside():
    assert G["nonsquare_coords"].abs().max() > 1, "the case is meant to reach over the border"
    assert_close(sample(G["nonsquare_map"], G["nonsquare_coords"]), G["nonsquare_sampled"], **LOSS)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_stego_loss_parts_total_and_gradients(configuration):
    expected, switches = outputs(*configuration)
    code, code_knn = (G[key].clone().requires_grad_() for key in ("code", "code_pos"))
    total, parts = stego_loss(
        G["feats"], G["feats_pos"], code, code_knn, G["coords1"], G["coords2"], G["perms"], WEIGHTS, SHIFTS, **switches
    )
    total.backward()
    assert_close(total.detach(), expected["total"], **LOSS)
    for kind, name in PUBLISHED.items():
        assert_close(parts[f"loss_{kind}"], expected[f"{name}_loss"], **LOSS)
        assert_close(parts[f"code_{kind}"], G[f"{name}_cd_mean"], **LOSS)
    assert_close(code.grad, expected["grad_code"], rtol=1e-4, atol=1e-8)
    assert_close(code_knn.grad, expected["grad_code_pos"], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_correspondence_loss_of_every_pair_of_points(configuration):
    expected, switches = outputs(*configuration)
    f, c = sample(G["feats"], G["coords1"]), sample(G["code"], G["coords1"])
    partners = {
        "self": [(f, c)],
        "knn": [(sample(G["feats_pos"], G["coords2"]), sample(G["code_pos"], G["coords2"]))],
        "rand": [(sample(G["feats"][p], G["coords2"]), sample(G["code"][p], G["coords2"])) for p in G["perms"]],
    }
    for (kind, pairs), shift in zip(partners.items(), SHIFTS, strict=True):
        losses, codes = zip(*[correspondence_loss(f, f2, c, c2, shift, **switches) for f2, c2 in pairs], strict=True)
        losses, codes = (
            torch.cat(losses),
            torch.cat(codes),
        )  # the published code joins the negatives permutation by permutation
        assert_close(codes, G[f"{PUBLISHED[kind]}_cd"], **LOSS)
        assert_close(losses.mean(), expected[f"{PUBLISHED[kind]}_loss"], **LOSS)
        if kind == "rand":
            assert_close(losses, expected["neg_inter_loss_full"], **LOSS)
