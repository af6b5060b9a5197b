"""CAUSE-MLP (Kim et al., 2023, "Causal Unsupervised Semantic Segmentation"): pure functions.

A codebook of concepts splits frozen features so that similar patches share entries (modularity of a graph). A head and a
projection then pull together the patches whose concepts are alike, against a moving average of both and a bank of its
vectors. A cluster probe with the same modularity loss ends it.

Shapes: maps (B, C, h, w); patches of one image (P, C) in the order row, column, M = B h w those of a batch, image by image;
concepts int64 (M,), numbers of codebook entries. The formulas are those of the released code (`segment_module.py`, commit
ee0aa84), which the project's golden numbers replay. Not repeated is its last stage, which trains the evaluated head with
labels, see `probes_loss`.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batches import seeded
from ..experiment import Experiment
from ..features import Features
from ..model import ClusterProbe, LinearProbe
from ..run import Run
from ..utils.errors import StegoError
from ..utils.progress import progress
from .base import Successor, at_cells, random_cells, states
from .hp import projected, unit_patches, update_ema

CODEBOOK, PROJECTION = 2048, 2048
"""Entries of the codebook, channels of the head's projection (released code)."""
BANK, DECAY = 100, 0.99
"""Vectors that the bank keeps of a concept, and decay of the averaged head, as `hp.update_ema` takes it (released code)."""
ATTRACT, REPEL = 0.3, 0.1
"""Concepts with a larger cosine attract, with a smaller one repel; between them is neither (released code)."""
SHARPNESS, TAU = 0.1, 0.07
"""Temperature of the shared assignment and of the contrastive loss (released code)."""
BLOCK = 4
"""Side of the blocks that `sample_blocks` thins out (released code)."""
CHUNK = 1 << 22
"""Numbers in memory at once. Few are faster on a CPU, since they stay in its cache."""


def random_order(blocks: int, block: int, generator: torch.Generator) -> Tensor:
    """A random patch of each block of block x block patches, int64 (blocks,)."""
    return torch.randint(block**2, (blocks,), generator=generator)


def sample_blocks(maps: Tensor, order: Tensor, block: int = BLOCK) -> Tensor:
    """Keeps one patch of each block of block x block patches.

    Parameters
    ----------
    maps
        (B, C, h, w).
    order
        Which patch of its block is kept, row by row in [0, block * block): int64 (B h w / block ** 2,), the blocks by image,
        row, column. See `random_order`.
    block
        A divisor of h and w.

    Returns
    -------
    Tensor
        (B, C, h / block, w / block).

    Raises
    ------
    StegoError
        If the blocks do not fill the grid.
    """
    count, channels, height, width = maps.shape
    if height % block or width % block:
        raise StegoError(
            f"blocks of {block} x {block} patches do not fill a grid of {height} x {width}; give a divisor of both"
        )
    blocks = maps.unfold(2, block, block).unfold(3, block, block).flatten(4)
    return blocks.gather(4, order.view(count, 1, *blocks.shape[2:4], 1).expand(-1, channels, -1, -1, -1)).squeeze(4)


def modularity(patches: Tensor) -> tuple[Tensor, Tensor]:
    """The graph of one image's patches: A - d d^T / e, (P, P), and e.

    A holds the cosines above 0 without the diagonal, d its row sums, e its sum.
    """
    unit = F.normalize(patches, dim=1)
    adjacency = (unit @ unit.T).clamp(min=0).fill_diagonal_(0)
    degree = adjacency.sum(1)
    edges = degree.sum()
    return adjacency - torch.outer(degree, degree) / edges.clamp(min=torch.finfo(edges.dtype).tiny), edges


def assignment(patches: Tensor, codebook: Tensor) -> Tensor:
    """Cosines of patches (P, C) and codebook entries (K, C), 0 where negative: (P, K)."""
    return (F.normalize(patches, dim=1) @ F.normalize(codebook, dim=1).T).clamp(min=0)


