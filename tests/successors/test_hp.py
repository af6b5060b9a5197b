"""HP's terms against loops over single pairs, and its settings."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from stego_book import overview
from stego_book.studies import successors
from stego_book.studies.results import published_results
from stego_lib import Experiment, StegoError, train
from stego_lib.datasets import DATASETS, check, prepare
from stego_lib.experiment import DEFAULT_PRESET, PRESETS
from stego_lib.model import SegmentationHead
from stego_lib.networks import checkpoint
from stego_lib.successors import hp
from stego_lib.successors.base import unit_patches

COUNT, GRID = 2, (3, 4)
CELLS = GRID[0] * GRID[1]


def random_numbers(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def batch() -> dict:
    """Arguments of `hp_loss` for two small images."""
    generator = random_numbers()
    feats, code_ema, z, z_local = (torch.randn(COUNT, 5, *GRID, generator=generator) for _ in range(4))
    pools = tuple(F.normalize(torch.randn(size, 5, generator=generator), dim=1) for size in (30, 4))
    return dict(
        feats=feats,
        code_ema=code_ema,
        z=unit_patches(z).requires_grad_(),
        z_local=unit_patches(z_local).requires_grad_(),
        pools=pools,
        negatives=torch.rand(CELLS, COUNT * CELLS, generator=generator) < 0.2,
        lam=0.4,
        tau=0.5,
    )


def pair_by_pair(
    z: Tensor, feats: Tensor, code_ema: Tensor, pools: tuple, negatives: Tensor, lam: float, tau: float
) -> Tensor:
    """The loss of each image with one kind of code."""
    losses, left_out = [], 0

    def positives(maps: Tensor, pool: Tensor, i: int) -> list[int]:
        patches = unit_patches(maps)
        limits = [max(float(q @ patch) for q in pool) for patch in patches]
        cosines = [float(patches[i] @ patch) for patch in patches]
        return [j for j in range(len(patches)) if j != i and (cosines[j] > limits[i] or cosines[j] > limits[j])]

    for image in range(COUNT):
        terms, counts = [], []
        for i in range(image * CELLS, (image + 1) * CELLS):
            alike, alike_ema = positives(feats, pools[0], i), positives(code_ema, pools[1], i)
            if not alike:
                left_out += bool(alike_ema)
                continue
            softmax = set(alike) | {j for j in range(len(z)) if negatives[i % CELLS, j] and j != i}
            log_sum = torch.stack([(z[i] @ z[k] / tau).exp() for k in softmax]).sum().log()
            weights = {j: (j in alike) + lam * (j in alike_ema) for j in {*alike, *alike_ema}}
            counts.append(sum(weights.values()))
            terms.append(sum(w * (log_sum - z[i] @ z[j] / tau) for j, w in weights.items()) / counts[-1])
        mean = sum(counts) / len(counts)
        losses.append(tau / 0.07 * sum(c / mean * t for c, t in zip(counts, terms, strict=True)) / len(terms))
    assert left_out, "some anchors are meant to have positives of the averaged head alone"
    return torch.stack(losses)


@pytest.mark.parametrize("lam", [0.0, 0.4])
def test_loss_and_gradient_equal_those_of_a_loop(batch, lam):
    batch["lam"] = lam
    leaves = [batch["z"], batch["z_local"]]
    loss, parts = hp.hp_loss(**batch)
    others = {name: value for name, value in batch.items() if not name.startswith("z")}
    expected = [pair_by_pair(z, **others) for z in leaves]
    assert_close(parts["loss_global"], expected[0].detach())
    assert_close(parts["loss_local"], expected[1].detach())
    total = sum(expected).mean() / 2
    assert_close(loss, total)
    assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(total, leaves))


def test_without_a_positive_the_loss_is_zero_and_so_is_its_gradient(batch):
    batch["pools"] = unit_patches(batch["feats"]), unit_patches(batch["code_ema"])  # each patch is in the pool itself
    loss = hp.hp_loss(**batch)[0]
    loss.backward()
    assert loss == 0 and batch["z"].grad.abs().max() == 0


def test_a_pool_holds_one_patch_of_each_image():
    feats, head = torch.randn(6, 5, *GRID, generator=random_numbers()), SegmentationHead(5, 3).eval()
    pool, code_pool = hp.reference_pools(feats, head, random_numbers(1))
    chosen = (pool @ unit_patches(feats).T).argmax(1)
    assert (chosen // CELLS).tolist() == list(range(6)) and len(set((chosen % CELLS).tolist())) > 1
    assert_close(pool, unit_patches(feats)[chosen])
    assert_close(code_pool, unit_patches(head(feats).detach())[chosen])


@pytest.mark.parametrize("sigma", [None, 5.0])
def test_local_mix_equals_that_of_a_loop(sigma):
    attention = torch.randn(3, CELLS + 1, CELLS + 1, generator=random_numbers()).softmax(2)
    code = torch.randn(1, 5, *GRID, generator=random_numbers())
    mixed = hp.local_mix(code, hp.attention_weights(attention, GRID, sigma)[None], torch.arange(CELLS)[None])
    for p in range(CELLS):
        row = attention[:, 1 + p, 1:].mean(0)
        row = row.clamp(row.quantile(0.1), row.quantile(0.9)).softmax(0) * (CELLS / 28 if sigma is None else sigma)
        y, x = divmod(p, GRID[1])
        around = [
            (a, b) for a in range(y - 1, y + 2) for b in range(x - 1, x + 2) if 0 <= a < GRID[0] and 0 <= b < GRID[1]
        ]
        shares = {(a, b): row[a * GRID[1] + b] for a, b in around if row[a * GRID[1] + b] >= row.mean()}
        expected = sum((share * code[0, :, a, b] for (a, b), share in shares.items()), torch.zeros(5)) / len(around)
        assert_close(mixed[0, :, p, 0], expected)


def test_tables_of_settings_hold_datasets_that_exist_and_those_of_training_hold_all():
    recipes = {recipe["dataset"] for recipe in PRESETS.values()}
    for table in (DEFAULT_PRESET, check.COUNTS, prepare.RECIPES, successors.STEPS, checkpoint.DATASET_NAMES.values()):
        assert set(table) <= set(DATASETS)
    assert set(published_results()["dataset"]) <= set(DATASETS)
    assert set(hp.SETTINGS) == recipes == set(overview.KINDS) == set(DATASETS)
    assert hp.SETTINGS["potsdam3"] == {"tau": 0.4, "rho": 1.0}


@pytest.mark.parametrize(
    "use",
    [
        lambda: train(Experiment.preset("scenes", method="hp")),
        lambda: successors.successors(Experiment.preset("cityscapes")),
        lambda: Experiment(dataset="potsdam").name,
    ],
    ids=["HP", "steps of the study", "recipe"],
)
def test_a_dataset_without_settings_is_an_error(use, monkeypatch):
    monkeypatch.delitem(hp.SETTINGS, "scenes")
    with pytest.raises(StegoError, match="unknown"):
        use()


def test_weight_of_the_averaged_head():
    weights = [hp.ema_weight(step, 100) for step in range(101)]
    assert weights[43] == 0 < weights[44] < 0.02 and weights[100] == 1
