"""PriMaPs-EM (Hahn et al., TMLR 2024, "Boosting Unsupervised Semantic Segmentation with Principal Mask Proposals").

Each image is divided once into masks of similar patches, along the principal directions of its features. Then class
prototypes for the whole dataset are fitted by expectation maximization: the teacher assigns each mask the majority
class of its pixels, and the student learns these pseudo labels. The teacher is a moving average of the student.

Shapes: features or codes (C, h, w) of one image or (B, C, h, w) of several; masks and pseudo labels int64 (B, H, W),
where -1 means none. Formulas follow the released code (visinf/primaps, commit 7ca7757) and are tested against its
numbers. Its color augmentation of the student's images is omitted.
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
from .base import Successor, update_ema

# Minimum similarity of a patch in a mask to its seed, relative to the largest; share of patches in masks that ends the
# search (released code).
THRESHOLD, COVERED = 0.4, 0.95
# Exponent of (1 - mean confidence) in the class weights (released code).
FOCUS = 2
# Steps between updates of the teacher, and its largest decay (released code).
EMA_EVERY, DECAY = 10, 0.98
# Share of the steps with `Prototypes.clustering_loss`, 2 of 52 epochs (released code), but at least `FIRST_STEPS` and
# at most half of the steps: prototypes need 750 to 1000 steps to converge, and 2 epochs of 300 scenes are only 38.
FIRST_STAGE, FIRST_STEPS = 2 / 52, 1000


def principal_direction(patches: Tensor) -> Tensor:
    """First principal direction of patches (P, C), of unit length, (C,).

    The sign makes the mean projection of the normalized patches positive; in the released code it is arbitrary.
    """
    centered = (patches - patches.mean(0)).double()
    direction = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -1].to(patches)
    return direction if (F.normalize(patches, dim=1) @ direction).sum() >= 0 else -direction


def similarity_masks(feats: Tensor, threshold: float = THRESHOLD, *, published: bool = False) -> Tensor:
    """Divides one image (C, h, w) into disjoint masks, one after the other (paper, section 3.2): (n, h, w).

    The seed of a mask is the unused patch with the largest projection on the principal direction of the unused patches.
    Patches with at least `threshold` times the largest similarity to the seed join. The mask holds the cosine with the
    seed divided by the largest, 0 outside. published: if all projections are negative, a used patch is the seed.
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
        if len(masks) > 3 and counts[-1] == counts[-3]:  # the remaining patches have zero features
            break
    return torch.stack(masks).unflatten(1, feats.shape[1:])


def median(maps: Tensor) -> Tensor:
    """3 x 3 median of maps (n, h, w), with reflection at the border."""
    return F.unfold(F.pad(maps[:, None], (1, 1, 1, 1), mode="reflect"), 3).median(1).values.view_as(maps)


def mask_log_probabilities(similarities: Tensor) -> Tensor:
    """Log-probabilities of background and masks at each patch: (n, h, w) -> (n + 1, h, w).

    Masks are smoothed by a median and scaled to almost binary values; the background is 1 outside all masks.
    """
    masks = (10 * median(similarities)).clamp(0, 1)
    inside = masks[masks > 0]
    background = ((inside.mean() if len(inside) else masks.new_ones(())) - masks.sum(0)).clamp(0, 1)
    return torch.cat([background[None], masks]).log_softmax(0)


def mask_proposals(code: Tensor, image: np.ndarray, *, published: bool = False) -> Tensor:
    """Mask indices of one image after a CRF, -1 for the background: int64 (H, W).

    code: (C, h, w), image: uint8 (H, W, 3), RGB; published: as in `similarity_masks`.

    Examples
    --------
    >>> mask_proposals(torch.rand(384, 28, 28), np.zeros((224, 224, 3), np.uint8)).shape
    torch.Size([224, 224])
    """
    masks = similarity_masks(code, published=published)
    return crf.dense_crf(image, mask_log_probabilities(masks)).argmax(0) - 1


