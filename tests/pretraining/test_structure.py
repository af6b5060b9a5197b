"""What a network is given before it has seen an image: positions, and attention that looks alike."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from recipes import TINY
from torch.testing import assert_close

from stego_book.pretraining import build_network
from stego_book.pretraining.structure import POSITION, factors

RECIPE = replace(TINY, depth=2, img_size=48, structured=True)


@pytest.fixture(scope="module")
def pair():
    """The same draw of random weights, plain and structured."""
    made = []
    for recipe in (replace(RECIPE, structured=False), RECIPE):
        torch.manual_seed(4)
        made.append(build_network(recipe).eval())
    return made


def test_only_positions_and_attention_are_replaced(pair):
    plain, structured = (dict(vit.named_parameters()) for vit in pair)
    changed = {name for name in plain if not torch.equal(plain[name], structured[name])}
    attention = {f"blocks.{i}.attn.{part}.weight" for i in range(2) for part in ("qkv", "proj")}
    assert changed == attention | {"pos_embed"}
    assert all(parameter.requires_grad for parameter in structured.values())


def test_positions_are_waves_of_both_axes(pair):
    found = pair[1].pos_embed[0, 1:].unflatten(0, (6, 6)).double() / POSITION
    assert torch.equal(pair[1].pos_embed[0, 0], torch.zeros(192)), "the class token is nowhere"
    # A quarter of the channels is the sine, a quarter the cosine, of each axis, of ever longer waves.
    rates = 10_000.0 ** -(torch.arange(48, dtype=torch.float64) / 48)
    for row, column in ((0, 0), (2, 5), (5, 1)):
        (sine_y, sine_x), (cosine_y, cosine_x) = found[row, column].unflatten(0, (2, 2, 48))
        for at, sine, cosine in ((row, sine_y, cosine_y), (column, sine_x, cosine_x)):
            assert_close(sine, torch.sin(at * rates), atol=1e-5, rtol=0)
            assert_close(cosine, torch.cos(at * rates), atol=1e-5, rtol=0)


def test_factors_are_the_best_of_their_rank():
    matrix = torch.randn(12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, right = factors(matrix, 5)
    assert left.shape == (12, 5) and right.shape == (5, 12)
    rest = np.linalg.svd(matrix.numpy(), compute_uv=False)[5:]  # Eckart and Young: no five do better than this
    assert float((matrix - left @ right).square().sum()) == pytest.approx(float((rest**2).sum()))
    assert_close(left.norm(), right.norm())


def test_a_token_looks_at_what_is_like_it_and_passes_on_the_opposite(pair):
    """Of two groups of tokens, each gets most attention from its own, in every head; in the plain network hardly."""
    generator = torch.Generator().manual_seed(2)
    groups = torch.randn(2, 1, 192, generator=generator) + 0.3 * torch.randn(2, 8, 192, generator=generator)
    tokens = torch.nn.functional.layer_norm(groups.flatten(0, 1), (192,))
    own = torch.block_diag(torch.ones(8, 8), torch.ones(8, 8)).bool()
    shares = {}
    for name, vit in zip(("plain", "structured"), pair, strict=True):
        queries, keys, values = vit.blocks[0].attn.qkv(tokens).unflatten(-1, (3, 3, 64)).unbind(1)
        looks = torch.einsum("nhc,mhc->hnm", queries, keys).div(8).softmax(-1)
        shares[name] = (looks * own).sum(-1).mean(-1)
        passed = vit.blocks[0].attn.proj(values.flatten(1))
        alike = torch.nn.functional.cosine_similarity(passed, tokens, dim=-1)
        assert (alike < -0.4).all() if name == "structured" else (alike.abs() < 0.4).all()
    assert (shares["structured"] > 0.9).all() and (shares["plain"] < 0.7).all()


def test_the_same_seed_gives_the_same_structure(pair):
    torch.manual_seed(4)
    again = build_network(RECIPE)
    for one, other in zip(pair[1].parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
