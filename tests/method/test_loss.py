"""The correspondence loss: a naive version beside it, and what its switches do."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from stego_lib.loss import StegoLoss, correspondence, correspondence_loss, negative_permutation, random_coords, sample

FEW = settings(max_examples=12, deadline=None)
CLOSE = dict(rtol=1e-4, atol=1e-5)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_cosine(a: list[float], b: list[float]) -> float:
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / length


def naive_loss(feats1, feats2, code1, code2, shift, centering, zero_clamp, stabilize):
    """Loop over every pair of points, as the paper writes it; returns the loss of each pair, (B, h, w, i, j)."""
    batch, _, height, width = feats1.shape
    _, _, height2, width2 = feats2.shape
    pairs = list(product(range(batch), range(height), range(width), range(height2), range(width2)))
    f = {p: naive_cosine(feats1[p[0], :, p[1], p[2]].tolist(), feats2[p[0], :, p[3], p[4]].tolist()) for p in pairs}
    s = {p: naive_cosine(code1[p[0], :, p[1], p[2]].tolist(), code2[p[0], :, p[3], p[4]].tolist()) for p in pairs}
    if centering:
        whole = sum(f.values()) / len(f)
        for place in {p[:3] for p in pairs}:
            mine = [p for p in pairs if p[:3] == place]
            mean = sum(f[p] for p in mine) / len(mine)
            for p in mine:
                f[p] = f[p] - mean + whole  # the mean of what is left is 0, so the batch's mean may be added at once
    result = torch.zeros(batch, height, width, height2, width2)
    for p in pairs:
        similar = max(s[p], 0.0) if zero_clamp else s[p]
        similar = min(similar, 0.8) if stabilize else similar
        result[p] = -similar * (f[p] - shift)
    return result


@FEW
@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 5), shift=st.floats(-1, 1), centering=st.booleans(),
    zero_clamp=st.booleans(),
    stabilize=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_correspondence_loss_equals_a_naive_loop(sizes, shift, centering, zero_clamp, stabilize, seed):
    batch, channels, dim, height, width = sizes
    feats1, feats2 = (
        rand(batch, channels + 1, height, width, seed=seed),
        rand(batch, channels + 1, height, width, seed=seed + 1),
    )
    code1, code2 = rand(batch, dim, height, width, seed=seed + 2), rand(batch, dim, height, width, seed=seed + 3)
    found, codes = correspondence_loss(
        feats1, feats2, code1, code2, shift, centering=centering, zero_clamp=zero_clamp, stabilize=stabilize
    )
    assert_close(found, naive_loss(feats1, feats2, code1, code2, shift, centering, zero_clamp, stabilize), **CLOSE)
    assert_close(codes, correspondence(code1, code2))


@FEW
@given(height=st.integers(2, 6), width=st.integers(2, 6), seed=st.integers(0, 100))
def test_sample_at_grid_points_returns_the_maps_values_transposed(height, width, seed):
    maps = rand(2, 3, height, width, seed=seed)
    side = max(height, width)
    # Cell (y, x) lies at x / (width - 1) of the way from -1 to 1; points beyond the map repeat its border.
    coords = torch.stack(
        [torch.tensor([[2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1] for x in range(side)]) for y in range(side)]
    ).expand(2, -1, -1, -1)  # coords[b, y, x] is cell (y, x)
    rows, columns = torch.arange(side).clamp(max=height - 1), torch.arange(side).clamp(max=width - 1)
    expected = maps[:, :, rows][:, :, :, columns].transpose(2, 3)
    assert_close(sample(maps, coords), expected, **CLOSE)


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(2, 40), seed=st.integers(0, 2**31))
def test_a_negative_permutation_moves_every_image_and_uses_each_once(batch, seed):
    partners = negative_permutation(batch, torch.Generator().manual_seed(seed))
    assert partners.dtype == torch.int64
    assert sorted(partners.tolist()) == list(range(batch))
    assert (partners != torch.arange(batch)).all()


def test_negative_permutations_differ_from_draw_to_draw_and_repeat_with_the_seed():
    generator = torch.Generator().manual_seed(0)
    drawn = {tuple(negative_permutation(4, generator).tolist()) for _ in range(200)}
    assert len(drawn) == 6, "there are six cycles of four images, and each should turn up"
    again = negative_permutation(4, torch.Generator().manual_seed(5))
    assert torch.equal(again, negative_permutation(4, torch.Generator().manual_seed(5)))


def test_random_coords_fill_the_square():
    coords = random_coords(20, 10, torch.Generator().manual_seed(0))
    assert coords.shape == (20, 10, 10, 2)
    assert -1 <= coords.min() < -0.95 and 0.95 < coords.max() <= 1 and coords.mean().abs() < 0.05
    assert torch.equal(coords, random_coords(20, 10, torch.Generator().manual_seed(0)))


def test_correspondence_is_a_cosine_and_a_feature_of_length_0_is_like_nothing():
    a, b = rand(2, 5, 3, 4), rand(2, 5, 2, 3, seed=1)
    expected = torch.cosine_similarity(a[..., None, None], b[:, :, None, None], dim=1)
    assert_close(correspondence(7 * a, 0.1 * b), expected, **CLOSE)
    assert not correspondence(torch.zeros(1, 5, 1, 1), b[:1]).isnan().any()


def test_no_gradient_flows_into_the_features():
    feats, feats_knn, code, code_knn = (rand(4, c, 5, 5, seed=i).requires_grad_() for i, c in enumerate((6, 6, 3, 3)))
    StegoLoss((1, 1, 1), (0.1, 0.1, 0.1), points=3, negatives=1)(feats, feats_knn, code, code_knn).backward()
    assert feats.grad is None and feats_knn.grad is None
    assert code.grad.abs().sum() > 0 and code_knn.grad.abs().sum() > 0


@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (4, 1, 4, 4), (4, 4, 3, 3)])
def test_the_loss_module_refuses_one_image_and_different_numbers_of_images(counts):
    feats, feats_knn, code, code_knn = (rand(n, c, 5, 5) for n, c in zip(counts, (6, 6, 3, 3), strict=True))
    with pytest.raises(ValueError, match="images"):
        StegoLoss((1, 1, 1), (0.1, 0.1, 0.1))(feats, feats_knn, code, code_knn)


@pytest.mark.parametrize("switches", [{}, {"centering": True, "stabilize": True}])
def test_the_loss_module_is_the_sum_of_its_pairs_at_the_points_it_draws(switches):
    feats, feats_knn, code, code_knn = (rand(4, channels, 5, 6, seed=channels) for channels in (9, 8, 3, 2))
    feats_knn, code_knn = feats_knn[:, :1].expand_as(feats) + feats.flip(0), code_knn[:, :1] + code.flip(0)
    weights, shifts = (1.0, 0.5, 2.0), (0.3, 0.2, 0.1)
    module = StegoLoss(weights, shifts, points=3, negatives=2, **switches)
    total = module(feats, feats_knn, code.requires_grad_(), code_knn, torch.Generator().manual_seed(5))

    generator = torch.Generator().manual_seed(5)
    first, second = random_coords(4, 3, generator), random_coords(4, 3, generator)
    partners = [negative_permutation(4, generator) for _ in range(2)]
    f, c = sample(feats, first), sample(code, first)
    others = [[(f, c)], [(sample(feats_knn, second), sample(code_knn, second))]]
    others.append([(sample(feats[rows], second), sample(code[rows], second)) for rows in partners])
    expected = sum(
        weight
        * torch.stack([correspondence_loss(f, f2, c, c2, shift, **switches)[0].mean() for f2, c2 in pairs]).mean()
        for weight, shift, pairs in zip(weights, shifts, others, strict=True)
    )
    assert_close(total, expected, **CLOSE)
    total.backward()
    assert code.grad.abs().sum() > 0 and set(module.parts) >= {"loss_self", "code_rand"}
    assert not torch.equal(module(feats, feats_knn, code, code_knn), module(feats, feats_knn, code, code_knn))
