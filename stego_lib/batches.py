"""What a training step sees: images' features, their partners, points; drawn from seed and step alone."""

import random
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone import Backbone
from .experiment import Experiment
from .features.store import Features
from .loss import negative_permutation, published_permutation, random_coords
from .model import Stego
from .neighbors import nearest_neighbors
from .optional.losses import CRF_POINTS, CRF_SIDE, random_pixels
from .optional.views import augmented_views
from .runtime.devices import ALONE, Processes


@dataclass
class Batch:
    """What one step needs in one process. B images, grid (h, w), S x S points."""

    feats: Tensor
    """(B, C, h, w) frozen features, the dataset's mean taken off if so set."""
    feats_knn: Tensor
    """(B, C, h, w) the same of one neighbor of each."""
    coords1: Tensor
    """(B, S, S, 2) points in the images."""
    coords2: Tensor
    """(B, S, S, 2) points in their partners."""
    permutations: Tensor
    """int64 (negatives, B) random partners, numbered through the whole batch."""
    label: Tensor | None
    """int64 (B, H, W), for the linear probe alone."""
    images: Tensor | None = None
    """(B, 3, H, W) normalized colors, for the CRF-inspired loss alone."""
    crf_points: Tensor | None = None
    """int64 (2, n), see `losses_extra.image_crf_loss`."""
    feats_view: Tensor | None = None
    """(B, C, h, w) features of an augmented view of each image, for the augmentation alignment alone."""
    view_coords: Tensor | None = None
    """(B, h, w, 2) where the view's cells lie in the image."""


class Draw:
    """What chance decides first at step number `step`: the images, a neighbor of each, and the seed of dropout."""

    def __init__(self, neighbors: Tensor, experiment: Experiment, step: int):
        count, size, seed = len(neighbors), experiment.batch_size, experiment.seed
        epoch, position = divmod(step, count // size)
        self.generator = seeded(seed, "step", step)
        self.seed = int(torch.randint(2**31, (), generator=self.generator))
        self.rows = _epoch_order(count, seed, epoch)[position * size : (position + 1) * size]
        self.partners = neighbors[self.rows, torch.randint(neighbors.shape[1], (size,), generator=self.generator)]

    def needed(self, processes: Processes = ALONE) -> Tensor:
        """Images whose features this process needs, int64 (2 B / processes,): its share and the partners of these."""
        return torch.cat([processes.share(self.rows), processes.share(self.partners)])


def draw_batch(
    store: Features,
    neighbors: Tensor,
    model: Stego,
    experiment: Experiment,
    step: int,
    backbone: Backbone | None = None,
    processes: Processes = ALONE,
) -> Batch:
    """The batch of step number `step`. It depends on nothing but seed and step, so a resumed run sees the same ones.

    Each epoch goes through the images once in a random order; what is left over at its end is dropped. Of several
    processes each draws the whole batch and gets its share. The backbone is needed where images are: for the CRF-inspired
    loss (its normalization) and the augmentation alignment (its features).
    """
    device, size, share = model.feature_mean.device, experiment.batch_size, processes.share
    draw = Draw(neighbors, experiment, step)
    rows, generator = share(draw.rows), draw.generator
    torch.manual_seed(draw.seed)  # dropout draws from the global generator
    feats, feats_knn = model.centered(store.rows(draw.needed(processes), device)).chunk(2)
    partner_of = published_permutation if experiment.published else negative_permutation
    batch = Batch(
        feats=feats,
        feats_knn=feats_knn,
        coords1=share(random_coords(size, experiment.points, generator)).to(device),
        coords2=share(random_coords(size, experiment.points, generator)).to(device),
        permutations=torch.stack([share(partner_of(size, generator)) for _ in range(experiment.negatives)]).to(device),
        label=store.label_rows(rows, device) if store.has_labels else None,
    )
    if experiment.crf_weight:
        assert backbone is not None
        batch.images = backbone.normalize(store.image_rows(rows)).float()
        batch.crf_points = random_pixels(CRF_POINTS, CRF_SIDE, generator).to(device)
    if experiment.aug_alignment_weight:
        assert backbone is not None
        views, coords = augmented_views(store.image_rows(draw.rows), store.shape[2:])
        batch.feats_view, batch.view_coords = model.centered(backbone(share(views))), share(coords).to(device)
    return batch


def find_neighbors(store: Features, model: Stego, experiment: Experiment) -> Tensor:
    """int64 (N, k): the neighbors of each training image by its mean feature, the dataset's mean taken off if so set."""
    pooled = store.pooled - model.feature_mean.flatten().cpu()
    if experiment.published:  # the featurizer is not in eval mode, so channels of each image's mean feature drop out
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(experiment.seed)
            pooled = F.dropout(pooled, experiment.dropout)
    return nearest_neighbors(pooled, experiment.neighbors)


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=seeded(seed, "epoch", epoch))


def seeded(seed: int, purpose: str, number: int) -> torch.Generator:
    """A generator of its own for each seed, purpose and number."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {purpose} {number}").getrandbits(63))
