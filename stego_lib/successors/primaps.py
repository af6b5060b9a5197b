"""PriMaPs-EM (Hahn et al., TMLR 2024, "Boosting Unsupervised Semantic Segmentation with Principal Mask Proposals").

Each image is split, once, into masks of similar patches, around the principal directions of its own features. Then prototypes
of classes, one for the whole dataset, are fitted by expectation and maximization: every mask takes the class that most of its
pixels have for a teacher, and a student learns these pseudo labels; the teacher is a moving average of the student.

Shapes: features or codes (C, h, w) of one image or (B, C, h, w) of several; patches (P, C) in the order row, column, P = h w.
Masks and pseudo labels are numbers of each pixel, (H, W) or (B, H, W), -1 where there is none. The formulas are those of the
released code (`primaps.py`, `clustering.py`, `ema.py` and `train.py`, commit 7ca7757), which the project's golden numbers
replay.
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
from .base import Successor, states

THRESHOLD = 0.4
"""Share of the largest similarity to the seed that a patch needs to join its mask (released code)."""
COVERED = 0.95
"""Share of the patches after which no further mask is looked for (released code)."""
FOCUS = 2
"""Power of (1 - confidence) that weights a class (released code)."""
EMA_EVERY, DECAY = 10, 0.98
"""Steps between two updates of the teacher, and its largest decay (released code)."""


# ---------------------------------------------------------------------------------------------- mask proposals


def principal_direction(patches: Tensor) -> Tensor:
    """First principal direction of patches (P, C), centered: unit length, (C,).

    Its sign is such that the patches, at unit length, have a positive mean on it; the released code leaves it to chance.
    """
    centered = (patches - patches.mean(0)).double()
    direction = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -1].to(patches)
    return direction if (F.normalize(patches, dim=1) @ direction).sum() >= 0 else -direction


def projections(patches: Tensor, unused: Tensor) -> Tensor:
    """Unit patches on the principal direction of the unused ones, 0 on the others: (P, C), bool (P,) -> (P,)."""
    return torch.where(unused, F.normalize(patches, dim=1) @ principal_direction(patches[unused]), 0)


def seed_patch(projection: Tensor, unused: Tensor, *, published: bool = False) -> int:
    """Number of the unused patch with the largest projection, both (P,).

    published: of the largest projection of all; where those of all unused patches are below 0, this is a used patch.
    """
    return int((projection if published else torch.where(unused, projection, -torch.inf)).argmax())


def seed_similarity(patches: Tensor, seed: int, unused: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Cosine of patches (P, C) and the seed, divided by the largest, (P,); 0 on used patches and below the threshold."""
    unit = F.normalize(patches, dim=1)
    similarity = torch.where(unused, unit @ unit[seed], 0).clamp(min=0)
    most = similarity.max()
    return torch.where(similarity < threshold * most, 0, similarity) / most.clamp(min=torch.finfo(most.dtype).tiny)


def similarity_masks(feats: Tensor, threshold: float = THRESHOLD, *, published: bool = False) -> Tensor:
    """Masks of one image, one after the other, each among the patches that those before it left (paper, section 3.2).

    A mask has a seed, the patch that stands out most along the principal direction of the unused patches, and the patches
    similar to it. It ends when `COVERED` of the patches are used, or when the last two of four or more rounds used none.

    Parameters
    ----------
    feats
        (C, h, w).
    threshold
        In [0, 1], see `seed_similarity`.
    published
        A used patch may be the seed, see `seed_patch`.

    Returns
    -------
    Tensor
        `seed_similarity` of each mask, (n, h, w).
    """
    patches = feats.flatten(1).T
    unused, found, counts = torch.ones(len(patches), dtype=torch.bool, device=feats.device), [], [0]
    while counts[-1] < COVERED * len(patches):
        seed = seed_patch(projections(patches, unused), unused, published=published)
        found.append(seed_similarity(patches, seed, unused, threshold))
        unused = unused & (found[-1] == 0)
        counts.append(int((~unused).sum()))
        if len(found) > 3 and counts[-1] == counts[-3]:  # patches of zeros are left, which are like nothing
            break
    return torch.stack(found).unflatten(1, feats.shape[1:])


