"""SmooSeg's functions against naive loops, and what must not change them."""

import itertools

import pytest
import torch
from common import few_samples, tiny_experiment
from torch import Tensor
from torch.testing import assert_close

from stego_lib import train
from stego_lib.experiment import SUCCESSORS
from stego_lib.model import ClusterProbe
from stego_lib.successors import smooseg


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / (a.norm() * b.norm())


@pytest.fixture
def maps() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and probabilities of two images of 3 x 2 positions, and of partners of 2 x 4."""
    feats1, feats2 = rand(2, 5, 3, 2, seed=1), rand(2, 5, 2, 4, seed=2) + 0.5
    return feats1, feats2, rand(2, 4, 3, 2, seed=3).softmax(1), rand(2, 4, 2, 4, seed=4).softmax(1)


def factored(
    feats1: Tensor, feats2: Tensor, probs1: Tensor, probs2: Tensor, shift: float, centering: bool = True
) -> tuple[Tensor, Tensor]:
    return smooseg.smoothness_loss(
        smooseg.moments(feats1, probs1), smooseg.moments(feats2, probs2), shift, centering=centering
    )


def looped(maps: tuple[Tensor, ...], shift: float, centering: bool) -> tuple[Tensor, Tensor]:
    """The smoothness loss and the mean distance, pair by pair."""
    rows, far = [], []
    for feats1, feats2, probs1, probs2 in zip(*(one.flatten(2).mT for one in maps), strict=True):
        for p, q in itertools.product(range(len(feats1)), range(len(feats2))):
            rows.append(cosine(feats1[p], feats2[q]))
            far.append(1 - cosine(probs1[p], probs2[q]))
    similar, distances = torch.stack(rows).view(-1, len(feats2)), torch.stack(far).view(-1, len(feats2))
    if centering:
        similar = torch.stack([row - row.mean() for row in similar]) + similar.mean()
    return ((similar - shift) * distances).sum() / similar.numel(), distances.mean()


@pytest.mark.parametrize("centering", [True, False])
@pytest.mark.parametrize("shift", [-0.02, 0.5])
def test_smoothness_without_pairs_is_that_of_all_pairs(maps, shift, centering):
    probs = [one.requires_grad_() for one in maps[2:]]
    slopes = []
    losses = (
        looped(maps, shift, centering),
        factored(*maps, shift, centering=centering),
        (
            smooseg.pair_smoothness(*maps[:2], smooseg.distance(*probs), shift, centering=centering).mean(),
            smooseg.distance(*probs).mean(),
        ),
    )
    for loss, mean_distance in losses:
        slopes.append(torch.autograd.grad(loss, probs))
        assert_close(loss, losses[0][0])
        assert_close(mean_distance.detach(), losses[0][1].detach())
    for slope in slopes[1:]:
        assert_close(slope, slopes[0])


@pytest.mark.parametrize("centering", [True, False])
def test_equal_distributions_are_smooth(maps, centering):
    feats1, feats2, probs1, probs2 = maps
    one = probs1[0, :, 0, 0].view(1, 4, 1, 1)
    loss, mean_distance = factored(
        feats1, feats2, one.expand_as(probs1), one.expand_as(probs2), 0.3, centering=centering
    )
    assert_close(torch.stack([loss, mean_distance]), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_what_the_loss_does_not_depend_on(maps):
    """Order of positions, of images and of classes, the length of features, and which of two images comes first without centering."""
    loss = factored(*maps, 0.3)
    flipped = factored(*(one.flip(0, 3) for one in maps), 0.3)
    scaled = factored(3 * maps[0], 5 * maps[1], maps[2].flip(1), maps[3].flip(1), 0.3)
    assert_close(flipped, loss)
    assert_close(scaled, loss)
    swapped = factored(maps[1], maps[0], maps[3], maps[2], 0.3, centering=False)
    assert_close(swapped, factored(*maps, 0.3, centering=False))


def test_the_shift_moves_the_loss_by_the_mean_distance(maps):
    low, high = (factored(*maps, shift) for shift in (0.1, 0.4))
    assert_close(low[0] - high[0], 0.3 * low[1])


def test_likeness_of_like_features_is_rewarded():
    """Two kinds of features: labels that follow them have the lowest loss, one label for both and mixed labels a higher one."""
    kinds = torch.tensor([[0, 0, 1, 1]])
    feats = torch.nn.functional.one_hot(kinds, 2).mT[..., None].double()
    losses = [
        factored(feats, feats, probs, probs, 0.2)[0].item()
        for labels in ([[0, 0, 1, 1]], [[0, 0, 0, 0]], [[0, 1, 0, 1]])
        for probs in [torch.nn.functional.one_hot(torch.tensor(labels), 2).mT[..., None].double()]
    ]
    # Centered correspondences are 1 and 0: half of the pairs have (0 - 0.2) * 1, or a quarter 0.8 and a quarter -0.2.
    assert losses == pytest.approx([-0.1, 0.0, 0.15])


@pytest.fixture
def batch() -> dict:
    return dict(
        feats=rand(3, 6, 4, 4), code=rand(3, 5, 4, 4, seed=1), teacher=rand(7, 5, seed=2), student=rand(7, 5, seed=3),
        partners=torch.tensor([1, 2, 0]), shifts=(0.1, 0.5),
    )  # fmt: skip


def test_who_learns_from_what(batch):
    """The head from the smoothness, the student from the data loss; the teacher and the features get no gradient."""
    leaves = {name: batch[name].requires_grad_() for name in ("feats", "code", "teacher", "student")}
    smooseg.smooseg_loss(**batch)[0].backward()
    assert leaves["feats"].grad is None and leaves["teacher"].grad is None
    probs = smooseg.probabilities(smooseg.logits(batch["code"], batch["teacher"].detach()))
    smooth = [
        factored(batch["feats"], batch["feats"][rows], probs, probs[rows], shift)[0]
        for rows, shift in zip((torch.arange(3), batch["partners"]), batch["shifts"], strict=True)
    ]
    assert_close(leaves["code"].grad, torch.autograd.grad(sum(smooth), leaves["code"])[0])
    assert leaves["student"].grad.abs().max() > 0


def test_the_data_loss_counts_every_position(batch):
    student, teacher = (smooseg.logits(batch["code"], batch[name]) for name in ("student", "teacher"))
    losses = [
        -student[b, :, y, x].softmax(0)[teacher[b, :, y, x].argmax()].log()
        for b, y, x in itertools.product(range(3), range(4), range(4))
    ]
    assert_close(smooseg.data_loss(student, teacher), torch.stack(losses).mean())


def test_logits_are_those_of_the_cluster_probe_and_ignore_lengths(batch):
    probe = ClusterProbe(5, 7).double()
    probe.clusters.data = batch["teacher"]
    found = smooseg.logits(batch["code"], batch["teacher"])
    assert_close(found, probe(batch["code"]).detach())
    assert_close(smooseg.logits(4 * batch["code"], 9 * batch["teacher"]), found)
    for b, y, x, n in ((0, 0, 0, 0), (2, 1, 3, 6)):
        assert_close(found[b, n, y, x], cosine(batch["code"][b, :, y, x], batch["teacher"][n]))


def test_the_teacher_is_an_exponential_average():
    teacher, students = rand(7, 5), rand(6, 7, 5, seed=1)
    expected = 0.9**6 * teacher + sum(0.1 * 0.9 ** (5 - k) * one for k, one in enumerate(students))
    for one in students:
        smooseg.update_teacher(teacher, one, 0.9)
    assert_close(teacher, expected)
    start = smooseg.initial_prototypes(3 * teacher)
    assert_close(start.norm(dim=1), torch.ones(7, dtype=torch.float64))
    assert_close(start, teacher / teacher.norm(dim=1, keepdim=True))


def test_no_pairs_are_kept_in_memory():
    """All pairs of 16 images of 30 x 40 positions would be 23 million numbers, for each of several tensors."""
    feats, code = torch.rand(16, 384, 30, 40), torch.rand(16, 64, 30, 40, requires_grad=True)
    prototypes, partners, sizes = torch.rand(27, 64), torch.arange(16).roll(1), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda kept: (sizes.append(kept.numel()), kept)[1], lambda kept: kept
    ):
        loss, _ = smooseg.smooseg_loss(feats, code, prototypes, prototypes.clone(), partners, (-0.02, 0.5))
    loss.backward()
    assert max(sizes) <= feats.numel() and code.grad.isfinite().all()


def test_steps_of_the_trainer(scenes_root, backbone_file, tmp_path, monkeypatch):
    """What its loss sees, and when the teacher moves: from the student as it is before its update."""
    few_samples(monkeypatch)
    loss, seen = smooseg.smooseg_loss, []

    def watched(feats, code, teacher, student, partners, shifts, **switches):
        seen.append((feats, teacher.clone(), student.detach().clone(), partners, shifts, switches))
        return loss(feats, code, teacher, student, partners, shifts, **switches)

    monkeypatch.setattr(smooseg, "smooseg_loss", watched)
    changes = SUCCESSORS["smooseg"] | dict(method="smooseg", code_dim=8, steps=3, shifts=(0.1, 0.2, 0.3))
    run = train(tiny_experiment(scenes_root, backbone_file, **changes), runs_dir=tmp_path)
    feats, teachers, students, partners, shifts, switches = zip(*seen, strict=True)
    assert shifts == ((0.1, 0.3),) * 3 and switches == (dict(centering=True),) * 3
    assert all(sorted(one.tolist()) == [0, 1, 2, 3] and not (one == torch.arange(4)).any() for one in partners)
    dropped = torch.cat([(one == 0).all(3).all(2) for one in feats])
    assert 0.1 < dropped.double().mean() < 0.3, "channels of the correspondences drop out"
    assert_close(students[0].norm(dim=1), torch.ones(run.model.n_clusters))
    assert torch.equal(students[0], teachers[0]) and torch.equal(teachers[1], teachers[0])
    assert_close((students[1] - students[0]).abs().amax(), torch.tensor(run.experiment.lr_probes))
    expected = teachers[1] + 0.002 * (students[1] - teachers[1])
    assert_close(teachers[2], expected, rtol=0, atol=1e-7)
    assert_close(run.model.cluster_probe.clusters, expected + 0.002 * (students[2] - expected), rtol=0, atol=1e-7)
    assert (teachers[2] - teachers[1]).abs().max() > 1e-6
