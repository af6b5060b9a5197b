"""Batches: features of images and their partners, and points. They only depend on the seed and the step."""

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

# Cosine of all mean features of images with their mean, above which the images count as identical.
IDENTICAL = 1 - 1e-5


@dataclass
class Batch:
    """The input of a step: B images with (h, w) grid cells, S x S points."""

    feats: Tensor
    """Frozen features minus `Stego.feature_mean`, (B, C, h, w)."""
    feats_knn: Tensor
    """Features of a neighbor of each image, (B, C, h, w)."""
    coords1: Tensor
    """Points in the images, (B, S, S, 2)."""
    coords2: Tensor
    """Points in their partners, (B, S, S, 2)."""
    permutations: Tensor
    """Random partners, int64 (negatives, B)."""
    label: Tensor | None
    """Labels for the linear probe, int64 (B, H, W)."""
    # Only for the optional loss terms of the authors' code, see `official.draw_optional`.
    images: Tensor | None = None
    crf_points: Tensor | None = None
    feats_view: Tensor | None = None
    view_coords: Tensor | None = None


class Draw:
    """Images of a step, a neighbor of each, and the seed of dropout."""

    def __init__(self, neighbors: Tensor, experiment: Experiment, step: int):
        count, size, seed = len(neighbors), experiment.batch_size, experiment.seed
        epoch, position = divmod(step, count // size)
        self.generator = seeded(seed, "step", step)
        self.seed = int(torch.randint(2**31, (), generator=self.generator))
        self.rows = _epoch_order(count, seed, epoch)[position * size : (position + 1) * size]
        self.partners = neighbors[self.rows, torch.randint(neighbors.shape[1], (size,), generator=self.generator)]

    @property
    def needed(self) -> Tensor:
        """Images and neighbors, int64 (2 B,)."""
        return torch.cat([self.rows, self.partners])


def draw_batch(
    features: "Features", neighbors: Tensor, model: Stego, experiment: Experiment, step: int, backbone: "Backbone"
) -> Batch:
    """Draws the batch of a step, the same in a resumed run.

    Each epoch iterates over the images in random order and drops the incomplete last batch. Only optional loss terms
    use the backbone.
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
    """Nearest neighbors of each training image by mean features, int64 (N, k), with a notice if all are identical."""
    pooled = features.pooled
    units = F.normalize(pooled, dim=1)
    if (units @ F.normalize(units.sum(0), dim=0)).min() > IDENTICAL:
        notice(f"The {len(features)} training images have identical features, so training has no effect. Check them.")
    mean = model.feature_mean.flatten()
    pooled = pooled - mean.cpu()
    if experiment.official.published:  # dropout is on in the authors' featurizer
        with drawing(experiment.seed):
            pooled = F.dropout(pooled, experiment.dropout)
    return nearest_neighbors(pooled, experiment.neighbors, device=mean.device)


def fit_to_data(experiment: Experiment, dataset: "SegmentationDataset") -> Experiment:
    """Limits batch size and neighbors to the number of training images, with a notice.

    Raises StegoError for a single image, which has no partner.
    """
    count = len(dataset)
    if count < 2:
        raise StegoError(
            f"{dataset.name} has one training image, but pairs need at least two. Add images, or use crop='five'."
        )
    limits = {"batch_size": count, "neighbors": count - 1}
    changes = {name: limit for name, limit in limits.items() if getattr(experiment, name) > limit}
    if changes:
        text = ", ".join(f"{name} is {value}" for name, value in changes.items())
        notice(f"{dataset.name} has {count} training images, so {text}.")
    return experiment.but(**changes)


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=seeded(seed, "epoch", epoch))


def seeded(seed: int, purpose: str, number: int) -> torch.Generator:
    """A random generator for each combination of seed, purpose and number."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {purpose} {number}").getrandbits(63))
