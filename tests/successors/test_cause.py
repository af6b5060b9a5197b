"""CAUSE's terms against loops over single numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from stego_lib.successors import cause
from stego_lib.successors.base import unit_patches

COUNT, GRID, CHANNELS, ENTRIES = 2, (3, 4), 3, 6
CELLS = GRID[0] * GRID[1]
EMPTY = torch.empty(0, 4), torch.empty(0, dtype=torch.long)
BANK = torch.randn(7, 4, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 0, 1, 2, 4, 5, 5])


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_modularity_equals_that_of_a_loop():
    feats, codebook = rand(COUNT, CHANNELS, *GRID).requires_grad_(), rand(ENTRIES, CHANNELS, seed=1).requires_grad_()
    units, losses = unit_patches(feats.detach()).view(COUNT, CELLS, -1), []
    entries = F.normalize(codebook, dim=1)
    for f in units:
        a = torch.tensor([[max(f[p] @ f[q], 0) if p != q else 0 for q in range(CELLS)] for p in range(CELLS)])
        loss = torch.zeros(())
        for p in range(CELLS):
            for q in range(CELLS):
                w = a[p, q] - a[p].sum() * a[q].sum() / a.sum()
                shares = [((m @ f[p]).relu() * (m @ f[q]).relu() / 0.1).tanh() for m in entries]
                loss = loss - w * torch.stack(shares).max() / a.sum()
        losses.append(loss)
    expected, loss = torch.stack(losses).mean(), cause.modularity_loss(feats, codebook)
    assert_close(loss, expected)
    slope = torch.autograd.grad(loss, codebook)[0]
    assert_close(slope, torch.autograd.grad(expected, codebook)[0], rtol=1e-4, atol=1e-6)
    assert not loss.requires_grad or feats.grad is None


def test_separate_groups_with_an_entry_each_have_the_best_modularity():
    """Two groups of equal size without an edge between them: the modularity is 1/2."""
    groups = F.one_hot(torch.arange(8) // 4, 2).float().T.view(1, 2, 2, 4)
    assert cause.modularity_loss(groups, torch.eye(2)).item() == pytest.approx(-0.5, abs=1e-4)
    assert cause.modularity_loss(groups, torch.ones(2, 2)).item() == pytest.approx(0, abs=1e-4)
    opposite = torch.tensor([1.0, -1.0]).expand(1, CHANNELS, 1, 2)
    assert cause.modularity_loss(opposite, rand(ENTRIES, CHANNELS)) == 0


@pytest.mark.parametrize("bank", [EMPTY, BANK], ids=["empty", "bank"])
def test_contrastive_loss_equals_that_of_a_loop(bank):
    feats, codebook, teacher = (
        rand(COUNT, CHANNELS, *GRID),
        rand(ENTRIES, CHANNELS, seed=1),
        rand(COUNT, 4, *GRID, seed=2),
    )
    student = rand(COUNT, 4, *GRID, seed=4).requires_grad_()
    concept = [F.cosine_similarity(patch[None], codebook).argmax().item() for patch in unit_patches(feats)]
    cosine = F.cosine_similarity(codebook[:, None], codebook, dim=2)
    batch = [(vector, concept[n], n) for n, vector in enumerate(unit_patches(teacher))]
    banked = [(F.normalize(v, dim=0), c, None) for v, c in zip(bank[0], bank[1].tolist(), strict=True)]
    terms = []
    for image in range(COUNT):
        for partners in filter(None, (batch, banked)):
            losses = []
            for p in range(image * CELLS, (image + 1) * CELLS):
                near = [(unit_patches(student)[p] @ v / 0.07, cosine[concept[p], c]) for v, c, n in partners if n != p]
                allowed = [logit for logit, alike in near if alike > 0.3 or alike < 0.1]
                losses += [torch.stack(allowed).logsumexp(0) - logit for logit, alike in near if alike > 0.3]
            terms.append(torch.stack(losses).mean())
    expected, concepts = torch.stack(terms).mean(), cause.nearest_concepts(feats, codebook)
    assert concepts.tolist() == concept and len(set(concept)) > 2
    loss = cause.contrastive_loss(student, teacher, concepts, cause.concept_pairs(codebook), bank)
    assert_close(loss, expected)
    slopes = [torch.autograd.grad(value, student)[0] for value in (loss, expected)]
    assert_close(*slopes, rtol=1e-4, atol=1e-6)


def test_without_a_positive_pair_the_loss_is_zero_and_so_is_its_gradient():
    student = rand(1, 4, 1, 2).requires_grad_()
    pairs = cause.concept_pairs(torch.eye(3))
    loss = cause.contrastive_loss(student, rand(1, 4, 1, 2, seed=1), torch.tensor([0, 1]), pairs, EMPTY)
    loss.backward()
    assert loss == 0 and student.grad.abs().max() == 0
