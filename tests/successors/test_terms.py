"""Terms of SmooSeg, HP and CAUSE beside the golden numbers: invariances, who learns from what, no positive pair."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from stego_lib.successors import cause, hp, smooseg
from stego_lib.successors.base import unit_patches


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def maps() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and probabilities of two images of 3 x 2 positions, and of partners of 2 x 4."""
    feats1, feats2 = rand(2, 5, 3, 2, seed=1), rand(2, 5, 2, 4, seed=2) + 0.5
    return feats1, feats2, rand(2, 4, 3, 2, seed=3).softmax(1), rand(2, 4, 2, 4, seed=4).softmax(1)


def smoothness(feats1: Tensor, feats2: Tensor, probs1: Tensor, probs2: Tensor, shift: float, centering: bool = True):
    images, partners = smooseg.moments(feats1, probs1), smooseg.moments(feats2, probs2)
    return smooseg.smoothness_loss(images, partners, shift, centering=centering)


def test_smoothness_ignores_order_of_positions_and_classes_and_length_of_features(maps):
    loss = smoothness(*maps, 0.3)
    assert_close(smoothness(*(values.flip(0, 3) for values in maps), 0.3), loss)
    assert_close(smoothness(3 * maps[0], 5 * maps[1], maps[2].flip(1), maps[3].flip(1), 0.3), loss)


def test_labels_that_follow_the_features_have_the_lowest_loss():
    feats = F.one_hot(torch.tensor([[0, 0, 1, 1]]), 2).mT[..., None].double()
    losses = []
    for labels in ([0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]):
        probs = F.one_hot(torch.tensor([labels]), 2).mT[..., None].double()
        losses.append(smoothness(feats, feats, probs, probs, 0.2)[0].item())
    # Centered correspondences are 1 and 0: half of the pairs have (0 - 0.2) * 1, or a quarter 0.8 and a quarter -0.2.
    assert losses == pytest.approx([-0.1, 0.0, 0.15])


def test_head_learns_from_smoothness_and_student_from_the_data_loss():
    feats, code, teacher, student = rand(3, 6, 4, 4), rand(3, 5, 4, 4, seed=1), rand(7, 5, seed=2), rand(7, 5, seed=3)
    leaves = [values.requires_grad_() for values in (feats, code, teacher, student)]
    partners = torch.tensor([1, 2, 0])
    loss, parts = smooseg.smooseg_loss(*leaves, partners, (0.1, 0.5))
    loss.backward()
    assert feats.grad is None and teacher.grad is None
    probs = (smooseg.logits(code, teacher.detach()) / smooseg.TEMPERATURE).softmax(1)
    smooth = smoothness(feats, feats, probs, probs, 0.1)[0]
    smooth = smooth + smoothness(feats, feats[partners], probs, probs[partners], 0.5)[0]
    assert_close(code.grad, torch.autograd.grad(smooth, code)[0])
    labels = smooseg.logits(code, teacher).argmax(1)
    probabilities = smooseg.logits(code.detach(), student).softmax(1)
    data = -probabilities.gather(1, labels[:, None]).log().mean()
    assert_close(parts["loss_data"], data.detach())
    assert_close(student.grad, torch.autograd.grad(data, student)[0])


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
