"""CAUSE-MLP against the released code's numbers: every array of tests/golden/family/cause.npz.

Replayed: of mod the graph and assignment of the first image, edges, losses and gradient; of grid the sampled patches, loss and
gradient; of probe loss, gradient, prediction and log probabilities; of con the concepts, their cosines, pairs of the batch and
of the bank, and losses and gradients with and without the bank; of bank both updates, with their permutations.
"""

import pytest
import torch
import torch.nn.functional as F
from common import golden_tensors
from torch import Tensor
from torch.testing import assert_close

from stego_lib.model import ClusterProbe
from stego_lib.successors import cause

G = golden_tensors("family/cause")
VALUES = dict(rtol=1e-4, atol=1e-6)
NAMES = {
    *("feat", "codebook", "mod.loss", "mod.grad_codebook", "mod.W_img0", "mod.edges", "mod.assignment_img0"),
    *("mod.loss_per_image", "grid.order", "grid.sampled", "grid.loss", "grid.grad_codebook"),
    *("probe.centroids", "probe.loss", "probe.grad", "probe.argmax", "probe.logprobs_alpha3"),
    *("con.index", "con.codebook_cosine", "con.positives", "con.negatives", "con.bank_positives", "con.bank_negatives"),
    *(
        "con.student",
        "con.teacher",
        "con.empty_bank.loss",
        "con.empty_bank.grad_student",
        "con.loss",
        "con.grad_student",
    ),
    *(f"bank.{name}{it}" for name in ("feat", "teacher", "perm_concepts", "perm_lengths", "perms") for it in (0, 1)),
    *(f"bank.{name}_after{it}" for name in ("sizes", "vectors") for it in (0, 1)),
}
"""What the tests of this file look up."""
COUNT, CELLS, CHANNELS = G["feat"].shape
GRID = tuple(G["probe.argmax"].shape[1:])
CODEBOOK, CONCEPTS = G["codebook"], G["con.index"].flatten()
KEEP = int(G["bank.sizes_after1"].max())
"""The bank's limit, which the lists of frequent concepts have reached."""


def maps(patches: Tensor) -> Tensor:
    """(image, patch, channel) -> (image, channel, row, column)."""
    return patches.mT.unflatten(2, GRID)


