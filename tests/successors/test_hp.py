"""HP's terms against loops over single numbers, and what must not change them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from stego_lib import StegoError
from stego_lib.model import SegmentationHead
from stego_lib.successors import hp

COUNT, GRID = 2, (3, 4)
CELLS = GRID[0] * GRID[1]


def random_numbers(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(seed: int = 0) -> dict:
    """Arguments of `hp_loss` for two small images."""
    generator = random_numbers(seed)
    feats, code_ema, z, z_local = (torch.randn(COUNT, 5, *GRID, generator=generator) for _ in range(4))
    pools = tuple(F.normalize(torch.randn(size, 5, generator=generator), dim=1) for size in (30, 4))
    negatives = hp.random_negatives(CELLS, COUNT * CELLS, 0.2, generator)
    z, z_local = hp.unit_patches(z), hp.unit_patches(z_local)
    return dict(
        feats=feats, code_ema=code_ema, z=z, z_local=z_local, pools=pools, negatives=negatives, lam=0.4, tau=0.5
    )


def one_by_one(
    feats: Tensor, code_ema: Tensor, z: Tensor, pools: tuple, negatives: Tensor, lam: float, tau: float, reweight: bool
) -> Tensor:
    """The loss of each image with one kind of code, pair by pair."""
    total, losses, left_out = COUNT * CELLS, [], 0

    def positive(maps: Tensor, pool: Tensor, i: int, j: int) -> bool:
        a, b = (F.normalize(maps[n // CELLS, :, n % CELLS // GRID[1], n % GRID[1]], dim=0) for n in (i, j))
        return i != j and bool(a @ b > max(q @ a for q in pool) or a @ b > max(q @ b for q in pool))

    for image in range(COUNT):
        terms, counts = [], []
        for i in range(image * CELLS, (image + 1) * CELLS):
            alike = [j for j in range(total) if positive(feats, pools[0], i, j)]
            alike_ema = [j for j in range(total) if positive(code_ema, pools[1], i, j)]
            if not alike:
                left_out += bool(alike_ema)
                continue
            softmax = set(alike) | {j for j in range(total) if negatives[i % CELLS, j] and j != i}
            log_sum = torch.stack([(z[i] @ z[k] / tau).exp() for k in softmax]).sum().log()
            weights = {j: (j in alike) + lam * (j in alike_ema) for j in {*alike, *alike_ema}}
            term = sum(w * (log_sum - z[i] @ z[j] / tau) for j, w in weights.items()) / sum(weights.values())
            terms.append(term)
            counts.append(sum(weights.values()) if reweight else 1)
        mean = sum(counts) / len(counts)
        losses.append(tau / 0.07 * sum(c / mean * t for c, t in zip(counts, terms, strict=True)) / len(terms))
    assert left_out, "some anchors are meant to have positives of the averaged head alone"
    return torch.stack(losses)


@pytest.mark.parametrize("reweight", [True, False])
@pytest.mark.parametrize("lam", [0.0, 0.4])
def test_loss_and_gradient_equal_those_of_a_loop(lam, reweight):
    given = inputs() | {"lam": lam}
    leaves = [given[name].requires_grad_() for name in ("z", "z_local")]
    loss, parts = hp.hp_loss(**given, reweight=reweight)
    others = {name: given[name] for name in ("feats", "code_ema", "pools", "negatives", "lam", "tau")}
    expected = [one_by_one(**others, z=z, reweight=reweight) for z in leaves]
    assert_close(parts["loss_global"], expected[0].detach())
    assert_close(parts["loss_local"], expected[1].detach())
    total = sum(expected).mean() / 2
    assert_close(loss, total)
    for found, wanted in zip(
        torch.autograd.grad(3 * loss, leaves), torch.autograd.grad(3 * total, leaves), strict=True
    ):
        assert_close(found, wanted)


def test_anchors_of_an_image_do_not_mix_with_those_of_another():
    """The order of the images changes that of their losses alone."""
    given = inputs()
    swapped = given | {
        "feats": given["feats"].flip(0), "code_ema": given["code_ema"].flip(0), "negatives": given["negatives"].roll(CELLS, 1),
        "z": given["z"].roll(CELLS, 0), "z_local": given["z_local"].roll(CELLS, 0),
    }  # fmt: skip
    (loss, parts), (loss2, parts2) = hp.hp_loss(**given), hp.hp_loss(**swapped)
    assert_close(loss, loss2)
    assert_close(parts["loss_global"], parts2["loss_global"].flip(0))


def test_features_and_pools_of_another_length_change_nothing():
    given = inputs()
    longer = given | {"feats": 3 * given["feats"], "code_ema": 0.2 * given["code_ema"]}
    assert_close(hp.hp_loss(**given)[0], hp.hp_loss(**longer)[0])


def test_without_a_positive_the_loss_is_zero_and_so_is_its_gradient():
    given = inputs()
    given["pools"] = tuple(
        hp.unit_patches(given[name]) for name in ("feats", "code_ema")
    )  # each patch finds itself there
    given["z"].requires_grad_()
    loss = hp.hp_loss(**given)[0]
    loss.backward()
    assert loss == 0 and given["z"].grad.abs().max() == 0


def test_half_precision_features_move_the_loss_little():
    given = inputs()
    half = {name: given[name].bfloat16() for name in ("feats", "code_ema")} | {
        "pools": [pool.bfloat16() for pool in given["pools"]]
    }
    assert hp.hp_loss(**given | half)[0].item() == pytest.approx(hp.hp_loss(**given)[0].item(), rel=0.1)


def test_a_pool_holds_one_patch_of_each_image():
    feats = torch.randn(6, 5, *GRID, generator=random_numbers())
    head = SegmentationHead(5, 3).eval()
    of_features, of_codes = hp.reference_pools(feats, head, random_numbers(1))
    units, codes = hp.unit_patches(feats), hp.unit_patches(head(feats).detach())
    chosen = (of_features @ units.T).argmax(1)
    assert (chosen // CELLS).tolist() == list(range(6)) and len(set((chosen % CELLS).tolist())) > 1
    assert_close(of_features, units[chosen])
    assert_close(of_codes, codes[chosen])
    assert not of_codes.requires_grad


def test_share_of_random_negatives():
    assert hp.random_negatives(300, 400, 0.02, random_numbers()).double().mean().item() == pytest.approx(
        0.02, abs=0.002
    )
    assert hp.random_negatives(3, 4, 1.0, random_numbers()).all()


@pytest.mark.parametrize("sigma", [None, 5.0])
def test_attention_weights_equal_those_of_a_loop(sigma):
    attention = torch.randn(COUNT, 3, CELLS + 1, CELLS + 1, generator=random_numbers()).softmax(3)
    weights = hp.attention_weights(attention, GRID, sigma)
    for image in range(COUNT):
        for p in range(CELLS):
            row = attention[image, :, 1 + p, 1:].mean(0)
            row = row.clamp(row.quantile(0.1), row.quantile(0.9)).softmax(0) * (CELLS / 28 if sigma is None else sigma)
            y, x = divmod(p, GRID[1])
            around = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            inside = [0 <= a < GRID[0] and 0 <= b < GRID[1] for a, b in around]
            for k, (a, b) in enumerate(around):
                value = row[a * GRID[1] + b] if inside[k] else torch.zeros(())
                expected = value / sum(inside) if value >= row.mean() else torch.zeros(())
                assert_close(weights[image, k, y, x], expected, rtol=1e-4, atol=1e-7)


def test_attention_of_another_grid_is_refused():
    with pytest.raises(StegoError, match="12 tokens, fewer than the 4 x 4 patches"):
        hp.attention_weights(torch.rand(1, 1, 12, 12), (4, 4))


def test_mix_is_the_weighted_sum_of_neighbors():
    code, weights = torch.randn(COUNT, 5, *GRID), torch.rand(COUNT, 9, *GRID)
    mixed = hp.local_mix(code, weights)
    for y in range(GRID[0]):
        for x in range(GRID[1]):
            expected = torch.zeros(COUNT, 5)
            for k, (dy, dx) in enumerate((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
                if 0 <= y + dy < GRID[0] and 0 <= x + dx < GRID[1]:
                    expected += weights[:, k, y, x, None] * code[:, :, y + dy, x + dx]
            assert_close(mixed[:, :, y, x], expected)


def test_similarity_weights_of_a_flat_and_of_a_striped_map():
    """Equal neighbors share alike, so a flat code stays; opposite ones take nothing from each other."""
    flat = hp.similarity_weights(torch.ones(1, 5, *GRID))
    assert_close(hp.local_mix(torch.ones(1, 2, *GRID), flat), torch.ones(1, 2, *GRID))
    columns = torch.tensor([1.0, -1.0, 1.0, -1.0]).expand(1, 5, *GRID)
    assert_close(hp.similarity_weights(columns)[0, :, 1, 1], torch.tensor([0, 1, 0] * 3) / 9)
    assert_close(hp.similarity_weights(columns)[0, :, 0, 0], torch.tensor([0.0, 0, 0, 0, 1, 0, 0, 1, 0]) / 4)


def test_weight_of_the_averaged_heads_positives():
    assert [hp.ema_weight(step, 300, 100) for step in (0, 100, 200, 300)] == [0, 0, 0.5, 1]


def test_moving_average():
    average, student = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = average.weight.detach().clone()
    hp.update_ema(average, student, 0.75)
    assert_close(average.weight.detach(), 0.75 * before + 0.25 * student.weight.detach())


def test_consistency_is_the_mean_distance():
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    expected = sum(math.dist(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)) / 4
    assert hp.consistency_loss(a, b).item() == pytest.approx(expected, rel=1e-4)
