"""CAUSE-MLP (Kim et al., 2023, "Causal Unsupervised Semantic Segmentation").

A codebook of concepts is fitted to the frozen features, so that similar patches share entries (modularity of a graph).
Then a head and a projection are trained to attract patches with similar concepts, contrasted with a moving average of
both and a bank of its vectors. At the end the cluster probe is fitted by the same modularity loss.

Shapes: maps (B, C, h, w); patches of one image (P, C); concepts int64 (M,), codebook entries of M = B h w patches in
the order image, row, column. Formulas follow the released code (ByungKwanLee/Causal-Unsupervised-Segmentation, commit
ee0aa84) and are tested against its numbers. Its last stage trains the evaluated head with labels; here labels only
train the linear probe.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..batches import seeded
from ..features import Features
from ..run import Run
from ..utils.progress import progress
from ..utils.torch_state import drawing
from .base import Successor, at_cells, random_cells, unit_patches, update_ema, weighted_info_nce

# Entries of the codebook, channels of the projection, vectors per concept in the bank (released code).
CODEBOOK, PROJECTION, BANK = 2048, 2048, 100
# Decay of the averaged head and projection (released code).
DECAY = 0.99
# Concepts with a cosine above the first attract, below the second repel; pairs in between are ignored (released code).
ATTRACT, REPEL = 0.3, 0.1
# Temperatures of the shared assignment and of the contrastive loss (released code).
SHARPNESS, TAU = 0.1, 0.07
# Side of the blocks of `sample_blocks` (released code).
BLOCK = 4
# Random cells per image and step, as many as STEGO's points. The released code uses all, minutes per step on a CPU.
POSITIONS = 121
# Steps for fitting the codebook and the cluster probe.
FITTING_STEPS = 100


def sample_blocks(maps: Tensor, order: Tensor, block: int = BLOCK) -> Tensor:
    """Samples one patch of each block of block x block patches: (B, C, h, w) -> (B, C, h / block, w / block).

    order: index of the sampled patch in each block, int64 in [0, block ** 2), by image, row, column. `block` divides h
    and w.
    """
    blocks = maps.unfold(2, block, block).unfold(3, block, block).flatten(4)
    index = order.view(len(maps), 1, *blocks.shape[2:4], 1).expand(-1, maps.shape[1], -1, -1, -1)
    return blocks.gather(4, index).squeeze(4)


def modularity(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Modularity matrix A - d d^T / e of one image's patches, (P, P), and e.

    A holds positive cosines without the diagonal; d are its row sums, e is its sum.
    """
    unit = F.normalize(patches, dim=1)
    adjacency = (unit @ unit.T).clamp(min=0).fill_diagonal_(0)
    degree = adjacency.sum(1)
    edges = degree.sum()
    return adjacency - torch.outer(degree, degree) / edges.clamp(min=torch.finfo(edges.dtype).tiny), edges


def assignment(patches: Tensor, codebook: Tensor) -> Tensor:
    """Positive cosines of patches (P, C) and codebook entries (K, C), otherwise 0: (P, K)."""
    return (F.normalize(patches, dim=1) @ F.normalize(codebook, dim=1).T).clamp(min=0)


def modularity_loss(feats: Tensor, codebook: Tensor) -> Tensor:
    """Negative modularity of a codebook as a soft clustering, mean over images, in [-1, 1].

    The shared assignment of two patches is max_k tanh(C_pk C_qk / 0.1). feats: (B, C, h, w), without gradient;
    codebook: entries, or clusters of a cluster probe, (K, C).

    Examples
    --------
    >>> modularity_loss(torch.rand(2, 384, 7, 7), torch.rand(2048, 384)).shape
    torch.Size([])
    """
    losses = []
    for patches in feats.detach().flatten(2).mT:
        graph, edges = modularity(patches)
        assigned = assignment(patches, codebook)
        with torch.no_grad():
            best = (assigned[:, None] * assigned).argmax(2)  # (P, P), the entry with the largest shared assignment
        shared = (assigned.gather(1, best) * assigned.gather(1, best.T).T / SHARPNESS).tanh()
        losses.append(-(graph * shared).sum() / edges.clamp(min=torch.finfo(edges.dtype).tiny))
    return torch.stack(losses).mean()