def median(maps: Tensor) -> Tensor:
    """3 x 3 median of maps (n, h, w), mirrored at the border."""
    return F.unfold(F.pad(maps[:, None], (1, 1, 1, 1), mode="reflect"), 3).median(1).values.view_as(maps)


def mask_log_probabilities(similarities: Tensor) -> Tensor:
    """Of a background and of each mask, at every patch: (n, h, w) -> (n + 1, h, w).

    log softmax of the smoothed masks, which are 0 or nearly everywhere 1, and of a background that is 1 where no mask is.
    """
    masks = (10 * median(similarities)).clamp(0, 1)
    there = masks[masks > 0]
    background = ((there.mean() if len(there) else masks.new_ones(())) - masks.sum(0)).clamp(0, 1)
    return torch.cat([background[None], masks]).log_softmax(0)


def mask_proposals(
    feats: Tensor,
    size: tuple[int, int],
    image: np.ndarray | None = None,
    threshold: float = THRESHOLD,
    *,
    published: bool = False,
) -> Tensor:
    """Masks of one image at its resolution: the most probable of `mask_log_probabilities`, upsampled, after a CRF.

    Parameters
    ----------
    feats
        (C, h, w).
    size
        H and W.
    image
        uint8 (H, W, 3), RGB, for the CRF; None leaves it out.
    threshold, published
        As in `similarity_masks`.

    Returns
    -------
    Tensor
        int64 (H, W): numbers of masks from 0 in the order in which they were found, -1 for the background.

    Examples
    --------
    >>> mask_proposals(torch.rand(384, 28, 28), (224, 224)).shape
    torch.Size([224, 224])
    """
    found = mask_log_probabilities(similarity_masks(feats, threshold, published=published))
    return (upsample(found[None], size)[0] if image is None else crf.dense_crf(image, found)).argmax(0) - 1


# ---------------------------------------------------------------------------------------------- prototypes


