"""CAUSE's terms against loops over single numbers, what must not change them, and the label leak of the released last stage."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from stego_lib import StegoError
from stego_lib.model import ClusterProbe, LinearProbe, SegmentationHead
from stego_lib.successors import cause

COUNT, GRID, CHANNELS, ENTRIES = 2, (3, 4), 3, 6
CELLS = GRID[0] * GRID[1]
EMPTY = torch.empty(0, 4), torch.empty(0, dtype=torch.long)


def random_numbers(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=random_numbers(seed))


def patch(maps: Tensor, number: int) -> Tensor:
    """One patch of a batch, its length 1."""
    return F.normalize(maps[number // CELLS, :, number % CELLS // GRID[1], number % GRID[1]], dim=0)


def test_modularity_equals_that_of_a_loop():
    feats = drawn(COUNT, CHANNELS, *GRID)
    codebook = drawn(ENTRIES, CHANNELS, seed=1).requires_grad_()
    losses = []
    for image in range(COUNT):
        f = [patch(feats, image * CELLS + p) for p in range(CELLS)]
        a = torch.tensor([[max(f[p] @ f[q], 0) if p != q else 0 for q in range(CELLS)] for p in range(CELLS)])
        loss = torch.zeros(())
        for p in range(CELLS):
            for q in range(CELLS):
                w = a[p, q] - a[p].sum() * a[q].sum() / a.sum()
                shares = [
                    (F.normalize(m, dim=0) @ f[p]).relu() * (F.normalize(m, dim=0) @ f[q]).relu() for m in codebook
                ]
                loss = loss - w * torch.stack([(s / 0.1).tanh() for s in shares]).max() / a.sum()
        losses.append(loss)
    expected = torch.stack(losses).mean()
    found = cause.modularity_loss(feats, codebook)
    assert_close(found, expected)
    (slope,), (wanted) = torch.autograd.grad(found, codebook), torch.autograd.grad(expected, codebook)[0]
    assert_close(slope, wanted, rtol=1e-4, atol=1e-6)


def test_modularity_depends_neither_on_lengths_nor_on_the_order_of_patches_and_entries():
    feats, codebook = drawn(COUNT, CHANNELS, *GRID), drawn(ENTRIES, CHANNELS, seed=1)
    expected = cause.modularity_loss(feats, codebook)
    assert_close(cause.modularity_loss(3 * feats.flip(2), 0.5 * codebook.flip(0)), expected)


def test_modularity_leaves_the_features_alone_and_takes_patches_that_share_nothing():
    feats = drawn(COUNT, CHANNELS, *GRID).requires_grad_()
    codebook = drawn(ENTRIES, CHANNELS).requires_grad_()
    cause.modularity_loss(feats, codebook).backward()
    assert feats.grad is None and codebook.grad.abs().max() > 0
    opposite = torch.tensor([1.0, -1.0]).expand(1, CHANNELS, 1, 2)
    assert cause.modularity_loss(opposite, codebook) == 0


def test_separate_groups_with_an_entry_each_have_the_best_modularity():
    """Two groups of equal size without an edge between them: the modularity is 1/2."""
    groups = F.one_hot(torch.arange(8) // 4, 2).float().T.view(1, 2, 2, 4)
    assert cause.modularity_loss(groups, torch.eye(2)).item() == pytest.approx(-0.5, abs=1e-4)
    assert cause.modularity_loss(groups, torch.ones(2, 2)).item() == pytest.approx(0, abs=1e-4)


def test_one_patch_of_each_block_is_kept():
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    maps = torch.stack([rows, columns])[None].float().repeat(2, 1, 1, 1)
    order = cause.random_order(12, 2, random_numbers())
    sampled = cause.sample_blocks(maps, order, 2)
    for number, kept in enumerate(order.tolist()):
        image, (y, x) = number // 6, divmod(number % 6, 3)
        assert sampled[image, :, y, x].tolist() == [2 * y + kept // 2, 2 * x + kept % 2]
    assert set(cause.random_order(999, 2, random_numbers()).tolist()) == {0, 1, 2, 3}


def test_blocks_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(StegoError, match="4 x 4 patches do not fill a grid of 8 x 6"):
        cause.sample_blocks(torch.rand(1, 2, 8, 6), torch.zeros(2, dtype=torch.long))


def filled_bank() -> tuple[Tensor, Tensor]:
    return drawn(7, 4, seed=3), torch.tensor([0, 0, 1, 2, 4, 5, 5])


@pytest.mark.parametrize("bank", [EMPTY, filled_bank()], ids=["empty", "bank"])
def test_contrastive_loss_equals_that_of_a_loop(bank):
    feats, codebook, teacher = (
        drawn(COUNT, CHANNELS, *GRID),
        drawn(ENTRIES, CHANNELS, seed=1),
        drawn(COUNT, 4, *GRID, seed=2),
    )
    student = drawn(COUNT, 4, *GRID, seed=4).requires_grad_()
    total = COUNT * CELLS
    concept = [
        max(range(ENTRIES), key=lambda k, n=n: F.normalize(codebook[k], dim=0) @ patch(feats, n)) for n in range(total)
    ]
    cosine = F.cosine_similarity(codebook[:, None], codebook, dim=2)
    batch = [(patch(teacher, n), concept[n], n) for n in range(total)]
    banked = [(F.normalize(v, dim=0), c, None) for v, c in zip(bank[0], bank[1].tolist(), strict=True)]
    terms = []
    for image in range(COUNT):
        for partners in filter(None, (batch, banked)):
            losses = []
            for p in range(image * CELLS, (image + 1) * CELLS):
                near = [(patch(student, p) @ v / 0.07, cosine[concept[p], c]) for v, c, n in partners if n != p]
                allowed = [logit for logit, alike in near if alike > 0.3 or alike < 0.1]
                losses += [torch.stack(allowed).logsumexp(0) - logit for logit, alike in near if alike > 0.3]
            terms.append(torch.stack(losses).mean())
    expected = torch.stack(terms).mean()
    concepts = cause.nearest_concepts(feats, codebook)
    assert concepts.tolist() == concept and len(set(concept)) > 2
    found = cause.contrastive_loss(student, teacher, concepts, cause.concept_pairs(codebook), bank)
    assert_close(found, expected)
    slope, wanted = (torch.autograd.grad(3 * loss, student)[0] for loss in (found, expected))
    assert_close(slope, wanted, rtol=1e-4, atol=1e-6)


def test_without_a_positive_pair_the_loss_is_zero_and_so_is_its_gradient():
    student = drawn(1, 4, 1, 2).requires_grad_()
    pairs = cause.concept_pairs(torch.eye(3))
    loss = cause.contrastive_loss(student, drawn(1, 4, 1, 2, seed=1), torch.tensor([0, 1]), pairs, EMPTY)
    loss.backward()
    assert loss == 0 and student.grad.abs().max() == 0


def test_bank_equals_that_of_lists():
    lists: dict[int, list] = {}
    bank, keep = EMPTY, 4
    for step in range(5):
        teacher = drawn(COUNT, 4, *GRID, seed=step)
        concepts = torch.randint(ENTRIES, (COUNT * CELLS,), generator=random_numbers(step))
        order = torch.randperm(COUNT * CELLS, generator=random_numbers(step))
        vectors = teacher.movedim(1, -1).flatten(0, 2)
        for concept in concepts.unique().tolist():
            own = [vectors[n] for n in order.tolist() if concepts[n] == concept]
            lists[concept] = (lists.get(concept, []) + own[: len(own) // 2])[-keep:]
        bank = cause.update_bank(bank, teacher, concepts, order, keep)
        assert bank[1].tolist() == [concept for concept in sorted(lists) for _ in lists[concept]]
        assert torch.equal(bank[0], torch.stack([v for concept in sorted(lists) for v in lists[concept]]))
    assert bank[1].bincount().max() == keep


@pytest.fixture
def last_stage() -> tuple[SegmentationHead, ClusterProbe, LinearProbe, Tensor, Tensor]:
    """Head, both probes, features and labels of random numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head, clusters, linear = SegmentationHead(CHANNELS, 5), ClusterProbe(5, 4), LinearProbe(5, 4)
    return (
        head.eval(),
        clusters,
        linear,
        drawn(COUNT, CHANNELS, *GRID),
        torch.randint(4, (COUNT, 12, 16), generator=random_numbers()),
    )


