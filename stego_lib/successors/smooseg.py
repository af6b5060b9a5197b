"""SmooSeg (Lan et al., NeurIPS 2023, "SmooSeg: Smoothness Prior for Unsupervised Semantic Segmentation"): pure functions.

Positions with similar features should get similar labels. A teacher's prototypes turn codes into probabilities, whose
distances the smoothness loss weighs by feature correspondences; it trains the head. The student's prototypes learn the
labels that the teacher gives, and the teacher is their moving average.

Shapes: features (B, C, h, w), codes (B, K, h, w), prototypes (n, K), logits and probabilities (B, n, h, w), pairs of
positions (B, h, w, i, j). The formulas are those of the released code (`modules.py` and `train_segmentation.py`, commit
1eecdec), which the project's golden numbers replay.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..features import Features
from ..loss import center, correspondence, negative_permutation
from ..run import Run
from .base import Successor

TEMPERATURE, DECAY = 0.1, 0.998
"""Temperature of the teacher's probabilities, and decay of its moving average (released code)."""


def initial_prototypes(prototypes: Tensor) -> Tensor:
    """What both student and teacher start from, of random rows (n, K): the same of unit length."""
    return F.normalize(prototypes, dim=1)


def logits(code: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine of each code with each prototype: (B, K, h, w), (n, K) -> (B, n, h, w), in [-1, 1].

    The nearest prototype of the teacher is the prediction, after codes were upsampled; `model.ClusterProbe` gives the same
    numbers.
    """
    return torch.einsum("bkhw,nk->bnhw", F.normalize(code, dim=1), F.normalize(prototypes, dim=1))


def probabilities(teacher_logits: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """softmax(logits / temperature) over prototypes, (B, n, h, w) (paper, section 3.3)."""
    return (teacher_logits / temperature).softmax(1)


def distance(probs1: Tensor, probs2: Tensor) -> Tensor:
    """1 - cosine of the probabilities at every position of two maps (paper, section 3.2).

    (B, n, h, w), (B, n, i, j) -> (B, h, w, i, j), in [0, 1].
    """
    return 1 - correspondence(probs1, probs2)


def pair_smoothness(
    feats1: Tensor, feats2: Tensor, distances: Tensor, shift: float, *, centering: bool = True
) -> Tensor:
    """(R - shift) * distance of every pair of positions (paper, section 3.2), not yet averaged.

    Its memory grows with (h w) squared; `smoothness_loss` is its mean without these pairs.

    Parameters
    ----------
    feats1, feats2
        (B, C, h, w) and (B, C, i, j); no gradient flows into them.
    distances
        (B, h, w, i, j), see `distance`.
    shift
        b: pairs whose correspondence R is above it attract, others repel.
    centering
        Center R spatially, see `loss.center`.

    Returns
    -------
    Tensor
        (B, h, w, i, j).
    """
    with torch.no_grad():
        force = correspondence(feats1, feats2)
        force = (center(force) if centering else force) - shift
    return force * distances


def moments(feats: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All that `smoothness_loss` needs of an image: means over its positions, so that no pair of them is formed.

    Parameters
    ----------
    feats
        (B, C, h, w); no gradient flows into them.
    probs
        `probabilities` at the same positions, (B, n, h, w).

    Returns
    -------
    tuple of Tensor
        The mean unit feature f (B, C), the mean unit vector P of probabilities (B, n), and the mean of f P^T (B, C, n).
    """
    with torch.no_grad():
        f = F.normalize(feats.flatten(2), dim=1, eps=1e-10)
    p = F.normalize(probs.flatten(2), dim=1, eps=1e-10)
    return f.mean(2), p.mean(2), f @ p.mT / f.shape[2]


def smoothness_loss(
    images: tuple[Tensor, Tensor, Tensor],
    partners: tuple[Tensor, Tensor, Tensor],
    shift: float,
    *,
    centering: bool = True,
) -> tuple[Tensor, Tensor]:
    """Mean of `pair_smoothness` over all pairs of positions, in time and memory that grow with h w alone.

    Correspondences and cosines of probabilities are inner products, so the mean of their products over all pairs is an
    inner product too: mean_pq (f_p . f_q)(P_p . P_q) = <mean_p f_p P_p^T, mean_q f_q P_q^T>.

    Parameters
    ----------
    images, partners
        `moments` of the images, and of their partners: of the same images (intra), or of others (inter).
    shift, centering
        As in `pair_smoothness`.

    Returns
    -------
    tuple of Tensor
        The loss, a number, and the mean distance in [0, 1], without gradient.

    Examples
    --------
    >>> own = moments(torch.rand(2, 384, 28, 28), torch.rand(2, 27, 28, 28).softmax(1))
    >>> loss, mean_distance = smoothness_loss(own, own, -0.02)
    >>> loss.shape
    torch.Size([])
    """
    (f, p, both), (f2, p2, both2) = images, partners
    similar, distances = (f * f2).sum(1).mean(), 1 - (p * p2).sum(1).mean()
    if centering:  # features of the partner minus their mean: the mean correspondence becomes 0, and is added back
        both2 = both2 - f2[:, :, None] * p2[:, None]
        loss = (similar - shift) * distances - (both * both2).sum((1, 2)).mean()
    else:
        loss = similar - shift * distances - (both * both2).sum((1, 2)).mean()
    return loss, distances.detach()


def data_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy of the student's logits, at temperature 1, against the teacher's labels (paper, section 3.3).

    Both (B, n, h, w); mean over all positions. No gradient flows into the teacher's logits.
    """
    return F.cross_entropy(student_logits, teacher_logits.argmax(1))


@torch.no_grad()
def update_teacher(teacher: Tensor, student: Tensor, decay: float = DECAY) -> None:
    """t <- decay t + (1 - decay) s of prototypes (n, K), in place and without normalization.

    As in the released code, a step does this after its losses and before the student's update.
    """
    teacher.lerp_(student, 1 - decay)


def smooseg_loss(
    feats: Tensor,
    code: Tensor,
    teacher: Tensor,
    student: Tensor,
    partners: Tensor,
    shifts: tuple[float, float],
    *,
    temperature: float = TEMPERATURE,
    centering: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Smoothness within and between images plus data loss, each of weight 1 (paper, section 3).

    The smoothness trains the head through the code, the data loss the student, and nothing the teacher.

    Parameters
    ----------
    feats, code
        Frozen features (B, C, h, w) and codes (B, K, h, w) of the same positions.
    teacher, student
        Prototypes (n, K).
    partners
        Another image of the batch for each, int64 (B,), see `loss.negative_permutation`.
    shifts
        b within images and between them; published (-0.02, 0.5) for Cityscapes, (-0.02, 0.48) for CocoStuff.
    temperature
        As in `probabilities`.
    centering
        As in `pair_smoothness`.

    Returns
    -------
    tuple
        The loss, and without gradient "loss_self", "loss_rand", "loss_data" and the mean distances "distance_self" and
        "distance_rand".

    Examples
    --------
    >>> feats, code = torch.rand(2, 384, 28, 28), torch.rand(2, 64, 28, 28)
    >>> teacher, student = torch.rand(2, 27, 64)
    >>> loss, parts = smooseg_loss(feats, code, teacher, student, torch.tensor([1, 0]), (-0.02, 0.5))
    >>> list(parts)
    ['loss_self', 'loss_rand', 'loss_data', 'distance_self', 'distance_rand']
    """
    of_teacher = logits(code, teacher.detach())
    mean_f, mean_p, both = moments(feats, probabilities(of_teacher, temperature))
    own, other = (mean_f, mean_p, both), (mean_f[partners], mean_p[partners], both[partners])
    smooth, distance_own = smoothness_loss(own, own, shifts[0], centering=centering)
    rand, distance_rand = smoothness_loss(own, other, shifts[1], centering=centering)
    data = data_loss(logits(code.detach(), student), of_teacher)
    parts = dict(
        loss_self=smooth, loss_rand=rand, loss_data=data, distance_self=distance_own, distance_rand=distance_rand
    )
    return smooth + rand + data, {name: part.detach() for name, part in parts.items()}


# ---------------------------------------------------------------------------------------------- training


class Trainer(Successor):
    """Trains head and prototypes; the cluster probe holds the teacher's, so its clusters are the prediction.

    Of the run's three shifts it uses the first, within images, and the last, between them.
    """

    unused = ("weights", "zero_clamp", "stabilize", "points", "neighbors", "negatives")

    def __init__(self, run: Run, features: Features, neighbors: Tensor):
        super().__init__(run, features, neighbors)
        self.teacher = self.model.cluster_probe.clusters.requires_grad_(False)
        self.teacher.copy_(initial_prototypes(self.teacher))
        self.student = nn.Parameter(self.teacher.clone())
        self.optimizer = torch.optim.Adam(
            [
                dict(params=self.model.head.parameters(), lr=self.experiment.lr_head),
                dict(params=[self.student], lr=self.experiment.lr_probes),
            ]
        )

    def columns(self) -> list[str]:
        return ["loss", "loss_self", "loss_rand", "loss_data"]

    def step(self, number: int) -> dict[str, float]:
        rows, feats, generator = self.draw(number)
        code = self.model.head(feats)
        own, _, rand = self.run.shifts
        loss, parts = smooseg_loss(
            self.model.head.dropout(feats),  # by a third mask, as in the released code
            code,
            self.teacher,
            self.student,
            negative_permutation(len(rows), generator).to(self.device),
            (own, rand),
            centering=self.experiment.centering,
        )
        update_teacher(self.teacher, self.student)
        return self.update(loss, {name: parts[name] for name in self.columns()[1:]})

    def state(self) -> dict[str, Any]:
        return {"student": self.student.detach()}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        self.student.copy_(state["student"])
