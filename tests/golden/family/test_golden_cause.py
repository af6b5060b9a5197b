"""CAUSE-MLP against the released code's numbers: modularity, concepts, contrastive loss and bank."""

import pytest
import torch
import torch.nn.functional as F
from common import assert_gradient, golden_tensors
from torch import Tensor
from torch.testing import assert_close

from stego_lib.model import ClusterProbe
from stego_lib.successors import cause

G = golden_tensors("family/cause")
VALUES = dict(rtol=1e-4, atol=1e-6)
COUNT, CELLS, CHANNELS = G["feat"].shape
GRID = tuple(G["probe.argmax"].shape[1:])
CODEBOOK, CONCEPTS = G["codebook"], G["con.index"].flatten()
# The bank's limit, which the lists of frequent concepts have reached.
KEEP = int(G["bank.sizes_after1"].max())


def maps(patches: Tensor) -> Tensor:
    """(image, patch, channel) -> (image, channel, row, column)."""
    return patches.mT.unflatten(2, GRID)


def stored_bank(update: int) -> tuple[Tensor, Tensor]:
    """The bank after an update: vectors and concepts."""
    sizes = G[f"bank.sizes_after{update}"]
    return G[f"bank.vectors_after{update}"], torch.arange(len(sizes)).repeat_interleave(sizes)


def empty_bank() -> tuple[Tensor, Tensor]:
    return torch.empty(0, G["con.teacher"].shape[2]), torch.empty(0, dtype=torch.long)


def test_graph_and_assignment():
    graphs, edges = zip(*map(cause.modularity, G["feat"]), strict=True)
    assert_close(graphs[0], G["mod.W_img0"], rtol=1e-4, atol=1e-5)
    assert_close(torch.stack(edges), G["mod.edges"], **VALUES)
    assert_close(cause.assignment(G["feat"][0], CODEBOOK), G["mod.assignment_img0"], **VALUES)


@pytest.mark.parametrize(("name", "gradient"), [("mod", "grad_codebook"), ("grid", "grad_codebook"), ("probe", "grad")])
def test_modularity_loss(name, gradient):
    feats = maps(G["feat"])
    if name == "grid":
        feats = cause.sample_blocks(feats, G["grid.order"])
        assert torch.equal(feats.flatten(2).mT, G["grid.sampled"])
    entries = (G["probe.centroids"] if name == "probe" else CODEBOOK).clone().requires_grad_()
    loss = cause.modularity_loss(feats, entries)
    loss.backward()
    assert_close(loss.detach(), G[f"{name}.loss"], **VALUES)
    assert_gradient(entries.grad, G[f"{name}.{gradient}"])


def test_modularity_loss_of_each_image():
    losses = [cause.modularity_loss(image[None], CODEBOOK) for image in maps(G["feat"])]
    assert_close(torch.stack(losses), G["mod.loss_per_image"], **VALUES)


def test_cluster_prediction():
    probe = ClusterProbe(CHANNELS, len(G["probe.centroids"]))
    probe.load_state_dict({"clusters": G["probe.centroids"]})
    assert torch.equal(probe(maps(G["feat"])).argmax(1), G["probe.argmax"].long())
    assert_close(probe.log_probabilities(maps(G["feat"]), 3.0).detach(), G["probe.logprobs_alpha3"], **VALUES)


def test_concepts_and_pairs():
    assert torch.equal(cause.nearest_concepts(maps(G["feat"]), CODEBOOK), CONCEPTS)
    cosines = F.cosine_similarity(CODEBOOK[:, None], CODEBOOK, dim=2)
    assert_close(cosines, G["con.codebook_cosine"], **VALUES)
    attract, repel = cause.concept_pairs(CODEBOOK)
    assert torch.equal(attract, G["con.codebook_cosine"] > 0.3) and torch.equal(repel, G["con.codebook_cosine"] < 0.1)


@pytest.mark.parametrize(("name", "bank"), [("con.empty_bank", empty_bank()), ("con", stored_bank(1))])
def test_contrastive_loss(name, bank):
    student, pairs = G["con.student"].clone().requires_grad_(), cause.concept_pairs(CODEBOOK)
    loss = cause.contrastive_loss(maps(student), maps(G["con.teacher"]), CONCEPTS, pairs, bank)
    loss.backward()
    assert_close(loss.detach(), G[f"{name}.loss"], **VALUES)
    assert_gradient(student.grad, G[f"{name}.grad_student"])


def test_two_updates_of_the_bank():
    bank = empty_bank()
    for update in (0, 1):
        concepts = cause.nearest_concepts(maps(G[f"bank.feat{update}"]), CODEBOOK)
        present, lengths = concepts.unique(return_counts=True)
        order = [
            (concepts == concept).nonzero()[:, 0][permutation]
            for concept, permutation in zip(present, G[f"bank.perms{update}"].split(lengths.tolist()), strict=True)
        ]
        bank = cause.update_bank(bank, maps(G[f"bank.teacher{update}"]), concepts, torch.cat(order), KEEP)
        assert all(map(torch.equal, bank, stored_bank(update)))
