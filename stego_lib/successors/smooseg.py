"""SmooSeg (Lan et al., NeurIPS 2023, "SmooSeg: Smoothness Prior for Unsupervised Semantic Segmentation").

Positions with similar features should have similar labels. The teacher's prototypes turn codes into probabilities; the
smoothness loss weights distances of probabilities by feature correspondences and trains the head. The student's
prototypes learn the teacher's labels, and the teacher is their moving average.

Shapes: features (B, C, h, w), codes (B, K, h, w), prototypes (n, K), logits and probabilities (B, n, h, w). Formulas
follow the released code (mc-lan/SmooSeg, commit 1eecdec) and are tested against its numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..features import Features
from ..loss import negative_permutation
from ..run import Run
from .base import Successor

# Temperature of the teacher's probabilities, and decay of its moving average (released code).
TEMPERATURE, DECAY = 0.1, 0.998
# Means over the positions of an image, of features f (B, C), probabilities P (B, n), both normalized, and f P^T.
Moments = tuple[Tensor, Tensor, Tensor]


def logits(code: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine of each code with each prototype: (B, K, h, w), (n, K) -> (B, n, h, w)."""
    return torch.einsum("bkhw,nk->bnhw", F.normalize(code, dim=1), F.normalize(prototypes, dim=1))


def moments(feats: Tensor, probs: Tensor) -> Moments:
    """Moments of features (B, C, h, w), without gradient, and probabilities (B, n, h, w), for `smoothness_loss`."""
    with torch.no_grad():
        f = F.normalize(feats.flatten(2), dim=1, eps=1e-10)
    p = F.normalize(probs.flatten(2), dim=1, eps=1e-10)
    return f.mean(2), p.mean(2), f @ p.mT / f.shape[2]


def smoothness_loss(
    images: Moments, partners: Moments, shift: float, *, centering: bool = True
) -> tuple[Tensor, Tensor]:
    """mean_pq (R_pq - shift)(1 - cos(P_p, P_q)) over all pairs of positions of two images (paper, section 3.2).

    R and cosines are inner products, so no pair is computed:
    mean_pq (f_p . f_q)(P_p . P_q) = <mean_p f_p P_p^T, mean_q f_q P_q^T>.

    images, partners: `moments` of images and of their partners. Pairs with a correspondence above the shift attract.
    centering: center R spatially, see `loss.center`. Returns the loss and the mean distance 1 - cos.

    Examples
    --------
    >>> own = moments(torch.rand(2, 384, 28, 28), torch.rand(2, 27, 28, 28).softmax(1))
    >>> loss, distance = smoothness_loss(own, own, -0.02)
    """
    (f, p, both), (f2, p2, both2) = images, partners
    similarity, distance = (f * f2).sum(1).mean(), 1 - (p * p2).sum(1).mean()
    if centering:  # subtract the partner's mean feature; `similarity` adds the mean correspondence back
        both2 = both2 - f2[:, :, None] * p2[:, None]
        loss = (similarity - shift) * distance - (both * both2).sum((1, 2)).mean()
    else:
        loss = similarity - shift * distance - (both * both2).sum((1, 2)).mean()
    return loss, distance.detach()


def smooseg_loss(
    feats: Tensor, code: Tensor, teacher: Tensor, student: Tensor, partners: Tensor, shifts: tuple[float, float], *,
    temperature: float = TEMPERATURE, centering: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Smoothness within and between images plus data loss, without weights (paper, section 3).

    Smoothness trains the head; the data loss, cross-entropy with the teacher's labels, trains the student's prototypes.
    Returns also the detached parts "loss_self", "loss_rand", "loss_data", "distance_self" and "distance_rand".

    Parameters
    ----------
    feats, code, teacher, student
        Frozen features (B, C, h, w), codes (B, K, h, w) and prototypes (n, K). The teacher has no gradient.
    partners
        Another image of the batch for each image, int64 (B,), see `loss.negative_permutation`.
    shifts
        b within and between images; published: (-0.02, 0.5) for Cityscapes, (-0.02, 0.48) for CocoStuff.

    Examples
    --------
    >>> feats, code = torch.rand(2, 384, 28, 28), torch.rand(2, 64, 28, 28)
    >>> teacher, student = torch.rand(2, 27, 64)
    >>> loss, parts = smooseg_loss(feats, code, teacher, student, torch.tensor([1, 0]), (-0.02, 0.5))
    """
    teacher_logits = logits(code, teacher.detach())
    own = moments(feats, (teacher_logits / temperature).softmax(1))
    other = (own[0][partners], own[1][partners], own[2][partners])
    smooth, distance_self = smoothness_loss(own, own, shifts[0], centering=centering)
    rand, distance_rand = smoothness_loss(own, other, shifts[1], centering=centering)
    data = F.cross_entropy(logits(code.detach(), student), teacher_logits.argmax(1))
    parts = {"loss_self": smooth.detach(), "loss_rand": rand.detach(), "loss_data": data.detach()}
    return smooth + rand + data, parts | {"distance_self": distance_self, "distance_rand": distance_rand}


class Trainer(Successor):
    """Trains head and prototypes. The teacher's prototypes are the clusters of the model.

    The first and the last of the run's shifts apply within and between images.
    """

    stored = ("student",)
    logged = ("loss_self", "loss_rand", "loss_data")

    def __init__(self, run: Run, features: Features, neighbors: Tensor):
        super().__init__(run, features, neighbors)
        self.teacher = self.model.cluster_probe.clusters.requires_grad_(False)
        self.teacher.copy_(F.normalize(self.teacher, dim=1))
        self.student = nn.Parameter(self.teacher.clone())
        head = dict(params=self.model.head.parameters(), lr=self.experiment.lr_head)
        self.optimizer = torch.optim.Adam([head, dict(params=[self.student], lr=self.experiment.lr_probes)])

    def step(self, number: int) -> dict[str, float]:
        rows, feats, generator = self.draw(number)
        code = self.model.head(feats)
        feats = self.model.head.dropout(feats)  # a third mask, as in the released code
        partners = negative_permutation(len(rows), generator).to(self.device)
        shifts = self.run.shifts[0], self.run.shifts[2]
        loss, parts = smooseg_loss(
            feats, code, self.teacher, self.student, partners, shifts, centering=self.experiment.centering
        )
        self.teacher.lerp_(self.student.detach(), 1 - DECAY)  # before the student's update, as in the released code
        return self.update(loss, {name: parts[name] for name in self.logged})