def slopes(head: SegmentationHead) -> list[float]:
    """The largest gradient of each weight of the head."""
    found = [0.0 if p.grad is None else p.grad.abs().max().item() for p in head.parameters()]
    head.zero_grad()
    return found


def test_released_last_stage_trains_the_head_with_labels_and_ours_does_not(last_stage):
    """A miniature of the released stage: the linear probe sees the code itself, the modularity loss a detached one."""
    head, clusters, linear, feats, label = last_stage
    (cause.modularity_loss(head(feats), clusters.clusters) + linear.loss(head(feats), label)).backward()
    assert min(slopes(head)) > 0, "every weight of the head follows the labels"
    cause.modularity_loss(head(feats), clusters.clusters).backward()
    assert max(slopes(head)) == 0, "and nothing else"
    clusters.zero_grad(), linear.zero_grad()
    cause.probes_loss(head(feats), clusters, linear, label).backward()
    assert max(slopes(head)) == 0
    assert clusters.clusters.grad.abs().max() > 0 and linear.classifier.weight.grad.abs().max() > 0


def test_released_last_stage_moves_the_evaluated_clusters_with_the_labels(last_stage):
    """Another set of labels gives another code where the leak is, and the same code without it."""
    head, clusters, linear, feats, label = last_stage

    def trained_code(label: Tensor, leak: bool) -> Tensor:
        parts = SegmentationHead(CHANNELS, 5).eval(), ClusterProbe(5, 4), LinearProbe(5, 4)
        for part, start in zip(parts, (head, clusters, linear), strict=True):
            part.load_state_dict(start.state_dict())
        optimizer = torch.optim.Adam([p for part in parts for p in part.parameters()], lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            code = parts[0](feats)
            stage = cause.modularity_loss(code, parts[1].clusters) + parts[2].loss(code, label)
            (stage if leak else cause.probes_loss(code, *parts[1:], label)).backward()
            optimizer.step()
        return parts[0](feats).detach()

    other = (label + 1) % 4
    assert (trained_code(label, True) - trained_code(other, True)).abs().max() > 1e-2
    assert torch.equal(trained_code(label, False), trained_code(other, False))
