"""PriMaPs-EM (Hahn et al., TMLR 2024, "Boosting Unsupervised Semantic Segmentation with Principal Mask Proposals").

Each image is divided once into masks of similar patches, around the principal directions of its own features. Then
prototypes of classes, one set for the whole dataset, are fitted by expectation and maximization: each mask takes the
class that most of its pixels have for a teacher, and a student learns these pseudo labels; the teacher is a moving
average of the student.

Shapes: features or codes (C, h, w) of one image or (B, C, h, w) of several; masks and pseudo labels int64 (B, H, W), -1
where there is none. Formulas follow the released code (visinf/primaps, commit 7ca7757) and are tested against its
numbers; its color augmentation of the student's images is left out.
"""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import crf
from ..experiment import Experiment
from ..features import Features
from ..loss import upsample
from ..probes import sample_codes
from ..run import Run, load_run
from ..utils.errors import StegoError
from ..utils.progress import progress
from ..utils.threads import in_threads
from .base import Successor

# A patch joins a mask from this share of the largest similarity to its seed; masks end when so many patches have one
# (released code).
THRESHOLD, COVERED = 0.4, 0.95
# Power of (1 - mean confidence) that weighs a class (released code).
FOCUS = 2
# Steps between two updates of the teacher, and its largest decay (released code).
EMA_EVERY, DECAY = 10, 0.98
# Share of the steps that fit the prototypes by `Prototypes.clustering_loss`: 2 of 52 epochs (released code). At least
# `FIRST_STEPS`, but at most half of all steps: 2 epochs of CocoStuff are thousands of steps and those of 300 scenes are
# 38, where the prototypes need 750 to 1000 to converge.
FIRST_STAGE, FIRST_STEPS = 2 / 52, 1000


def principal_direction(patches: Tensor) -> Tensor:
    """First principal direction of patches (P, C), centered: unit length, (C,).

    Its sign is such that the unit patches have a positive mean on it; the released code leaves it to chance.
    """
    centered = (patches - patches.mean(0)).double()
    direction = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -1].to(patches)
    return direction if (F.normalize(patches, dim=1) @ direction).sum() >= 0 else -direction


def similarity_masks(feats: Tensor, threshold: float = THRESHOLD, *, published: bool = False) -> Tensor:
    """Masks of one image (C, h, w), each of patches that the masks before it left (paper, section 3.2): (n, h, w).

    The seed of a mask is the unused patch that stands out most along the principal direction of the unused patches. A
    patch joins from `threshold` times the largest similarity. The masks hold the cosine with the seed divided by the
    largest, 0 outside. published: where all unused patches have a negative projection, a used patch is the seed.
    """
    patches = feats.flatten(1).T
    unit, unused = F.normalize(patches, dim=1), torch.ones(len(patches), dtype=torch.bool, device=feats.device)
    masks, counts = [], [0]
    while counts[-1] < COVERED * len(patches):
        projection = unit @ principal_direction(patches[unused])
        seed = int(torch.where(unused, projection, 0 if published else -torch.inf).argmax())
        similarity = torch.where(unused, unit @ unit[seed], 0).clamp(min=0)
        largest = similarity.max()
        similarity = torch.where(similarity < threshold * largest, 0, similarity)
        masks.append(similarity / largest.clamp(min=torch.finfo(largest.dtype).tiny))
        unused = unused & (masks[-1] == 0)
        counts.append(int((~unused).sum()))
        if len(masks) > 3 and counts[-1] == counts[-3]:  # the patches that are left have zero features
            break
    return torch.stack(masks).unflatten(1, feats.shape[1:])


def median(maps: Tensor) -> Tensor:
    """3 x 3 median of maps (n, h, w), mirrored at the border."""
    return F.unfold(F.pad(maps[:, None], (1, 1, 1, 1), mode="reflect"), 3).median(1).values.view_as(maps)


def mask_log_probabilities(similarities: Tensor) -> Tensor:
    """Log-probabilities of a background and of each mask at every patch: (n, h, w) -> (n + 1, h, w).

    Masks are smoothed by a median and stretched, so they are nearly everywhere 0 or 1; the background is 1 where no
    mask is.
    """
    masks = (10 * median(similarities)).clamp(0, 1)
    inside = masks[masks > 0]
    background = ((inside.mean() if len(inside) else masks.new_ones(())) - masks.sum(0)).clamp(0, 1)
    return torch.cat([background[None], masks]).log_softmax(0)


