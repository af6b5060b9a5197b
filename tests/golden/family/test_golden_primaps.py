"""PriMaPs-EM against the released code's numbers: masks, E step, M step, training, first stage."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from common import assert_gradient, golden_tensors
from torch import Tensor
from torch.testing import assert_close

from stego_lib.successors import primaps
from stego_lib.successors.primaps import Prototypes

G = golden_tensors("family/primaps")
VALUES = dict(rtol=1e-4, atol=1e-6)
STEPS = len({name.split(".")[1] for name in G if name.startswith("em.step")})
THRESHOLD = G["threshold_f64"].item()
GRID, SIZE = tuple(G["feats"].shape[2:]), tuple(G["images_rgb_uint8"].shape[1:3])


def labels(stored: Tensor) -> Tensor:
    """Stored numbers of pixels with -1 for 255."""
    return torch.where(stored == 255, -1, stored.long())


@pytest.fixture
def stored_signs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Gives each principal direction the released sign, which was left to chance. Yields the directions to come."""
    own, stored = primaps.principal_direction, []

    def signed(patches: Tensor) -> Tensor:
        direction, expected = own(patches), stored.pop(0)
        direction = direction * (direction @ expected).sign()
        assert_close(direction, expected, rtol=0, atol=1e-4)
        return direction

    monkeypatch.setattr(primaps, "principal_direction", signed)
    yield stored
    assert not stored, "rounds that did not take place"


@pytest.mark.parametrize("image", range(len(G["feats"])))
def test_masks_of_an_image(image, stored_signs):
    prefix = f"im{image}."
    stored_signs.extend(G[f"{prefix}direction"])
    similarities = primaps.similarity_masks(G["feats"][image], THRESHOLD, published=True)
    assert_close(similarities, G[f"{prefix}sim"], **VALUES)
    assert torch.equal(similarities > 0, G[f"{prefix}mask_lowres"].bool())
    assert torch.equal((similarities == 0).all(0), G[f"{prefix}unused_after"].bool())
    assert_close(primaps.median(similarities), G[f"{prefix}median"], **VALUES)
    probabilities = primaps.mask_log_probabilities(similarities)
    assert_close(probabilities, G[f"{prefix}logprobs"], **VALUES)
    assert torch.equal(probabilities.argmax(0), G[f"{prefix}argmax_lowres"].long())


def test_masks_after_the_crf(stored_signs):
    assert THRESHOLD == pytest.approx(primaps.THRESHOLD)
    stored_signs.extend(G["im0.direction"])
    masks = primaps.mask_proposals(G["feats"][0], G["images_rgb_uint8"][0].numpy(), published=True)
    assert (masks + 1 == G["im0.argmax_crf"]).double().mean() >= 0.999


def prototypes(net: str, when: str = "init") -> Prototypes:
    """Student or teacher of that moment."""
    stored = Prototypes(G[f"em.{when}.{net}_v"])
    stored.lengths.data.copy_(G[f"em.{when}.{net}_g"])
    return stored


@torch.no_grad()
def e_step(teacher: Prototypes) -> tuple[Tensor, Tensor]:
    """The teacher's classes, and pseudo labels."""
    classes = teacher(G["feats"], SIZE).argmax(1)
    return classes, primaps.pseudo_labels(labels(G["em.masks"]), classes, len(teacher.lengths))


def test_expectation():
    classes, pseudo = e_step(prototypes("teacher"))
    assert (classes == G["em.teacher_argmax"]).double().mean() >= 0.999
    assert torch.equal(pseudo, labels(G["em.pseudo"]))


def test_maximization():
    student = prototypes("student")
    logits = student(G["feats"], SIZE)
    assert_close(logits[0].detach(), G["em.student_logits_img0"], **VALUES)
    assert_close(primaps.class_weights(logits), G["em.class_weight"], **VALUES)
    loss = primaps.focal_loss(logits, labels(G["em.pseudo"]), published=True)
    loss.backward()
    assert_close(loss.detach(), G["em.loss"], **VALUES)
    assert_gradient(student.directions.grad, G["em.grad_v"])
    assert_gradient(student.lengths.grad, G["em.grad_g"])


def test_steps():
    nets = {net: prototypes(net) for net in ("student", "teacher")}
    student, teacher = nets.values()
    optimizer = torch.optim.Adam(student.parameters(), 5e-3)
    for step in range(STEPS):
        pseudo = e_step(teacher)[1]
        assert torch.equal(pseudo, labels(G["em.log.pseudo"][step]))
        loss = primaps.focal_loss(student(G["feats"], SIZE), pseudo, published=True)
        assert_close(loss.detach(), G["em.log.loss"][step], **VALUES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step:
            primaps.update_teacher(teacher, student, step)
        for name, net in nets.items():
            assert_close(net.directions.detach(), G[f"em.step{step + 1}.{name}_v"], rtol=0, atol=1e-5)
            assert_close(net.lengths.detach(), G[f"em.step{step + 1}.{name}_g"], rtol=0, atol=1e-5)


def test_schedule_of_the_teacher():
    teacher, student = Prototypes(torch.zeros_like(G["ema.student"][0])), Prototypes(G["ema.student"][0])
    for update, (values, expected) in enumerate(zip(G["ema.student"], G["ema.teacher"], strict=True), 1):
        student.directions.data.copy_(values)
        primaps.update_teacher(teacher, student, update)
        assert_close(teacher.directions.detach(), expected, rtol=0, atol=1e-5)


def test_first_stage():
    student = Prototypes(G["init.v"])
    loss = student.clustering_loss(G["feats"])
    loss.backward()
    assert_close(loss.detach(), G["init.loss"], **VALUES)
    assert_gradient(student.directions.grad, G["init.grad_v"])
    logits = student(F.normalize(G["feats"], dim=1), GRID).detach()  # lengths are 1, the grid is not upsampled
    assert_close(logits, G["init.logits"], **VALUES)
