"""PriMaPs-EM against the released code's numbers: every array of tests/golden/family/primaps.npz.

Replayed: of each image im* the rounds (direction up to its sign, the first singular value, projection, seed and whether it is used,
similarity, mask, unused patches before and after), the median, log probabilities, masks on the grid and on the image without and
with CRF; prior; of em the E step, the M step with its gradients, and every step of the training with the teacher and its schedule;
ema, that schedule alone; init, the first stage.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from common import golden_tensors
from torch import Tensor
from torch.testing import assert_close

from stego_lib.successors import primaps
from stego_lib.successors.primaps import Prototypes

G = golden_tensors("family/primaps")
VALUES = dict(rtol=1e-4, atol=1e-6)
IMAGES = range(len(G["feats"]))
STEPS = len({name.split(".")[1] for name in G if name.startswith("em.step")})
THRESHOLD = G["threshold_f64"].item()
GRID, SIZE = tuple(G["feats"].shape[2:]), tuple(G["images_rgb_uint8"].shape[1:3])
NETS = [f"{net}_{part}" for net in ("student", "teacher") for part in "vg"]
ROUNDS = (
    "n_masks",
    "direction",
    "singular_values",
    "projection",
    "seed_rc",
    "seed_is_used",
    "sim",
    "mask_lowres",
    "unused_before",
)
PROPOSALS = ("unused_after", "median", "logprobs", "argmax_lowres", "argmax_nocrf", "pseudo_nocrf")
NAMES = {
    *(
        "feats",
        "threshold_f64",
        "images_rgb_uint8",
        "im0.argmax_crf",
        "prior.classes",
        "prior.pseudo",
        "em.masks",
        "em.pseudo",
    ),
    *(f"im{image}.{name}" for image in IMAGES for name in (*ROUNDS, *PROPOSALS)),
    *(
        f"em.{name}"
        for name in ("teacher_argmax", "student_logits_img0", "mean_confidence", "class_weight", "loss", "grad_v")
    ),
    *("em.grad_g", "em.log.loss", "em.log.pseudo", "ema.student", "ema.teacher"),
    *(f"em.{when}.{net}" for when in ("init", *(f"step{step}" for step in range(1, STEPS + 1))) for net in NETS),
    *(f"init.{name}" for name in ("v", "logits", "loss", "grad_v")),
}
"""What the tests of this file look up."""


def ignored(stored: Tensor) -> Tensor:
    """Stored numbers of pixels as the library has them: -1 for 255."""
    return torch.where(stored == 255, -1, stored.long())


def assert_gradient(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.fixture
def stored_signs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Gives each principal direction the sign that the released code had by chance; a list of the directions to come."""
    own, stored = primaps.principal_direction, []

    def signed(patches: Tensor) -> Tensor:
        found, expected = own(patches), stored.pop(0)
        found = found * (found @ expected).sign()
        assert_close(found, expected, rtol=0, atol=1e-4)
        return found

    monkeypatch.setattr(primaps, "principal_direction", signed)
    yield stored
    assert not stored, "rounds that did not take place"


@pytest.mark.parametrize("image", IMAGES)
def test_rounds(image, stored_signs):
    prefix = f"im{image}."
    patches = G["feats"][image].flatten(1).T
    for number in range(int(G[f"{prefix}n_masks"])):
        direction, singular, projection, (row, column), used, similarity, mask, unused = (
            G[prefix + name][number] for name in ROUNDS if name != "n_masks"
        )
        unused, seed = unused.bool().flatten(), int(row * GRID[1] + column)
        spread = patches[unused] - patches[unused].mean(0)
        assert_close(
            torch.linalg.matrix_norm(spread, 2), singular[0], rtol=1e-3, atol=1e-6
        )  # of a random decomposition
        stored_signs.append(direction)
        found = primaps.projections(patches, unused)
        assert_close(found.view(GRID), projection, **VALUES)
        assert primaps.seed_patch(found, unused, published=True) == seed
        assert bool(used) != bool(unused[seed])
        if not used:
            assert primaps.seed_patch(found, unused) == seed
        found = primaps.seed_similarity(patches, seed, unused, THRESHOLD).view(GRID)
        assert_close(found, similarity, **VALUES)
        assert torch.equal(found > 0, mask.bool())