class Prototypes(nn.Module):
    """One vector per class, as a direction v and a length g that are trained apart: logits g <unit v, code>.

    Parameters
    ----------
    directions
        (n, C), of any length. The lengths g begin at 1.
    """

    def __init__(self, directions: Tensor):
        super().__init__()
        self.directions = nn.Parameter(directions.clone())
        self.lengths = nn.Parameter(torch.ones_like(directions[:, 0]))

    @property
    def vectors(self) -> Tensor:
        """g times v at unit length, (n, C)."""
        return self.lengths[:, None] * F.normalize(self.directions, dim=1)

    def forward(self, code: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits at the resolution of the image, of codes that are not normalized: (B, C, h, w) -> (B, n, H, W).

        They are linear in the code, so they are upsampled in its place.
        """
        return upsample(torch.einsum("bchw,nc->bnhw", code, self.vectors), size)

    def clustering_loss(self, code: Tensor) -> Tensor:
        """First stage: minus the mean cosine of a code (B, C, h, w) with its nearest direction. Lengths do not matter."""
        cosines = torch.einsum("bchw,nc->bnhw", F.normalize(code, dim=1), F.normalize(self.directions, dim=1))
        return -cosines.amax(1).mean()


def principal_prototypes(codes: Tensor, count: int) -> Tensor:
    """The first principal directions of codes (M, C), centered: (count, C) of unit length; each has its largest entry above 0.

    Raises StegoError for more of them than channels.
    """
    if count > codes.shape[1]:
        raise StegoError(
            f"codes of {codes.shape[1]} channels have no {count} principal directions to begin {count} prototypes with; "
            "lower n_classes or extra_clusters, or take a larger code"
        )
    centered = (codes - codes.mean(0)).double()
    directions = torch.linalg.eigh(centered.T @ centered).eigenvectors.flip(1)[:, :count].T.to(codes)
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return directions * largest.sign()


def pseudo_labels(masks: Tensor, classes: Tensor, n_classes: int) -> Tensor:
    """E step: every mask takes the most frequent class of its pixels (paper, section 3.3), the first of several.

    Parameters
    ----------
    masks
        Numbers of the masks of each image, int64 (B, H, W), -1 = none.
    classes
        Those of the teacher, int64 (B, H, W) in [0, n_classes).

    Returns
    -------
    Tensor
        int64 (B, H, W), -1 where there is no mask.

    Examples
    --------
    >>> masks = torch.tensor([[[0, 0, 0, 1, -1]]])
    >>> pseudo_labels(masks, torch.tensor([[[2, 2, 1, 0, 1]]]), 3)
    tensor([[[ 2,  2,  2,  0, -1]]])
    """
    most = int(masks.max()) + 2  # column 0 is for pixels of no mask
    own = masks + 1 + most * torch.arange(len(masks), device=masks.device).view(-1, 1, 1)
    counts = (own * n_classes + classes).flatten().bincount(minlength=len(masks) * most * n_classes)
    return torch.where(masks < 0, -1, counts.view(-1, n_classes).argmax(1)[own])


def class_weights(logits: Tensor) -> Tensor:
    """Weight of each class in the loss, (1 - its mean probability) ^ 2: (B, n, H, W) -> (n,), without gradient.

    The mean is over all pixels, with or without a pseudo label.
    """
    return (1 - logits.detach().softmax(1).mean((0, 2, 3))) ** FOCUS


def focal_loss(logits: Tensor, pseudo: Tensor, *, published: bool = False) -> Tensor:
    """M step: cross-entropy of the student against the pseudo labels, weighted by `class_weights` (paper, section 3.3).

    Parameters
    ----------
    logits
        Of the student, (B, n, H, W).
    pseudo
        int64 (B, H, W), -1 = ignored.
    published
        The mean is over all pixels, where ignored ones count as 0, and not over those with a pseudo label.

    Returns
    -------
    Tensor
        A number; 0 if no pixel has a pseudo label.

    Examples
    --------
    >>> focal_loss(torch.rand(2, 27, 56, 56), torch.randint(-1, 27, (2, 56, 56))).shape
    torch.Size([])
    """
    total = F.cross_entropy(logits, pseudo, class_weights(logits), ignore_index=-1, reduction="none").sum()
    return total / (pseudo.numel() if published else (pseudo >= 0).sum().clamp(min=1))


def ema_decay(update: int) -> float:
    """Decay of the teacher's update number 1, 2, ...: 0, a plain copy, for the first two, then 1 - 1 / number, at most `DECAY`."""
    return 0.0 if update <= 2 else min(1 - 1 / update, DECAY)


@torch.no_grad()
def update_teacher(teacher: Prototypes, student: Prototypes, update: int) -> None:
    """Moves directions and lengths of the teacher towards the student's, by `ema_decay` of its update number, in place."""
    for e, s in zip(teacher.parameters(), student.parameters(), strict=True):
        e.lerp_(s, 1 - ema_decay(update))


# ---------------------------------------------------------------------------------------------- training

FIRST_STAGE, FIRST_STEPS = 2 / 52, 100
"""Share of the steps that fit the prototypes by `Prototypes.clustering_loss`: 2 of 52 epochs (released code). At least so many
steps, but at most a third of all: two published epochs are a few hundred steps or more, and a dozen leaves them where they began."""


class Trainer(Successor):
    """Fits prototypes to the codes of a frozen head: raw features (head='none'), or those of the run that `start_from` names.

    They begin with principal directions and the first stage; on a run with as many clusters with its clusters instead, as in
    the released code. The teacher's are the clusters of the run. The masks of the training images are computed once and kept
    beside the features; pixels of the image vote for them and are learned, as in the released code, without its color
    augmentation of the student's images.

    Raises StegoError for a head without a run to take it from.
    """

    unused = (*Successor.unused, "lr_head")

    @classmethod
    def refuse(cls, experiment: Experiment) -> None:
        super().refuse(experiment)
        if experiment.head != "none" and experiment.start_from is None:
            raise StegoError(
                f"method='primaps' leaves the head as it is, and head={experiment.head!r} has random weights; "
                "take head='none', or start_from=RUN with the head and code_dim of that run"
            )

    def __init__(self, run: Run, features: Features, neighbors: Tensor):
        super().__init__(run, features, neighbors)
        experiment, start = self.experiment, self.experiment.start_from
        self.model.head.requires_grad_(False)
        self.begun = start is not None and load_run(start).model.n_clusters == self.model.n_clusters
        self.first = (
            0 if self.begun else max(round(FIRST_STAGE * experiment.steps), min(FIRST_STEPS, experiment.steps // 3))
        )
        self.student = Prototypes(self.model.cluster_probe.clusters.detach())
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.student.parameters(), experiment.lr_probes)
        head = (experiment.head, *self.model.head.state_dict().values(), self.model.feature_mean)
        what = ("masks", THRESHOLD, COVERED, experiment.official.published, *head)
        self.masks = self.beside_features(self._proposals, *what)

    def columns(self) -> list[str]:
        return ["loss", "confidence", "clusters"]

    def begin(self) -> dict[str, Any]:
        found = super().begin()
        if not self.begun:
            codes, _ = sample_codes(self.model, self.features, self.experiment.seed)
            self.student.directions.data.copy_(principal_prototypes(codes, self.model.n_clusters))
        return found

    def step(self, number: int) -> dict[str, float]:
        rows, feats, _ = self.draw(number)
        self.model.eval()  # nothing drops out of a frozen head
        if number == self.first:
            self.teacher.load_state_dict(self.student.state_dict())
            self.optimizer.state.clear()
        with torch.no_grad():
            code = self.model.head(feats)
        logits = self.student(code, self.features.image_size)
        if number < self.first:
            classes, loss = logits.argmax(1), self.student.clustering_loss(code)
        else:
            with torch.no_grad():
                classes = self.teacher(code, self.features.image_size).argmax(1)
            masks = torch.from_numpy(self.masks[rows.numpy()]).long().to(self.device)
            pseudo = pseudo_labels(masks, classes, self.model.n_clusters)
            loss = focal_loss(logits, pseudo, published=self.experiment.official.published)
        confidence = logits.detach().softmax(1).amax(1).mean()
        values = self.update(loss, {"confidence": confidence, "clusters": torch.tensor(len(classes.unique()))})
        update, rest = divmod(number - self.first, EMA_EVERY)
        if update > 0 and rest == 0:
            update_teacher(self.teacher, self.student, update)
        with torch.no_grad():
            self.model.cluster_probe.clusters.copy_((self.student if number < self.first else self.teacher).vectors)
        return values

    def _proposals(self) -> np.ndarray:
        """`mask_proposals` of every training image, int16 (N, H, W). The CRF runs in threads."""
        count, size = len(self.features), self.features.image_size

        def maps() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            self.model.eval()
            for rows in torch.arange(count).split(32):
                with torch.no_grad():
                    codes = self.model(self.own_rows(rows)).cpu()
                for code, image in zip(codes, self.features.image_rows(rows), strict=True):
                    found = mask_log_probabilities(similarity_masks(code, published=self.experiment.official.published))
                    found = upsample(found[None], size)[0].softmax(0).numpy()
                    yield image.permute(1, 2, 0).contiguous().numpy(), found

        masks = np.empty((count, *size), np.int16)
        refined = in_threads(lambda job: crf.refine(job[0], [job[1]])[0].argmax(0), maps())
        for row, found in enumerate(progress(refined, "mask proposals", total=count)):
            masks[row] = found - 1
        return masks

    def state(self) -> dict[str, Any]:
        return states(student=self.student, teacher=self.teacher)

    def restore(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
