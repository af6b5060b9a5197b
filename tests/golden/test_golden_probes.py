"""Cluster probe and linear probe against the published code's numbers."""

import pytest
import torch
from common import golden_tensors
from torch.testing import assert_close

from stego_lib.model import ClusterProbe, LinearProbe, Stego
from stego_lib.predict import probe_scores

G = golden_tensors("probes")
LOSS = dict(rtol=1e-4, atol=1e-6)
GRADIENT = dict(rtol=1e-4, atol=1e-8)
ALPHAS = {"none": None, "alpha2": 2.0, "alpha0p5": 0.5}


def cluster_probe() -> ClusterProbe:
    """A probe with the golden clusters."""
    probe = ClusterProbe(*reversed(G["clusters"].shape))
    probe.load_state_dict({"clusters": G["clusters"]})
    return probe


def linear_probe() -> LinearProbe:
    """A probe with the golden weights."""
    probe = LinearProbe(G["linear_weight"].shape[1], len(G["linear_bias"]))
    probe.load_state_dict({"classifier.weight": G["linear_weight"], "classifier.bias": G["linear_bias"]})
    return probe


@pytest.mark.parametrize("name", ALPHAS)
def test_cluster_loss_and_its_gradients(name):
    probe, code = cluster_probe(), G["x"].clone().requires_grad_()
    loss = probe.loss(code, ALPHAS[name])
    loss.backward()
    assert_close(loss.detach(), G[f"{name}.loss"], **LOSS)
    assert_close(probe.clusters.grad, G[f"{name}.grad_clusters"], **GRADIENT)
    assert_close(code.grad, G[f"{name}.grad_x"], **GRADIENT)


def test_nearest_cluster():
    assert_close(cluster_probe()(G["x"]).argmax(1), G["none.argmax"], rtol=0, atol=0)


@pytest.mark.parametrize("alpha", [1, 2])
def test_log_probabilities(alpha):
    assert_close(cluster_probe().log_probabilities(G["x"], alpha).detach(), G[f"logprobs_alpha{alpha}"], **LOSS)


def test_probabilities_at_alpha_2_are_the_default():
    assert_close(cluster_probe().log_probabilities(G["x"]).exp().detach(), G["alpha2.probs"], **LOSS)


def test_linear_loss_and_its_gradients_leave_foreign_labels_out():
    assert {-1, 5, 6} <= set(G["label"].unique().tolist()), "the case is meant to hold ids outside the five classes"
    probe = linear_probe()
    assert_close(probe(G["x"]).detach(), G["linear_logits_lowres"], **LOSS)
    loss = probe.loss(G["x"], G["label"])
    loss.backward()
    assert_close(loss.detach(), G["linear_loss"], **LOSS)
    assert_close(probe.classifier.weight.grad, G["linear_grad_weight"], rtol=1e-4, atol=1e-7)
    assert_close(probe.classifier.bias.grad, G["linear_grad_bias"], rtol=1e-4, atol=1e-7)


def test_cluster_loss_of_a_training_step_uses_all_clusters():
    probe = cluster_probe()
    loss = probe.loss(G["x"])
    loss.backward()
    assert_close(loss.detach(), G["step_cluster_loss"], **LOSS)
    assert_close(probe.clusters.grad, G["step_cluster_grad"], **GRADIENT)


@torch.inference_mode()
def test_evaluation_upsamples_the_code_first_and_probes_then():
    model = Stego(10, 10, int(G["n_classes"]), extra_clusters=2)
    model.cluster_probe, model.linear_probe = cluster_probe(), linear_probe()
    maps = {name: scores.logits((56, 56)).log_softmax(1) for name, scores in probe_scores(model, G["x"]).items()}
    for name in ("cluster", "linear"):
        expected = G[f"eval_{name}_argmax"].long()
        # Two values may tie but for the last bit: one pixel in ten thousand is allowed to differ.
        assert (maps[name].argmax(1) == expected).float().mean() >= 0.9999
    assert_close(maps["cluster"][0], G["eval_cluster_logprobs_img0"], **LOSS)
    assert_close(maps["linear"][0], G["eval_linear_logsoftmax_img0"], rtol=1e-4, atol=5e-6)
