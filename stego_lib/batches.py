"""What one training step sees: features of images and of their partners, and points; drawn from seed and step alone."""

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .experiment import Experiment
from .loss import negative_permutation, published_permutation, random_coords
from .model import Stego
from .neighbors import nearest_neighbors
from .utils.errors import StegoError
from .utils.notices import notice
from .utils.torch_state import drawing

if TYPE_CHECKING:
    from .backbone import Backbone
    from .datasets.base import SegmentationDataset
    from .features import Features

# Cosine of every image's mean feature with that of all images, above which the images count as copies.
ALIKE = 1 - 1e-5


@dataclass
class Batch:
    """What one step needs: B images on a grid of (h, w) cells, S x S points."""

    feats: Tensor
    """(B, C, h, w) frozen features, minus the dataset's mean where the experiment subtracts it."""
    feats_knn: Tensor
    """(B, C, h, w) the same of one neighbor of each image."""
    coords1: Tensor
    """(B, S, S, 2) points in the images."""
    coords2: Tensor
    """(B, S, S, 2) points in their partners."""
    permutations: Tensor
    """int64 (negatives, B) random partners."""
    label: Tensor | None
    """int64 (B, H, W), for the linear probe alone."""
    # For the optional terms of the authors' code alone, see `official.draw_optional`.
    images: Tensor | None = None
    crf_points: Tensor | None = None
    feats_view: Tensor | None = None
    view_coords: Tensor | None = None


class Draw:
    """The first random choices of step number `step`: images, a neighbor of each, and the seed of dropout."""

    def __init__(self, neighbors: Tensor, experiment: Experiment, step: int):
        count, size, seed = len(neighbors), experiment.batch_size, experiment.seed
        epoch, position = divmod(step, count // size)
        self.generator = seeded(seed, "step", step)
        self.seed = int(torch.randint(2**31, (), generator=self.generator))
        self.rows = _epoch_order(count, seed, epoch)[position * size : (position + 1) * size]
        self.partners = neighbors[self.rows, torch.randint(neighbors.shape[1], (size,), generator=self.generator)]

    @property
    def needed(self) -> Tensor:
        """Images whose features the step needs, int64 (2 B,)."""
        return torch.cat([self.rows, self.partners])


def draw_batch(
    features: "Features", neighbors: Tensor, model: Stego, experiment: Experiment, step: int, backbone: "Backbone"
) -> Batch:
    """The batch of step number `step`; it depends on seed and step alone, so a resumed run sees the same batches.

    Each epoch passes over the images once in random order and drops the incomplete last batch. Only optional terms use
    the backbone: the CRF-inspired loss its normalization, the augmentation alignment its features.
    """
    device, size = model.feature_mean.device, experiment.batch_size
    draw = Draw(neighbors, experiment, step)
    generator = draw.generator
    model.head.dropout.generator = torch.Generator(device).manual_seed(draw.seed)
    feats, feats_knn = model.centered(features.rows(draw.needed, device)).chunk(2)
    partner_of = published_permutation if experiment.official.published else negative_permutation
    batch = Batch(
        feats=feats,
        feats_knn=feats_knn,
        coords1=random_coords(size, experiment.points, generator).to(device),
        coords2=random_coords(size, experiment.points, generator).to(device),
        permutations=torch.stack([partner_of(size, generator) for _ in range(experiment.negatives)]).to(device),
        label=features.label_rows(draw.rows, device) if features.has_labels else None,
    )
    if experiment.official.loss_weights:
        from .official import draw_optional

        draw_optional(batch, draw.rows, features, model, backbone, experiment, generator)
    return batch


def find_neighbors(features: "Features", model: Stego, experiment: Experiment) -> Tensor:
    """The nearest neighbors of each training image by its mean feature, int64 (N, k).

    A notice is shown if all images are alike, because nothing can be learned from comparing them.
    """
    pooled = features.pooled
    units = F.normalize(pooled, dim=1)
    if (units @ F.normalize(units.sum(0), dim=0)).min() > ALIKE:
        notice(f"the {len(features)} training images look alike to the backbone, so nothing can be learned from them")
    mean = model.feature_mean.flatten()
    pooled = pooled - mean.cpu()
    if experiment.official.published:  # the authors' featurizer is in training mode: channels drop out
        with drawing(experiment.seed):
            pooled = F.dropout(pooled, experiment.dropout)
    return nearest_neighbors(pooled, experiment.neighbors, device=mean.device)


def fit_to_data(experiment: Experiment, dataset: "SegmentationDataset") -> Experiment:
    """The experiment with batch size and neighbors limited to the training images; a notice names changes.

    Raises StegoError for a single image, which has no partner.
    """
    count = len(dataset)
    if count < 2:
        raise StegoError(
            f"{dataset.name} has one training image, which has no partners. Add images, or use crop='five'."
        )
    limits = {"batch_size": count, "neighbors": count - 1}
    changes = {name: limit for name, limit in limits.items() if getattr(experiment, name) > limit}
    if changes:
        text = ", ".join(f"{name} is {value}" for name, value in changes.items())
        notice(f"{dataset.name} has {count} training images, so {text}")
    return experiment.but(**changes)


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=seeded(seed, "epoch", epoch))


def seeded(seed: int, purpose: str, number: int) -> torch.Generator:
    """A generator of its own for each seed, purpose and number."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {purpose} {number}").getrandbits(63))
