"""What a training step sees: pictures' features, their partners, points; drawn from seed and step alone."""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone import Backbone
from .experiment import Experiment
from .features import FeatureStore
from .loss import negative_permutation, published_permutation, random_coords
from .losses_extra import CRF_POINTS, CRF_SIDE, random_pixels
from .model import Stego
from .neighbors import nearest_neighbors
from .views import augmented_views


@dataclass
class Batch:
    """What one step needs. B pictures, grid (h, w), S x S points."""

    feats: Tensor
    """(B, C, h, w) frozen features, the data set's mean taken off if so set."""
    feats_knn: Tensor
    """(B, C, h, w) the same of one neighbour of each."""
    coords1: Tensor
    """(B, S, S, 2) points in the pictures."""
    coords2: Tensor
    """(B, S, S, 2) points in their partners."""
    permutations: Tensor
    """int64 (negatives, B) random partners."""
    label: Tensor | None
    """int64 (B, H, W), for the linear probe alone."""
    pictures: Tensor | None = None
    """(B, 3, H, W) normalised colours, for the CRF-inspired loss alone."""
    crf_points: Tensor | None = None
    """int64 (2, n), see `losses_extra.picture_crf_loss`."""
    feats_view: Tensor | None = None
    """(B, C, h, w) features of an augmented view of each picture, for the augmentation alignment alone."""
    view_coords: Tensor | None = None
    """(B, h, w, 2) where the view's cells lie in the picture."""


def draw_batch(
    store: FeatureStore,
    neighbors: Tensor,
    model: Stego,
    experiment: Experiment,
    step: int,
    backbone: Backbone | None = None,
) -> Batch:
    """The batch of step number `step`. It depends on nothing but seed and step, so a resumed run sees the same ones.

    Each epoch goes through the pictures once in a random order; what is left over at its end is dropped. The backbone is
    needed where pictures are: for the CRF-inspired loss (its normalisation) and the augmentation alignment (its features).
    """
    device = model.feature_mean.device
    size, seed = experiment.batch_size, experiment.seed
    per_epoch = len(store) // size
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(len(store), generator=seeded(seed, "epoch", epoch))
    rows = order[position * size : (position + 1) * size]
    generator = seeded(seed, "step", step)
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))  # dropout draws from the global generator
    partners = neighbors[rows, torch.randint(neighbors.shape[1], (size,), generator=generator)]
    partner_of = published_permutation if experiment.published else negative_permutation
    batch = Batch(
        feats=model.centred(store.rows(rows).to(device)),
        feats_knn=model.centred(store.rows(partners).to(device)),
        coords1=random_coords(size, experiment.points, generator).to(device),
        coords2=random_coords(size, experiment.points, generator).to(device),
        permutations=torch.stack([partner_of(size, generator) for _ in range(experiment.negatives)]).to(device),
        label=None if store.labels is None else store.label_rows(rows).to(device),
    )
    if experiment.crf_weight:
        assert backbone is not None
        batch.pictures = backbone.normalise(store.picture_rows(rows)).float()
        batch.crf_points = random_pixels(CRF_POINTS, CRF_SIDE, generator).to(device)
    if experiment.aug_alignment_weight:
        assert backbone is not None
        views, coords = augmented_views(store.picture_rows(rows), batch.feats.shape[-2:])
        batch.feats_view, batch.view_coords = model.centred(backbone(views)), coords.to(device)
    return batch


def find_neighbors(store: FeatureStore, model: Stego, experiment: Experiment) -> Tensor:
    """int64 (N, k): the neighbours of each training picture by its mean feature, the data set's mean taken off if so set."""
    pooled = store.pooled - model.feature_mean.flatten().cpu()
    if experiment.published:  # the featuriser is not in eval mode, so channels of each picture's mean feature drop out
        with torch.random.fork_rng():
            torch.manual_seed(experiment.seed)
            pooled = F.dropout(pooled, experiment.dropout)
    return nearest_neighbors(pooled, experiment.neighbors)


def seeded(seed: int, purpose: str, number: int) -> torch.Generator:
    """A generator of its own for each seed, purpose and number."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {purpose} {number}").getrandbits(63))