@pytest.mark.parametrize("image", IMAGES)
def test_masks_of_an_image(image, stored_signs):
    prefix = f"im{image}."
    stored_signs.extend(G[f"{prefix}direction"])
    similarities = primaps.similarity_masks(G["feats"][image], THRESHOLD, published=True)
    assert len(similarities) == G[f"{prefix}n_masks"]
    assert_close(similarities, G[f"{prefix}sim"], **VALUES)
    assert torch.equal((similarities == 0).all(0), G[f"{prefix}unused_after"].bool())
    assert_close(primaps.median(similarities), G[f"{prefix}median"], **VALUES)
    found = primaps.mask_log_probabilities(similarities)
    assert_close(found, G[f"{prefix}logprobs"], **VALUES)
    assert torch.equal(found.argmax(0), G[f"{prefix}argmax_lowres"].long())
    stored_signs.extend(G[f"{prefix}direction"])
    masks = primaps.mask_proposals(G["feats"][image], SIZE, None, THRESHOLD, published=True)
    assert torch.equal(masks + 1, G[f"{prefix}argmax_nocrf"].long())
    stored = ignored(G[f"{prefix}pseudo_nocrf"])
    assert torch.equal(torch.where(masks < 0, -1, masks + 1), stored)


def test_masks_after_the_crf(stored_signs):
    stored_signs.extend(G["im0.direction"])
    image = G["images_rgb_uint8"][0].numpy()
    masks = primaps.mask_proposals(G["feats"][0], SIZE, image, THRESHOLD, published=True)
    assert (masks + 1 == G["im0.argmax_crf"]).float().mean() >= 0.999


def test_class_prior():
    masks, classes = G["im0.argmax_nocrf"].long() - 1, G["prior.classes"].long()
    found = primaps.pseudo_labels(masks[None], classes[None], int(classes.max()) + 1)
    assert torch.equal(found[0], ignored(G["prior.pseudo"]))


def prototypes(net: str, when: str = "init") -> Prototypes:
    """Student or teacher of that moment."""
    found = Prototypes(G[f"em.{when}.{net}_v"])
    found.lengths.data.copy_(G[f"em.{when}.{net}_g"])
    return found


@torch.no_grad()
def e_step(teacher: Prototypes) -> tuple[Tensor, Tensor]:
    """The teacher's classes, and pseudo labels."""
    classes = teacher(G["feats"], SIZE).argmax(1)
    return classes, primaps.pseudo_labels(ignored(G["em.masks"]), classes, len(teacher.lengths))


def test_expectation():
    classes, pseudo = e_step(prototypes("teacher"))
    assert (classes == G["em.teacher_argmax"]).double().mean() >= 0.999
    assert torch.equal(pseudo, ignored(G["em.pseudo"]))


def test_maximization():
    student = prototypes("student")
    logits = student(G["feats"], SIZE)
    assert_close(logits[0].detach(), G["em.student_logits_img0"], **VALUES)
    weights = primaps.class_weights(logits)
    assert_close(weights, G["em.class_weight"], **VALUES)
    assert_close(1 - weights.sqrt(), G["em.mean_confidence"], **VALUES)
    loss = primaps.focal_loss(logits, ignored(G["em.pseudo"]), published=True)
    loss.backward()
    assert_close(loss.detach(), G["em.loss"], **VALUES)
    assert_gradient(student.directions.grad, G["em.grad_v"])
    assert_gradient(student.lengths.grad, G["em.grad_g"])


def test_steps():
    student, teacher = prototypes("student"), prototypes("teacher")
    optimizer = torch.optim.Adam(student.parameters(), 5e-3)
    for step in range(STEPS):
        pseudo = e_step(teacher)[1]
        assert torch.equal(pseudo, ignored(G["em.log.pseudo"][step]))
        loss = primaps.focal_loss(student(G["feats"], SIZE), pseudo, published=True)
        assert_close(loss.detach(), G["em.log.loss"][step], **VALUES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step:
            primaps.update_teacher(teacher, student, step)
        for name, net in (("student", student), ("teacher", teacher)):
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


def test_every_array_is_replayed():
    assert set(G) == NAMES