def nearest_concepts(feats: Tensor, codebook: Tensor) -> Tensor:
    """Nearest codebook entry of each patch by cosine: (B, C, h, w), (K, C) -> int64 (B h w,)."""
    return (unit_patches(feats) @ F.normalize(codebook, dim=1).T).argmax(1)


def concept_pairs(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Attracting pairs of concepts (cosine above `ATTRACT`) and repelling ones (below `REPEL`): bool (K, K) each."""
    unit = F.normalize(codebook, dim=1)
    cosines = unit @ unit.T
    return cosines > ATTRACT, cosines < REPEL


def contrastive_loss(
    student: Tensor, teacher: Tensor, concepts: Tensor, pairs: tuple[Tensor, Tensor], bank: tuple[Tensor, Tensor]
) -> Tensor:
    """InfoNCE of each image's patches with the teacher's patches of the batch and with the bank, mean over both.

    Positive pairs have attracting concepts; the denominator also contains repelling ones. A patch is not paired with
    itself. Time grows with M squared.

    Parameters
    ----------
    student, teacher
        Projected codes of the head and, without gradient, of the averaged head, (B, D, h, w).
    concepts, pairs
        `nearest_concepts`, int64 (M,), and `concept_pairs` of the codebook.
    bank
        Vectors (V, D) and their concepts, int64 (V,), see `update_bank`; initially empty.

    Examples
    --------
    >>> feats, codebook = torch.rand(2, 384, 8, 8), torch.rand(30, 384)
    >>> student, teacher = torch.rand(2, 64, 8, 8), torch.rand(2, 64, 8, 8)
    >>> empty = torch.empty(0, 64), torch.empty(0, dtype=torch.long)
    >>> loss = contrastive_loss(student, teacher, nearest_concepts(feats, codebook), concept_pairs(codebook), empty)
    """
    z, units, bank_units = unit_patches(student), unit_patches(teacher).detach(), F.normalize(bank[0], dim=1)
    terms = []
    for anchors in torch.arange(len(z), device=z.device).chunk(len(student)):
        attract, repel = (alike[concepts[anchors]] for alike in pairs)
        others = torch.arange(len(z), device=z.device) != anchors[:, None]
        terms.append(_term(z[anchors], units, attract[:, concepts] & others, repel[:, concepts] & others))
        if len(bank_units):  # checkpointed, because the pairs with a full bank would fill the memory
            arguments = z[anchors], bank_units, attract[:, bank[1]], repel[:, bank[1]]
            terms.append(checkpoint(_term, *arguments, use_reentrant=False))
    return torch.stack(terms).mean()


def _term(anchors: Tensor, others: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    return weighted_info_nce(anchors @ others.T / TAU, positives, positives | negatives)


def update_bank(
    bank: tuple[Tensor, Tensor], teacher: Tensor, concepts: Tensor, order: Tensor, keep: int = BANK
) -> tuple[Tensor, Tensor]:
    """Appends half of the teacher's vectors of each concept to the bank, which keeps the newest `keep` per concept.

    bank: vectors (V, D) and their concepts, int64 (V,), ascending; teacher: (B, D, h, w); concepts: int64 (M,); order:
    random permutation of the M patches. The first n // 2 of the n patches of a concept are appended, in this order.
    """
    order = order[concepts[order].argsort(stable=True)]
    rank, count = _ranks(concepts[order])
    new = order[rank < count // 2]
    vectors = torch.cat([bank[0], teacher.detach().movedim(1, -1).flatten(0, 2)[new]])
    labels, order = torch.cat([bank[1], concepts[new]]).sort(stable=True)
    rank, count = _ranks(labels)
    kept = rank >= count - keep
    return vectors[order[kept]], labels[kept]


def _ranks(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of each entry among those with the same label, and their number; labels: int64 (n,), ascending."""
    counts = labels.bincount()
    return torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels], counts[labels]


