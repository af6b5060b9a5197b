"""The CRF-inspired loss against the published code's numbers."""

import pytest
import torch
from common import golden_tensors
from torch.testing import assert_close

from stego_lib.official import CRF_POINTS, CRF_SIDE, crf_loss, image_crf_loss, random_pixels

G = golden_tensors("crf_loss")
LOSS = dict(rtol=1e-4, atol=1e-6)
NAMES = ("alpha", "beta", "gamma", "w1", "w2", "shift")


def options(case: str) -> dict[str, float]:
    return dict(zip(NAMES, G[f"{case}.params_alpha_beta_gamma_w1_w2_shift"].tolist(), strict=True))


@pytest.mark.parametrize("case", ["default", "wide"])
def test_every_pair_of_points_the_mean_and_its_gradient(case):
    codes = G["clusters"].clone().requires_grad_()
    found = crf_loss(G["guidance"], codes, G[f"{case}.coords"], **options(case))
    found.mean().backward()
    assert_close(found.detach(), G[f"{case}.out"], **LOSS)
    assert_close(found.detach().mean(), G[f"{case}.mean"], **LOSS)
    assert_close(codes.grad, G[f"{case}.grad_clusters"], rtol=1e-4, atol=1e-8)


def test_the_published_parameters_are_the_default():
    assert options("default") == pytest.approx(dict(zip(NAMES, (0.5, 0.15, 0.05, 10, 3, 0), strict=True)))
    found = crf_loss(G["guidance"], G["clusters"], G["default.coords"])
    assert_close(found, G["default.out"], **LOSS)
    assert not torch.allclose(found[:, :80, :80], G["wide.out"]), "the other case has parameters of its own"


def test_as_the_training_step_takes_it():
    code = G["train.code"].clone().requires_grad_()
    found = image_crf_loss(G["train.img"], code, G["train.coords"])
    found.backward()
    assert_close(found.detach(), G["train.mean"], **LOSS)
    assert_close(code.grad, G["train.grad_code"], rtol=1e-4, atol=1e-8)


def test_points_are_pixels_of_the_square_rows_first():
    points = random_pixels(CRF_POINTS, CRF_SIDE, torch.Generator().manual_seed(0))
    assert points.shape == (2, 1000) and points.dtype == torch.int64
    assert points.amin(1).tolist() == [0, 0] and points.amax(1).tolist() == [55, 55]
    assert not torch.equal(points[0], points[1])


def test_alike_colors_and_codes_near_by_are_rewarded_most():
    """The two kernels at distance 0 give 13, and a code is as like as can be to itself."""
    found = crf_loss(G["guidance"], G["clusters"], torch.tensor([[3, 3, 9], [4, 5, 15]]))
    assert_close(found[:, 0, 0], torch.full((2,), -13.0), **LOSS)
    assert (found[:, 0, 0] < found[:, 0, 1]).all() and found[:, 0, 2].abs().max() < 1e-6, "far apart: no pull at all"
