"""SmooSeg against the released code's numbers: every array of tests/golden/family/smooseg.npz.

Replayed: both logits, probs and target; dist_*; of pw1 and pw0 (centered or not) all losses and gradients, and the pairs of
pw1; the teacher after its updates and both prototypes at the start; the predictions and what the CRF takes; the head, also
with its masks of dropout; and traj.*, five steps of training with Adam.
"""

from itertools import starmap

import pytest
import torch
from common import golden_tensors
from torch import Tensor
from torch.testing import assert_close

from stego_lib.loss import upsample
from stego_lib.model import ClusterProbe, SegmentationHead
from stego_lib.successors import smooseg

G = golden_tensors("family/smooseg")
VALUES = dict(rtol=1e-4, atol=1e-6)
PARTS = ("weight", "bias")
LAYERS = {"cluster1.0": "linear", "cluster2.0": "nonlinear.0", "cluster2.2": "nonlinear.2"}
"""The published names of layers -> ours."""
CENTERING = {"pw1": True, "pw0": False}
LOSSES = ("intra", "inter", "smooth", "data", "total")
HEAD = [f"head.{layer}.{part}" for layer in LAYERS for part in PARTS]

NAMES = {
    *(
        "feats",
        "code",
        "student",
        "teacher",
        "perm",
        "shift_intra_f64",
        "shift_inter_f64",
        "temperature_f64",
        "alpha_f64",
    ),
    *("logits_student", "logits_teacher", "probs", "target", "init_prototypes", "teacher_after_1", "teacher_after_3"),
    *("dist_intra", "dist_inter", "dist_intra_mean", "dist_inter_mean", "pw1.loss_intra_full", "pw1.loss_inter_full"),
    *(f"{case}.loss_{name}" for case in CENTERING for name in LOSSES),
    *(f"{case}.grad_{name}" for case in CENTERING for name in ("code", "code_intra", "code_inter", "student")),
    *("pred_argmax", "pred_logprobs_img0", "pred_gap_f64"),
    *(*HEAD, "head_eval_code", "head_train_masks", "head_train_code", "head_train_feats"),
    *(f"traj.{when}.{name}" for when in ("init", "step1", "final") for name in (*HEAD, "student", "teacher")),
    *(f"traj.log.{name}" for name in ("smooth", "data", "total", "dist_intra", "dist_inter")),
    *("traj.perms", "traj.lr_head_f64", "traj.lr_prototypes_f64", "traj.alpha_f64", "traj.final_code"),
}
"""What the tests of this file look up."""
SHIFTS = G["shift_intra_f64"].item(), G["shift_inter_f64"].item()
TEMPERATURE = G["temperature_f64"].item()