class Trainer(Successor):
    """Fits the codebook, trains the head, fits the cluster probe. The averaged head becomes the head of the run."""

    clusters_fitted_last = True
    stored = ("codebook", "bank", "bank_concepts", "project", "average")
    logged = ("positives", "negatives", "bank")

    def __init__(self, run: Run, features: Features, neighbors: Tensor):
        super().__init__(run, features, neighbors)
        head = self.model.head
        with drawing(self.experiment.seed):
            self.codebook = torch.randn(CODEBOOK, features.shape[1]).to(self.device)
            self.project = nn.Conv2d(head.code_dim, PROJECTION, 1).to(self.device)
        self.student = nn.Sequential(head, self.project)
        self.average = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.student.parameters(), self.experiment.lr_head)
        self.bank = torch.empty(0, PROJECTION, device=self.device)
        self.bank_concepts = torch.empty(0, dtype=torch.long, device=self.device)

    def begin(self) -> dict[str, Any]:
        shifts = super().begin()
        self.codebook = self._fit(self.codebook, lambda feats: feats, "fitting the codebook")
        return shifts

    def step(self, number: int) -> dict[str, float]:
        _, feats, generator = self.draw(number)
        cells = random_cells(feats, POSITIONS, generator)
        student = self.project(at_cells(self.model.head(feats), cells))
        with torch.no_grad():
            teacher = self.average(at_cells(feats, cells))
            concepts, pairs = nearest_concepts(at_cells(feats, cells), self.codebook), concept_pairs(self.codebook)
            shares = [alike[concepts][:, concepts].float().mean() for alike in pairs]
        bank = self.bank, self.bank_concepts
        loss = contrastive_loss(student, teacher, concepts, pairs, bank)
        order = torch.randperm(len(concepts), generator=generator).to(self.device)
        self.bank, self.bank_concepts = update_bank(bank, teacher, concepts, order)
        values = self.update(loss, {"positives": shares[0], "negatives": shares[1], "bank": len(self.bank)})
        update_ema(self.average, self.student, DECAY)
        return values

    def finish(self) -> None:
        self.student.load_state_dict(self.average.state_dict())
        self.model.eval()
        clusters = self.model.cluster_probe.clusters
        clusters.data = self._fit(clusters.detach(), self.model.head, "fitting the cluster probe (modularity)")
        super().finish()

    def _fit(self, entries: Tensor, code: Callable[[Tensor], Tensor], title: str) -> Tensor:
        """Fits entries (K, C) to code(features) by `FITTING_STEPS` steps of `modularity_loss`."""
        entries = entries.clone().requires_grad_()
        optimizer, size = torch.optim.Adam([entries], self.experiment.lr_probes), self.experiment.batch_size
        for number in progress(range(FITTING_STEPS), title):
            generator = seeded(self.experiment.seed, title, number)
            rows = torch.randperm(len(self.features), generator=generator)[:size]
            with torch.no_grad():
                maps = code(self.model.centered(self.features.rows(rows, self.device)))
                height, width = (side // BLOCK * BLOCK for side in maps.shape[2:])
                top, left = (int(torch.randint(side % BLOCK + 1, (), generator=generator)) for side in maps.shape[2:])
                maps = maps[:, :, top : top + height, left : left + width]
                order = torch.randint(BLOCK**2, (maps[:, 0].numel() // BLOCK**2,), generator=generator)
                maps = sample_blocks(maps, order.to(self.device))
            optimizer.zero_grad()
            with torch.enable_grad():
                modularity_loss(maps, entries).backward()
            optimizer.step()
        return entries.detach()