class Prototypes(nn.Module):
    """One vector per class with separate direction v (n, C) and length g (n,): logits ``g <v, code> / norm(v)``."""

    def __init__(self, directions: Tensor):
        super().__init__()
        self.directions = nn.Parameter(directions.clone())
        self.lengths = nn.Parameter(torch.ones_like(directions[:, 0]))

    @property
    def vectors(self) -> Tensor:
        """``g v / norm(v)``, (n, C)."""
        return self.lengths[:, None] * F.normalize(self.directions, dim=1)

    def forward(self, code: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits at image size from codes, not normalized: (B, C, h, w) -> (B, n, H, W)."""
        return upsample(torch.einsum("bchw,nc->bnhw", code, self.vectors), size)

    def clustering_loss(self, code: Tensor) -> Tensor:
        """Negative mean cosine of codes (B, C, h, w) with their nearest direction, the loss of the first stage."""
        unit = F.normalize(self.directions, dim=1)
        return -torch.einsum("bchw,nc->bnhw", F.normalize(code, dim=1), unit).amax(1).mean()


def principal_prototypes(codes: Tensor, count: int) -> Tensor:
    """First principal directions of codes (M, C), of unit length with positive largest entry: (count, C)."""
    if count > codes.shape[1]:
        raise StegoError(f"{count} clusters need as many channels, but code_dim={codes.shape[1]}. Increase code_dim.")
    centered = (codes - codes.mean(0)).double()
    directions = torch.linalg.eigh(centered.T @ centered).eigenvectors.flip(1)[:, :count].T.to(codes)
    return directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()


def pseudo_labels(masks: Tensor, classes: Tensor, n_classes: int) -> Tensor:
    """E step: assigns each mask the most frequent class of its pixels (paper, section 3.3), the first of equals.

    masks: mask index of each pixel; classes: of the teacher, in [0, n_classes); all int64 (B, H, W), like the result.

    Examples
    --------
    >>> masks = torch.tensor([[[0, 0, 0, 1, -1]]])
    >>> pseudo_labels(masks, torch.tensor([[[2, 2, 1, 0, 1]]]), 3)
    tensor([[[ 2,  2,  2,  0, -1]]])
    """
    count = int(masks.max()) + 2  # masks per image; column 0 is for pixels without a mask
    number = masks + 1 + count * torch.arange(len(masks), device=masks.device).view(-1, 1, 1)
    votes = (number * n_classes + classes).flatten().bincount(minlength=len(masks) * count * n_classes)
    return torch.where(masks < 0, -1, votes.view(-1, n_classes).argmax(1)[number])


def class_weights(logits: Tensor) -> Tensor:
    """Weight of each class, (1 - mean probability) ^ 2, without gradient: (B, n, H, W) -> (n,)."""
    return (1 - logits.detach().softmax(1).mean((0, 2, 3))) ** FOCUS


def focal_loss(logits: Tensor, pseudo: Tensor, *, published: bool = False) -> Tensor:
    """M step: cross-entropy of the student, weighted by `class_weights` (paper, section 3.3).

    logits (B, n, H, W), pseudo labels int64 (B, H, W). Mean over pixels with a pseudo label, or 0. published: mean over
    all pixels.

    Examples
    --------
    >>> focal_loss(torch.rand(2, 27, 56, 56), torch.randint(-1, 27, (2, 56, 56))).shape
    torch.Size([])
    """
    total = F.cross_entropy(logits, pseudo, class_weights(logits), ignore_index=-1, reduction="none").sum()
    return total / (pseudo.numel() if published else (pseudo >= 0).sum().clamp(min=1))


@torch.no_grad()
def update_teacher(teacher: Prototypes, student: Prototypes, update: int) -> None:
    """Update number 1, 2, ... of the teacher: copies the student twice, then averages with decay 1 - 1 / number."""
    update_ema(teacher, student, decay=0.0 if update <= 2 else min(1 - 1 / update, DECAY))


class Trainer(Successor):
    """Fits prototypes to the codes of a frozen head: raw features (head='none') or codes of the run `start_from`.

    Prototypes are initialized with principal directions and the first stage, or with the clusters of `start_from`. The
    teacher's prototypes are the clusters of the model.
    """

    stored = ("student", "teacher")
    logged = ("confidence", "clusters")

    @classmethod
    def check(cls, experiment: Experiment) -> None:
        super().check(experiment)
        if experiment.head != "none" and experiment.start_from is None:
            raise StegoError(
                f"method='primaps' does not train the head, and head={experiment.head!r} has random weights. "
                "Use head='none', or start_from=RUN with the head and code_dim of that run."
            )

    def __init__(self, run: Run, features: Features, neighbors: Tensor):
        super().__init__(run, features, neighbors)
        start = self.experiment.start_from
        self.model.head.requires_grad_(False)
        self.initialized = start is not None and load_run(start).model.n_clusters == self.model.n_clusters
        steps = self.experiment.steps
        # Number of steps of the first stage.
        self.first = 0 if self.initialized else max(round(FIRST_STAGE * steps), min(FIRST_STEPS, steps // 2))
        self.student = Prototypes(self.model.cluster_probe.clusters.detach())
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.student.parameters(), self.experiment.lr_probes)
        head = (self.experiment.head, *self.model.head.state_dict().values(), self.model.feature_mean)
        settings = (THRESHOLD, COVERED, self.experiment.official.published, *head)
        self.masks = self.cached(self._proposals, "masks", *settings)

    def begin(self) -> dict[str, Any]:
        if not self.initialized:
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