def assert_gradient(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def head(prefix: str = "", dropout: float = 0.0) -> SegmentationHead:
    """The head with stored weights."""
    state = {f"{ours}.{part}": G[f"{prefix}head.{theirs}.{part}"] for theirs, ours in LAYERS.items() for part in PARTS}
    code_dim, channels = state["linear.weight"].shape[:2]
    found = SegmentationHead(channels, code_dim, "silu", dropout)
    found.load_state_dict(state)
    return found


def of_pairs(kind: str, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Maps of the images and of their partners."""
    return maps, maps if kind == "intra" else maps[G["perm"]]


def test_logits_and_labels():
    assert_close(smooseg.logits(G["code"], G["teacher"]), G["logits_teacher"], **VALUES)
    assert_close(smooseg.logits(G["code"], G["student"]), G["logits_student"], **VALUES)
    assert_close(smooseg.probabilities(G["logits_teacher"], TEMPERATURE), G["probs"], **VALUES)
    assert torch.equal(smooseg.logits(G["code"], G["teacher"]).argmax(1), G["target"])


@pytest.mark.parametrize("kind", ["intra", "inter"])
def test_distances_and_pairs(kind):
    found = smooseg.distance(*of_pairs(kind, G["probs"]))
    assert_close(found, G[f"dist_{kind}"], **VALUES)
    assert_close(found.mean(), G[f"dist_{kind}_mean"], **VALUES)
    pairs = smooseg.pair_smoothness(*of_pairs(kind, G["feats"]), found, SHIFTS[kind == "inter"])
    assert_close(pairs, G[f"pw1.loss_{kind}_full"], **VALUES)


@pytest.mark.parametrize("case", CENTERING)
@pytest.mark.parametrize("kind", ["intra", "inter"])
def test_smoothness(case, kind):
    code, shift = G["code"].clone().requires_grad_(), SHIFTS[kind == "inter"]
    probs = smooseg.probabilities(smooseg.logits(code, G["teacher"]), TEMPERATURE)
    pairs = zip(of_pairs(kind, G["feats"]), of_pairs(kind, probs), strict=True)
    loss, mean_distance = smooseg.smoothness_loss(*starmap(smooseg.moments, pairs), shift, centering=CENTERING[case])
    loss.backward()
    assert_close(loss.detach(), G[f"{case}.loss_{kind}"], **VALUES)
    assert_close(mean_distance, G[f"dist_{kind}_mean"], **VALUES)
    assert_gradient(code.grad, G[f"{case}.grad_code_{kind}"])


@pytest.mark.parametrize("case", CENTERING)
def test_total_and_gradients(case):
    code, teacher, student = (G[name].clone().requires_grad_() for name in ("code", "teacher", "student"))
    loss, parts = smooseg.smooseg_loss(
        G["feats"], code, teacher, student, G["perm"], SHIFTS, temperature=TEMPERATURE, centering=CENTERING[case]
    )
    loss.backward()
    found = dict(intra=parts["loss_self"], inter=parts["loss_rand"], data=parts["loss_data"], total=loss.detach())
    found["smooth"] = found["intra"] + found["inter"]
    for name in LOSSES:
        assert_close(found[name], G[f"{case}.loss_{name}"], **VALUES)
    assert_gradient(code.grad, G[f"{case}.grad_code"])
    assert_gradient(student.grad, G[f"{case}.grad_student"])
    assert teacher.grad is None


def test_prototypes():
    assert_close(smooseg.initial_prototypes(G["student"]), G["init_prototypes"], **VALUES)
    teacher, decay = G["teacher"].clone(), G["alpha_f64"].item()
    for number in range(1, 4):
        smooseg.update_teacher(teacher, G["student"], decay)
        if f"teacher_after_{number}" in G:
            assert_close(teacher, G[f"teacher_after_{number}"], **VALUES)


@torch.no_grad()
def test_predictions():
    probe = ClusterProbe(*G["teacher"].T.shape)
    probe.clusters.copy_(G["teacher"])
    size = G["pred_argmax"].shape[1], G["pred_argmax"].shape[2]
    code = upsample(G["code"], size)
    found = smooseg.logits(code, G["teacher"])
    assert_close(found, probe(code))
    best = found.topk(2, dim=1).values
    assert (best[:, 0] - best[:, 1]).min().item() == pytest.approx(G["pred_gap_f64"].item(), abs=1e-6)
    assert torch.equal(found.argmax(1), G["pred_argmax"].long())
    assert_close(probe.log_probabilities(code)[0], G["pred_logprobs_img0"], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_head_and_its_dropout():
    assert_close(head()(G["feats"]), G["head_eval_code"], **VALUES)
    masks, net = iter(G["head_train_masks"][..., None, None]), head(dropout=0.2).train()
    net.dropout.register_forward_hook(lambda module, inputs, output: inputs[0] * next(masks))
    assert_close(net(G["feats"]), G["head_train_code"], **VALUES)
    assert_close(net.dropout(G["feats"]), G["head_train_feats"], **VALUES)
    net = head(dropout=0.2).train()
    torch.manual_seed(0)
    kept = net.dropout(torch.ones(9, 99, 1, 1)).unique()
    assert_close(kept, G["head_train_masks"].unique())


def test_training():
    net = head("traj.init.")
    teacher, student = G["traj.init.teacher"].clone(), G["traj.init.student"].clone().requires_grad_()
    rates = G["traj.lr_head_f64"].item(), G["traj.lr_prototypes_f64"].item()
    optimizer = torch.optim.Adam([dict(params=net.parameters(), lr=rates[0]), dict(params=[student], lr=rates[1])])
    log = []
    for number, partners in enumerate(G["traj.perms"]):
        loss, parts = smooseg.smooseg_loss(
            G["feats"], net(G["feats"]), teacher, student, partners, SHIFTS, temperature=TEMPERATURE
        )
        smooseg.update_teacher(teacher, student, G["traj.alpha_f64"].item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append(dict(
            smooth=parts["loss_self"] + parts["loss_rand"], data=parts["loss_data"], total=loss.detach(),
            dist_intra=parts["distance_self"], dist_inter=parts["distance_rand"],
        ))  # fmt: skip
        if number == 0:
            assert_weights("step1", net, teacher, student)
    assert_weights("final", net, teacher, student)
    for name in log[0]:
        assert_close(torch.stack([values[name] for values in log]), G[f"traj.log.{name}"], **VALUES)
    assert_close(net(G["feats"]).detach(), G["traj.final_code"], rtol=1e-4, atol=1e-5)


def assert_weights(when: str, net: SegmentationHead, teacher: Tensor, student: Tensor) -> None:
    expected = {
        **head(f"traj.{when}.").state_dict(),
        "teacher": G[f"traj.{when}.teacher"],
        "student": G[f"traj.{when}.student"],
    }
    found = {**net.state_dict(), "teacher": teacher, "student": student.detach()}
    for name, value in expected.items():
        assert_close(found[name], value, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{when} {name}: {text}")


def test_every_array_is_replayed():
    assert set(G) == NAMES
