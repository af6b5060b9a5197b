"""SmooSeg's loss against naive loops, and what must not change it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from stego_lib.successors import smooseg


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


def pair_by_pair(maps: tuple[Tensor, ...], shift: float, centering: bool) -> tuple[Tensor, Tensor]:
    """The smoothness loss and the mean distance, pair by pair."""
    rows, far = [], []
    for feats1, feats2, probs1, probs2 in zip(*(values.flatten(2).mT for values in maps), strict=True):
        for p, q in itertools.product(range(len(feats1)), range(len(feats2))):
            rows.append(F.cosine_similarity(feats1[p], feats2[q], dim=0))
            far.append(1 - F.cosine_similarity(probs1[p], probs2[q], dim=0))
    similar, distances = torch.stack(rows).view(-1, len(feats2)), torch.stack(far).view(-1, len(feats2))
    if centering:
        similar = torch.stack([row - row.mean() for row in similar]) + similar.mean()
    return ((similar - shift) * distances).mean(), distances.mean()


@pytest.mark.parametrize("centering", [True, False])
@pytest.mark.parametrize("shift", [-0.02, 0.5])
def test_smoothness_is_the_mean_over_all_pairs(maps, shift, centering):
    probs = [values.requires_grad_() for values in maps[2:]]
    (loss, distance), (expected, far) = smoothness(*maps, shift, centering), pair_by_pair(maps, shift, centering)
    assert_close(loss, expected)
    assert_close(distance, far.detach())
    assert_close(torch.autograd.grad(loss, probs), torch.autograd.grad(expected, probs))


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
