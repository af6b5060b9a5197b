"""Terms of SmooSeg, HP and CAUSE beside the golden numbers: made-up labels, schedule, no positive pair."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stego_lib.successors import cause, hp, smooseg
from stego_lib.successors.base import unit_patches


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_labels_that_follow_the_features_have_the_lowest_loss():
    feats = F.one_hot(torch.tensor([[0, 0, 1, 1]]), 2).mT[..., None].double()
    losses = []
    for labels in ([0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]):
        probs = F.one_hot(torch.tensor([labels]), 2).mT[..., None].double()
        moments = smooseg.moments(feats, probs)
        losses.append(smooseg.smoothness_loss(moments, moments, 0.2)[0].item())
    # Centered correspondences are 1 and 0: half of the pairs have (0 - 0.2) * 1, or a quarter 0.8 and a quarter -0.2.
    assert losses == pytest.approx([-0.1, 0.0, 0.15])


def test_hp_without_a_positive_is_zero_and_so_is_its_gradient():
    feats, code_ema, z, z_local = (rand(2, 5, 3, 4, seed=seed) for seed in range(4))
    z, z_local = unit_patches(z).requires_grad_(), unit_patches(z_local).requires_grad_()
    pools = unit_patches(feats), unit_patches(code_ema)  # each patch is in the pool itself
    loss = hp.hp_loss(feats, code_ema, z, z_local, pools, rand(12, 24) > 0.8, 0.4, 0.5)[0]
    loss.backward()
    assert loss == 0 and z.grad.abs().max() == 0


def test_hp_averaged_head_counts_only_in_the_second_half():
    weights = [hp.ema_weight(step, 100) for step in range(101)]
    assert weights[43] == 0 < weights[44] < 0.02 and weights[100] == 1


def test_cause_without_a_positive_pair_is_zero_and_so_is_its_gradient():
    student, bank = rand(1, 4, 1, 2).requires_grad_(), (torch.empty(0, 4).double(), torch.empty(0, dtype=torch.long))
    pairs = cause.concept_pairs(torch.eye(3))
    loss = cause.contrastive_loss(student, rand(1, 4, 1, 2, seed=1), torch.tensor([0, 1]), pairs, bank)
    loss.backward()
    assert loss == 0 and student.grad.abs().max() == 0