def assert_gradient(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_every_array_is_replayed():
    assert set(G) == NAMES


def test_graph_and_assignment():
    graphs, edges = zip(*map(cause.modularity, G["feat"]), strict=True)
    assert_close(graphs[0], G["mod.W_img0"], rtol=1e-4, atol=1e-5)
    assert_close(torch.stack(edges), G["mod.edges"], **VALUES)
    assert_close(cause.assignment(G["feat"][0], CODEBOOK), G["mod.assignment_img0"], **VALUES)


@pytest.mark.parametrize(
    "chunk", [cause.CHUNK, 3 * G["mod.assignment_img0"].numel()], ids=["at once", "three rows at a time"]
)
@pytest.mark.parametrize("name", ["mod", "grid", "probe"])
def test_modularity_loss(name, chunk, monkeypatch):
    monkeypatch.setattr(cause, "CHUNK", chunk)
    features = maps(G["feat"])
    if name == "grid":
        features = cause.sample_blocks(features, G["grid.order"], side())
    entries = (G["probe.centroids"] if name == "probe" else CODEBOOK).clone().requires_grad_()
    loss = cause.modularity_loss(features, entries)
    loss.backward()
    assert_close(loss.detach(), G[f"{name}.loss"], **VALUES)
    assert_gradient(entries.grad, G["probe.grad" if name == "probe" else f"{name}.grad_codebook"])


def test_modularity_loss_of_each_image():
    losses = [cause.modularity_loss(image[None], CODEBOOK) for image in maps(G["feat"])]
    assert_close(torch.stack(losses), G["mod.loss_per_image"], **VALUES)


def side() -> int:
    """Patches per side of a block."""
    return round((COUNT * CELLS / len(G["grid.order"])) ** 0.5)


def test_sampled_blocks():
    sampled = cause.sample_blocks(maps(G["feat"]), G["grid.order"], side())
    assert torch.equal(sampled.flatten(2).mT, G["grid.sampled"])
    assert side() == cause.BLOCK


def test_cluster_prediction():
    probe = ClusterProbe(CHANNELS, len(G["probe.centroids"]))
    probe.load_state_dict({"clusters": G["probe.centroids"]})
    features = maps(G["feat"])
    assert torch.equal(probe(features).argmax(1), G["probe.argmax"].long())
    assert_close(probe.log_probabilities(features, 3.0).detach(), G["probe.logprobs_alpha3"], **VALUES)


def test_concepts_and_their_cosines():
    assert torch.equal(cause.nearest_concepts(maps(G["feat"]), CODEBOOK), CONCEPTS)
    cosines = G["con.codebook_cosine"]
    assert_close(F.cosine_similarity(CODEBOOK[:, None], CODEBOOK, dim=2), cosines, **VALUES)
    attract, repel = cause.concept_pairs(CODEBOOK)
    assert torch.equal(attract, cosines > 0.3) and torch.equal(repel, cosines < 0.1)


def test_pairs_of_the_batch_and_of_the_bank():
    another = ~torch.eye(COUNT * CELLS, dtype=torch.bool)
    for pairs, name in zip(cause.concept_pairs(CODEBOOK), ("positives", "negatives"), strict=True):
        batch = pairs[CONCEPTS][:, CONCEPTS] & another
        assert torch.equal(batch.unflatten(0, (COUNT, CELLS)), G[f"con.{name}"].bool())
        of_bank = pairs[CONCEPTS][:, stored_bank(1)[1]]
        assert torch.equal(of_bank.unflatten(0, (COUNT, CELLS)), G[f"con.bank_{name}"].bool())


def stored_bank(it: int) -> tuple[Tensor, Tensor]:
    """The bank after an update: vectors and concepts."""
    sizes = G[f"bank.sizes_after{it}"]
    return G[f"bank.vectors_after{it}"], torch.arange(len(sizes)).repeat_interleave(sizes)


def empty_bank() -> tuple[Tensor, Tensor]:
    return torch.empty(0, G["con.teacher"].shape[2]), torch.empty(0, dtype=torch.long)


@pytest.mark.parametrize("chunk", [cause.CHUNK, 5 * COUNT * CELLS], ids=["at once", "five anchors at a time"])
@pytest.mark.parametrize(
    "name, bank", [("con.empty_bank", empty_bank()), ("con", stored_bank(1))], ids=["empty", "bank"]
)
def test_contrastive_loss(name, bank, chunk, monkeypatch):
    monkeypatch.setattr(cause, "CHUNK", chunk)
    student = G["con.student"].clone().requires_grad_()
    loss = cause.contrastive_loss(maps(student), maps(G["con.teacher"]), CONCEPTS, cause.concept_pairs(CODEBOOK), bank)
    loss.backward()
    assert_close(loss.detach(), G[f"{name}.loss"], **VALUES)
    assert_gradient(student.grad, G[f"{name}.grad_student"])


def test_two_updates_of_the_bank():
    bank = empty_bank()
    for it in (0, 1):
        concepts = cause.nearest_concepts(maps(G[f"bank.feat{it}"]), CODEBOOK)
        present, lengths = concepts.unique(return_counts=True)
        assert torch.equal(present, G[f"bank.perm_concepts{it}"]) and torch.equal(lengths, G[f"bank.perm_lengths{it}"])
        order = [
            (concepts == concept).nonzero()[:, 0][permutation]
            for concept, permutation in zip(present, G[f"bank.perms{it}"].split(lengths.tolist()), strict=True)
        ]
        bank = cause.update_bank(bank, maps(G[f"bank.teacher{it}"]), concepts, torch.cat(order), KEEP)
        vectors, labels = stored_bank(it)
        assert torch.equal(bank[0], vectors) and torch.equal(bank[1], labels)