def shared_assignment(assigned: Tensor) -> Tensor:
    """max over k of tanh(C_pk C_qk / 0.1): whether two patches share an entry, (P, K) -> (P, P).

    The maximum is looked up without a gradient, some rows at a time, so that no (P, K, P) array is made.
    """
    rows = max(1, CHUNK // assigned.numel())
    with torch.no_grad():
        best = torch.cat([(some[:, None] * assigned).argmax(2) for some in assigned.split(rows)])
    return (assigned.gather(1, best) * assigned.gather(1, best.T).T / SHARPNESS).tanh()


def modularity_loss(feats: Tensor, codebook: Tensor) -> Tensor:
    """Negative modularity of the codebook as a soft clustering, mean over images; trains a codebook or a cluster probe.

    Parameters
    ----------
    feats
        (B, C, h, w); no gradient flows into them.
    codebook
        Entries, or the cluster probe's centroids, (K, C).

    Returns
    -------
    Tensor
        A number in [-1, 1]; an image without two similar patches gives 0.

    Examples
    --------
    >>> feats = sample_blocks(torch.rand(2, 384, 28, 28), random_order(2 * 49, BLOCK, torch.Generator()))
    >>> modularity_loss(feats, torch.rand(2048, 384)).shape
    torch.Size([])
    """
    losses = []
    for patches in feats.detach().flatten(2).mT:
        graph, edges = modularity(patches)
        shared = shared_assignment(assignment(patches, codebook))
        losses.append(-(graph * shared).sum() / edges.clamp(min=torch.finfo(edges.dtype).tiny))
    return torch.stack(losses).mean()


def nearest_concepts(feats: Tensor, codebook: Tensor) -> Tensor:
    """The entry with the largest cosine, of every patch of the batch: (B, C, h, w), (K, C) -> int64 (B h w,)."""
    return (unit_patches(feats) @ F.normalize(codebook, dim=1).T).argmax(1)


def concept_pairs(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Concepts that attract and concepts that repel: their cosine is above `ATTRACT`, below `REPEL`.

    codebook: (K, C). Both bool (K, K); patches p and q are a positive pair where the first holds at their concepts, a negative
    one where the second does. The codebook is frozen, so once is enough.
    """
    unit = F.normalize(codebook, dim=1)
    cosines = unit @ unit.T
    return cosines > ATTRACT, cosines < REPEL


def contrastive_loss(
    student: Tensor, teacher: Tensor, concepts: Tensor, pairs: tuple[Tensor, Tensor], bank: tuple[Tensor, Tensor]
) -> Tensor:
    """InfoNCE against the teacher's patches of the batch and against the bank.

    With l_pq the cosine of p and q divided by `TAU`, a term is the mean over all positive pairs (p, q) of one image's anchors p
    of log sum_k exp(l_pk) - l_pq, where k runs over the positive and negative pairs of p; 0 without a positive pair. A patch
    makes no pair with itself in the batch. The loss is the mean over images, or over both terms of each image once the bank
    holds something. Time grows with M squared.

    Parameters
    ----------
    student
        Projections of the head, (B, D, h, w).
    teacher
        Those of the averaged head and projection, (B, D, h, w), without gradient.
    concepts
        `nearest_concepts`, int64 (M,).
    pairs
        `concept_pairs` of the codebook.
    bank
        Vectors (V, D) and their concepts, int64 (V,), see `update_bank`; both empty at first.

    Returns
    -------
    Tensor
        A number.

    Examples
    --------
    >>> feats, codebook = torch.rand(2, 384, 8, 8), torch.rand(30, 384)
    >>> student, teacher = torch.rand(2, 64, 8, 8), torch.rand(2, 64, 8, 8)
    >>> empty = torch.empty(0, 64), torch.empty(0, dtype=torch.long)
    >>> contrastive_loss(student, teacher, nearest_concepts(feats, codebook), concept_pairs(codebook), empty).shape
    torch.Size([])
    """
    z, units, tiny = unit_patches(student), unit_patches(teacher).detach(), torch.finfo(student.dtype).tiny
    attract, allowed = pairs[0].to(z.dtype), (pairs[0] | pairs[1]).to(z.dtype)
    leaf, gradient, value = z.detach().requires_grad_(), torch.zeros_like(z), z.new_zeros(())
    partners = [(units, concepts), (F.normalize(bank[0], dim=1), bank[1])]
    partners = partners[: 1 + bool(len(bank[0]))]
    for others, theirs in partners:
        # Positives depend on concepts alone: their number, and the sum of their vectors, of each concept.
        number = attract @ theirs.bincount(minlength=len(attract)).to(z.dtype)
        pulling = attract @ torch.zeros(len(attract), z.shape[1], device=z.device).index_add_(0, theirs, others)
        for patches in torch.arange(len(z), device=z.device).chunk(len(student)):
            loss, slope, positives = z.new_zeros(()), torch.zeros_like(z), z.new_zeros(())
            # The (M, A) arrays of a batch would fill the memory, so each chunk of anchors gives its gradient at once.
            for anchors in patches.split(max(1, CHUNK // len(others))):
                of_anchors = concepts[anchors]
                inside = allowed[:, of_anchors].index_select(0, theirs)
                count, pull = number[of_anchors], pulling[of_anchors]
                if theirs is concepts:  # the batch, where an anchor meets itself
                    inside.scatter_(0, anchors[None], 0.0)
                    count, pull = count - 1, pull - others[anchors]
                with torch.enable_grad():
                    near = leaf[anchors] / TAU
                    # Cosines / TAU are small enough for a bare exponential; `tiny` keeps anchors without a pair finite.
                    spread = ((others @ near.T).exp() * inside).sum(0).clamp(min=tiny).log()
                    chunk = (count * spread - (near * pull).sum(1)).sum()
                    slope += torch.autograd.grad(chunk, leaf)[0]
                loss += chunk.detach()
                positives += count.sum()
            share = 1 / (positives.clamp(min=1) * len(student) * len(partners))
            value, gradient = value + loss * share, gradient + slope * share
    handle = (z * gradient).sum()  # has the gradient; its value is subtracted
    return value + (handle - handle.detach())


def update_bank(
    bank: tuple[Tensor, Tensor], teacher: Tensor, concepts: Tensor, order: Tensor, keep: int = BANK
) -> tuple[Tensor, Tensor]:
    """Appends a random half of the teacher's vectors of each concept to the bank, which keeps the last ones of each.

    Parameters
    ----------
    bank
        Vectors (V, D) and their concepts, int64 (V,), which ascend.
    teacher
        Projections of the averaged head, (B, D, h, w).
    concepts
        Of each patch, int64 (M,).
    order
        A random permutation of the M patches. Of a concept with n patches the first n // 2 in it are appended, in this order.
    keep
        Vectors that are kept of a concept, the newest.

    Returns
    -------
    tuple of Tensor
        The new bank.
    """
    order = order[concepts[order].argsort(stable=True)]
    rank, count = ranks(concepts[order])
    new = order[rank < count // 2]
    vectors = torch.cat([bank[0], teacher.detach().movedim(1, -1).flatten(0, 2)[new]])
    labels = torch.cat([bank[1], concepts[new]])
    labels, order = labels.sort(stable=True)
    rank, count = ranks(labels)
    kept = rank >= count - keep
    return vectors[order[kept]], labels[kept]


def ranks(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Number of each entry among those of the same label, from 0, and how many these are; labels: int64 (n,), ascending."""
    counts = labels.bincount()
    return torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels], counts[labels]


def probes_loss(code: Tensor, cluster_probe: ClusterProbe, linear_probe: LinearProbe, label: Tensor) -> Tensor:
    """The last stage: modularity loss of the cluster probe plus cross-entropy of the linear probe.

    No gradient flows into the code. In the released code that of the cross-entropy does, so that labels train the head whose
    clusters are evaluated; this is not repeated.

    Parameters
    ----------
    code
        Of the averaged head, (B, K, h, w).
    cluster_probe, linear_probe
        Both are trained. Predictions are `cluster_probe(code).argmax(1)`, for the CRF `cluster_probe.log_probabilities`.
    label
        int64 (B, H, W).

    Returns
    -------
    Tensor
        A number.
    """
    return modularity_loss(code, cluster_probe.clusters) + linear_probe.loss(code.detach(), label)


# ---------------------------------------------------------------------------------------------- training

POSITIONS = 121
"""Random positions of an image that a contrastive step sees; the released code takes all, whose pairs take minutes on a CPU."""
FITTING = 100
"""Steps in which the codebook, and at the end the cluster probe, are fitted, each with the learning rate of the probes."""


class Trainer(Successor):
    """Trains codebook, head and cluster probe, one after the other; labels train the linear probe alone.

    The averaged head becomes the head of the run.
    """

    @classmethod
    def refuse(cls, experiment: Experiment) -> None:
        super().refuse(experiment)
        if experiment.official.keep_every:
            raise StegoError(
                "method='cause' fits its clusters after the last step, so no earlier one can be scored: validate_every=0"
            )

    def __init__(self, run: Run, features: Features, neighbors: Tensor):
        super().__init__(run, features, neighbors)
        head, codes = self.model.head, self.model.head.code_dim
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(self.experiment.seed)
            self.codebook = torch.randn(CODEBOOK, features.shape[1]).to(self.device)
            self.project = nn.Linear(codes, PROJECTION).to(self.device)
        self.average, self.average_project = (
            copy.deepcopy(one).eval().requires_grad_(False) for one in (head, self.project)
        )
        self.optimizer = torch.optim.Adam([*head.parameters(), *self.project.parameters()], self.experiment.lr_head)
        self.bank = torch.empty(0, PROJECTION, device=self.device), torch.empty(0, dtype=torch.long, device=self.device)

    def columns(self) -> list[str]:
        return ["loss", "positives", "negatives", "bank"]

    def begin(self) -> dict[str, Any]:
        found = super().begin()
        self.codebook = self._fitted(self.codebook, lambda feats: feats, "fitting the codebook")
        self.pairs = concept_pairs(self.codebook)
        return found

    def step(self, number: int) -> dict[str, float]:
        _, feats, generator = self.draw(number)
        student = self.model.head(feats)
        with torch.no_grad():
            teacher = self.average(feats)
        cells = random_cells(feats, POSITIONS, generator)
        feats, student, teacher = (at_cells(one, cells) for one in (feats, student, teacher))
        with torch.no_grad():
            teacher, concepts = projected(self.average_project, teacher), nearest_concepts(feats, self.codebook)
            positives, negatives = (found[concepts][:, concepts].float().mean() for found in self.pairs)
        loss = contrastive_loss(projected(self.project, student), teacher, concepts, self.pairs, self.bank)
        self.bank = update_bank(
            self.bank, teacher, concepts, torch.randperm(len(concepts), generator=generator).to(self.device)
        )
        values = self.update(
            loss, {"positives": positives, "negatives": negatives, "bank": torch.tensor(len(self.bank[1]))}
        )
        for average, own in ((self.average, self.model.head), (self.average_project, self.project)):
            update_ema(average, own, DECAY)
        return values

    def finish(self) -> None:
        self.model.head.load_state_dict(self.average.state_dict())
        self.model.eval()
        clusters = self.model.cluster_probe.clusters
        clusters.data = self._fitted(clusters.detach(), self.model.head, "fitting the cluster probe (modularity)")
        super().finish()

    def _fitted(self, entries: Tensor, codes: nn.Module | Any, what: str) -> Tensor:
        """Entries (K, C) after `FITTING` steps of `modularity_loss` on codes(features)."""
        entries = entries.clone().requires_grad_()
        optimizer, size = torch.optim.Adam([entries], self.experiment.lr_probes), self.experiment.batch_size
        for number in progress(range(FITTING), what):
            generator = seeded(self.experiment.seed, what, number)
            rows = torch.randperm(len(self.features), generator=generator)[:size]
            with torch.no_grad():
                maps = _whole_blocks(codes(self.model.centered(self.features.rows(rows, self.device))), generator)
                order = random_order(maps[:, 0].numel() // BLOCK**2, BLOCK, generator).to(self.device)
                maps = sample_blocks(maps, order)
            optimizer.zero_grad()
            with torch.enable_grad():
                modularity_loss(maps, entries).backward()
            optimizer.step()
        return entries.detach()

    def state(self) -> dict[str, Any]:
        modules = states(average=self.average, project=self.project, average_project=self.average_project)
        return modules | {"codebook": self.codebook, "bank": list(self.bank)}

    def restore(self, state: dict[str, Any]) -> None:
        for name in ("average", "project", "average_project"):
            getattr(self, name).load_state_dict(state[name])
        self.codebook = state["codebook"].to(self.device)
        self.pairs = concept_pairs(self.codebook)
        vectors, concepts = (part.to(self.device) for part in state["bank"])
        self.bank = vectors, concepts


def _whole_blocks(maps: Tensor, generator: torch.Generator) -> Tensor:
    """A random part of the maps (B, C, h, w) whose sides are multiples of `BLOCK`."""
    sides = [side // BLOCK * BLOCK for side in maps.shape[2:]]
    tops = [
        int(torch.randint(side - used + 1, (), generator=generator))
        for side, used in zip(maps.shape[2:], sides, strict=True)
    ]
    return maps[:, :, tops[0] : tops[0] + sides[0], tops[1] : tops[1] + sides[1]]