def mask_proposals(code: Tensor, image: np.ndarray, *, published: bool = False) -> Tensor:
    """Masks of one image after a CRF, numbered from 0, -1 for the background: int64 (H, W).

    code: (C, h, w), image: uint8 (H, W, 3), RGB; published: as in `similarity_masks`.

    Examples
    --------
    >>> mask_proposals(torch.rand(384, 28, 28), np.zeros((224, 224, 3), np.uint8)).shape
    torch.Size([224, 224])
    """
    masks = similarity_masks(code, published=published)
    return crf.dense_crf(image, mask_log_probabilities(masks)).argmax(0) - 1


class Prototypes(nn.Module):
    """One vector per class as a direction v (n, C) and a length g (n,), trained apart: logits g <unit v, code>."""

    def __init__(self, directions: Tensor):
        super().__init__()
        self.directions = nn.Parameter(directions.clone())
        self.lengths = nn.Parameter(torch.ones_like(directions[:, 0]))

    @property
    def vectors(self) -> Tensor:
        """g times v at unit length, (n, C)."""
        return self.lengths[:, None] * F.normalize(self.directions, dim=1)

    def forward(self, code: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits at image size of codes that are not normalized: (B, C, h, w) -> (B, n, H, W)."""
        return upsample(torch.einsum("bchw,nc->bnhw", code, self.vectors), size)

    def clustering_loss(self, code: Tensor) -> Tensor:
        """Minus the mean cosine of codes (B, C, h, w) with their nearest direction, the loss of the first stage."""
        unit = F.normalize(self.directions, dim=1)
        return -torch.einsum("bchw,nc->bnhw", F.normalize(code, dim=1), unit).amax(1).mean()


def principal_prototypes(codes: Tensor, count: int) -> Tensor:
    """First principal directions of codes (M, C), centered: (count, C) of unit length, largest entry positive."""
    if count > codes.shape[1]:
        raise StegoError(f"codes of {codes.shape[1]} channels have no {count} principal directions. Raise code_dim.")
    centered = (codes - codes.mean(0)).double()
    directions = torch.linalg.eigh(centered.T @ centered).eigenvectors.flip(1)[:, :count].T.to(codes)
    return directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()


def pseudo_labels(masks: Tensor, classes: Tensor, n_classes: int) -> Tensor:
    """E step: each mask takes the most frequent class of its pixels (paper, section 3.3), the first of several.

    masks: numbers of the masks of each image; classes: the teacher's, in [0, n_classes); both int64 (B, H, W), as is
    the result.

    Examples
    --------
    >>> masks = torch.tensor([[[0, 0, 0, 1, -1]]])
    >>> pseudo_labels(masks, torch.tensor([[[2, 2, 1, 0, 1]]]), 3)
    tensor([[[ 2,  2,  2,  0, -1]]])
    """
    count = int(masks.max()) + 2  # masks per image, and column 0 for pixels without a mask
    number = masks + 1 + count * torch.arange(len(masks), device=masks.device).view(-1, 1, 1)
    votes = (number * n_classes + classes).flatten().bincount(minlength=len(masks) * count * n_classes)
    return torch.where(masks < 0, -1, votes.view(-1, n_classes).argmax(1)[number])


def class_weights(logits: Tensor) -> Tensor:
    """(1 - mean probability over all pixels) ^ 2 of each class: (B, n, H, W) -> (n,), without gradient."""
    return (1 - logits.detach().softmax(1).mean((0, 2, 3))) ** FOCUS


def focal_loss(logits: Tensor, pseudo: Tensor, *, published: bool = False) -> Tensor:
    """M step: cross-entropy of the student, weighted by `class_weights` (paper, section 3.3).

    logits (B, n, H, W), pseudo labels int64 (B, H, W). Mean over pixels with a pseudo label, 0 without any. published:
    over all pixels, where those without count as 0.

    Examples
    --------
    >>> focal_loss(torch.rand(2, 27, 56, 56), torch.randint(-1, 27, (2, 56, 56))).shape
    torch.Size([])
    """
    total = F.cross_entropy(logits, pseudo, class_weights(logits), ignore_index=-1, reduction="none").sum()
    return total / (pseudo.numel() if published else (pseudo >= 0).sum().clamp(min=1))


def first_stage(steps: int) -> int:
    """Steps of `Prototypes.clustering_loss` before the first pseudo labels, in a run of so many steps."""
    return max(round(FIRST_STAGE * steps), min(FIRST_STEPS, steps // 2))


@torch.no_grad()
def update_teacher(teacher: Prototypes, student: Prototypes, update: int) -> None:
    """Moves the teacher towards the student in update number 1, 2, ...: two copies, then decay 1 - 1 / number."""
    decay = 0.0 if update <= 2 else min(1 - 1 / update, DECAY)
    for e, s in zip(teacher.parameters(), student.parameters(), strict=True):
        e.lerp_(s, 1 - decay)


class Trainer(Successor):
    """Fits prototypes to the codes of a frozen head: raw features (head='none') or codes of the run `start_from`.

    Prototypes begin with principal directions and the first stage, or with the clusters of a run that has as many. The
    teacher's are the clusters of the run. Masks of the training images are computed once and kept beside the features.
    """

    unused = (*Successor.unused, "lr_head")

    @classmethod
    def check(cls, experiment: Experiment) -> None:
        super().check(experiment)
        if experiment.head != "none" and experiment.start_from is None:
            raise StegoError(
                f"method='primaps' does not train the head, and head={experiment.head!r} has random weights. "
                "Set head='none', or start_from=RUN with the head and code_dim of that run."
            )

    def __init__(self, run: Run, features: Features, neighbors: Tensor):
        super().__init__(run, features, neighbors)
        start = self.experiment.start_from
        self.model.head.requires_grad_(False)
        self.begun = start is not None and load_run(start).model.n_clusters == self.model.n_clusters
        self.first = 0 if self.begun else first_stage(self.experiment.steps)
        self.student = Prototypes(self.model.cluster_probe.clusters.detach())
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.student.parameters(), self.experiment.lr_probes)
        head = (self.experiment.head, *self.model.head.state_dict().values(), self.model.feature_mean)
        settings = (THRESHOLD, COVERED, self.experiment.official.published, *head)
        self.masks = self.beside_features(self._proposals, "masks", *settings)

    def columns(self) -> list[str]:
        return ["loss", "confidence", "clusters"]

    def begin(self) -> dict[str, Any]:
        if not self.begun:
            codes, _ = sample_codes(self.model, self.features, self.experiment.seed)
            self.student.directions.data.copy_(principal_prototypes(codes, self.model.n_clusters))
        return super().begin()

    def step(self, number: int) -> dict[str, float]:
        rows, feats, _ = self.draw(number)
        self.model.eval()  # no dropout in a frozen head
        if number == self.first:
            self.teacher.load_state_dict(self.student.state_dict())
            self.optimizer.state.clear()
        in_first_stage, size = number < self.first, self.features.image_size
        with torch.no_grad():
            code = self.model.head(feats)
        if in_first_stage:
            logits, loss = self.student(code, code.shape[2:]), self.student.clustering_loss(code)
            classes = logits.argmax(1)
        else:
            with torch.no_grad():
                classes = self.teacher(code, size).argmax(1)
            logits = self.student(code, size)
            masks = torch.from_numpy(self.masks[rows.numpy()]).long().to(self.device)
            pseudo = pseudo_labels(masks, classes, self.model.n_clusters)
            loss = focal_loss(logits, pseudo, published=self.experiment.official.published)
        confidence = logits.detach().softmax(1).amax(1).mean()
        values = self.update(loss, {"confidence": confidence, "clusters": len(classes.unique())})
        update, rest = divmod(number - self.first, EMA_EVERY)
        if update > 0 and rest == 0:
            update_teacher(self.teacher, self.student, update)
        with torch.no_grad():
            self.model.cluster_probe.clusters.copy_((self.student if in_first_stage else self.teacher).vectors)
        return values

    def _proposals(self) -> np.ndarray:
        """`mask_proposals` of every training image, int16 (N, H, W)."""
        published = self.experiment.official.published

        def jobs() -> Iterator[tuple[Tensor, np.ndarray]]:
            self.model.eval()
            for rows in torch.arange(len(self.features)).split(32):
                with torch.no_grad():
                    codes = self.model(self.features.rows(rows, self.device)).cpu()
                images = self.features.image_rows(rows).permute(0, 2, 3, 1)
                yield from zip(codes, (np.ascontiguousarray(image) for image in images.numpy()), strict=True)

        masks = np.empty((len(self.features), *self.features.image_size), np.int16)
        proposals = in_threads(lambda job: mask_proposals(*job, published=published), jobs())
        for row, labels in enumerate(progress(proposals, "mask proposals", total=len(masks))):
            masks[row] = labels.numpy()
        return masks

    def state(self) -> dict[str, Any]:
        return {"student": self.student.state_dict(), "teacher": self.teacher.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
