"""SmooSeg against the released code's numbers: losses, gradients, head, prediction and five steps of training."""

import pytest
import torch
import torch.nn.functional as F
from common import assert_gradient, golden_tensors
from torch import Tensor
from torch.testing import assert_close

from stego_lib.loss import upsample
from stego_lib.model import ClusterProbe, SegmentationHead
from stego_lib.successors import smooseg

G = golden_tensors("family/smooseg")
VALUES = dict(rtol=1e-4, atol=1e-6)
PARTS = ("weight", "bias")
# Names of layers in the released code -> ours.
LAYERS = {"cluster1.0": "linear", "cluster2.0": "nonlinear.0", "cluster2.2": "nonlinear.2"}
CENTERING = {"pw1": True, "pw0": False}
SHIFTS = G["shift_intra_f64"].item(), G["shift_inter_f64"].item()
TEMPERATURE = G["temperature_f64"].item()


def head(prefix: str = "", dropout: float = 0.0) -> SegmentationHead:
    """The head with stored weights."""
    state = {f"{ours}.{part}": G[f"{prefix}head.{theirs}.{part}"] for theirs, ours in LAYERS.items() for part in PARTS}
    code_dim, channels = state["linear.weight"].shape[:2]
    net = SegmentationHead(channels, code_dim, "silu", dropout)
    net.load_state_dict(state)
    return net


def test_logits():
    for name in ("teacher", "student"):
        assert_close(smooseg.logits(G["code"], G[name]), G[f"logits_{name}"], **VALUES)
    assert torch.equal(smooseg.logits(G["code"], G["teacher"]).argmax(1), G["target"])


@pytest.mark.parametrize("case", CENTERING)
@pytest.mark.parametrize("kind", ["intra", "inter"])
def test_smoothness(case, kind):
    code, shift = G["code"].clone().requires_grad_(), SHIFTS[kind == "inter"]
    probs = (smooseg.logits(code, G["teacher"]) / TEMPERATURE).softmax(1)
    assert_close(probs.detach(), G["probs"], **VALUES)
    rows = torch.arange(len(code)) if kind == "intra" else G["perm"]
    partners = smooseg.moments(G["feats"][rows], probs[rows])
    loss, distance = smooseg.smoothness_loss(
        smooseg.moments(G["feats"], probs), partners, shift, centering=CENTERING[case]
    )
    loss.backward()
    assert_close(loss.detach(), G[f"{case}.loss_{kind}"], **VALUES)
    assert_close(distance, G[f"dist_{kind}_mean"], **VALUES)
    assert_gradient(code.grad, G[f"{case}.grad_code_{kind}"])


@pytest.mark.parametrize("case", CENTERING)
def test_total_and_gradients(case):
    code, teacher, student = (G[name].clone().requires_grad_() for name in ("code", "teacher", "student"))
    loss, parts = smooseg.smooseg_loss(
        G["feats"], code, teacher, student, G["perm"], SHIFTS, temperature=TEMPERATURE, centering=CENTERING[case]
    )
    loss.backward()
    values = dict(intra=parts["loss_self"], inter=parts["loss_rand"], data=parts["loss_data"], total=loss.detach())
    values["smooth"] = values["intra"] + values["inter"]
    for name, value in values.items():
        assert_close(value, G[f"{case}.loss_{name}"], **VALUES)
    assert_gradient(code.grad, G[f"{case}.grad_code"])
    assert_gradient(student.grad, G[f"{case}.grad_student"])
    assert teacher.grad is None


@torch.no_grad()
def test_predictions():
    probe = ClusterProbe(*G["teacher"].T.shape)
    probe.clusters.copy_(G["teacher"])
    code = upsample(G["code"], tuple(G["pred_argmax"].shape[1:]))
    assert_close(smooseg.logits(code, G["teacher"]), probe(code))
    assert torch.equal(probe(code).argmax(1), G["pred_argmax"].long())
    assert_close(probe.log_probabilities(code)[0], G["pred_logprobs_img0"], **VALUES)


@torch.no_grad()
def test_head_and_its_dropout():
    assert_close(head()(G["feats"]), G["head_eval_code"], **VALUES)
    masks, net = iter(G["head_train_masks"][..., None, None]), head(dropout=0.2).train()
    net.dropout.register_forward_hook(lambda module, inputs, output: inputs[0] * next(masks))
    assert_close(net(G["feats"]), G["head_train_code"], **VALUES)
    assert_close(net.dropout(G["feats"]), G["head_train_feats"], **VALUES)


def test_training():
    """Five steps: the teacher moves before the student's update."""
    assert_close(F.normalize(G["student"], dim=1), G["init_prototypes"], **VALUES)
    net = head("traj.init.")
    teacher, student = G["traj.init.teacher"].clone(), G["traj.init.student"].clone().requires_grad_()
    groups = [dict(params=net.parameters(), lr=G["traj.lr_head_f64"].item())]
    groups += [dict(params=[student], lr=G["traj.lr_prototypes_f64"].item())]
    optimizer = torch.optim.Adam(groups)
    names = dict(data="loss_data", dist_intra="distance_self", dist_inter="distance_rand")
    for number, partners in enumerate(G["traj.perms"]):
        loss, parts = smooseg.smooseg_loss(
            G["feats"], net(G["feats"]), teacher, student, partners, SHIFTS, temperature=TEMPERATURE
        )
        teacher.lerp_(student.detach(), 1 - G["traj.alpha_f64"].item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert_close(loss.detach(), G["traj.log.total"][number], **VALUES)
        assert_close(parts["loss_self"] + parts["loss_rand"], G["traj.log.smooth"][number], **VALUES)
        for name, key in names.items():
            assert_close(parts[key], G[f"traj.log.{name}"][number], **VALUES)
        if number == 0:
            assert_weights("step1", net, teacher, student)
    assert_weights("final", net, teacher, student)
    assert_close(net(G["feats"]).detach(), G["traj.final_code"], rtol=1e-4, atol=1e-5)


def assert_weights(when: str, net: SegmentationHead, teacher: Tensor, student: Tensor) -> None:
    expected = head(f"traj.{when}.").state_dict()
    expected |= {name: G[f"traj.{when}.{name}"] for name in ("teacher", "student")}
    weights = {**net.state_dict(), "teacher": teacher, "student": student.detach()}
    for name, value in expected.items():
        assert_close(weights[name], value, rtol=0, atol=1e-5)
