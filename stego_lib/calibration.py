"""Shifts from the measured correspondences, without labels."""

import torch
from torch import Tensor

from .experiment import Experiment
from .features import Features
from .loss import centre, correspondence, negative_permutation, random_coords, sample

PICTURES = 256
"""Pictures that are measured; their correspondences number PICTURES x points^4 of each kind."""


def measure_correspondences(
    store: Features, neighbors: Tensor, mean: Tensor, experiment: Experiment
) -> dict[str, Tensor]:
    """Feature correspondences as the loss will see them: of self, kNN and random pairs, centred if the experiment says so.

    neighbors: int64 (N, k). mean: (1, C, 1, 1), taken off the features. Returns {"self", "knn", "rand"}: float32 (M,).
    """
    generator = torch.Generator().manual_seed(experiment.seed)
    order = torch.randperm(len(store), generator=generator)[:PICTURES]
    found: dict[str, list[Tensor]] = {"self": [], "knn": [], "rand": []}
    for rows in order.split(experiment.batch_size):
        if len(rows) < 2:
            continue  # a picture alone has no random partner
        partners = neighbors[rows, torch.randint(neighbors.shape[1], (len(rows),), generator=generator)]
        feats, feats_knn = store.rows(rows) - mean, store.rows(partners) - mean
        coords1, coords2 = (random_coords(len(rows), experiment.points, generator) for _ in range(2))
        f = sample(feats, coords1)
        others = dict(
            self=f,
            knn=sample(feats_knn, coords2),
            rand=sample(feats[negative_permutation(len(rows), generator)], coords2),
        )
        for kind, other in others.items():
            values = correspondence(f, other)
            found[kind].append((centre(values) if experiment.centering else values).flatten())
    return {kind: torch.cat(values) for kind, values in found.items()}


def resolve_shifts(experiment: Experiment, measured: dict[str, Tensor]) -> tuple[float, float, float]:
    """The three shifts as numbers: 'p70' becomes the 70th percentile of the measured correspondences of its kind."""
    own, knn, rand = (
        shift if isinstance(shift, float) else percentile(values, float(shift[1:]))
        for shift, values in zip(experiment.shifts, measured.values(), strict=True)
    )
    return own, knn, rand


def balance(
    measured: dict[str, Tensor], shifts: tuple[float, float, float], weights: tuple[float, float, float]
) -> dict[str, dict[str, float]]:
    """What each kind of pairs asks of the codes at these shifts, before any training and without labels.

    The loss's slope against S is -(F - b) wherever S > 0, so F - b is a force: it pulls codes together above the shift and
    pushes them apart below. Returns for self, knn and rand: "attracting", the share of pairs with F > b in [0, 1]; "pull" and
    "push", weight times the mean force of either sign; "net", pull - push, which is weight * (mean F - b).
    """
    found = {}
    for (kind, values), shift, weight in zip(measured.items(), shifts, weights, strict=True):
        force = values.double() - shift
        pull, push = (weight * (sign * force).clamp(min=0).mean().item() for sign in (1, -1))
        attracting = (force > 0).double().mean().item()
        found[kind] = {"shift": shift, "attracting": attracting, "pull": pull, "push": push, "net": pull - push}
    return found


def histograms(measured: dict[str, Tensor], bins: int = 100) -> dict[str, list[float]]:
    """Densities of the measured correspondences over [-1, 1], by kind, and the bins' edges: what a run keeps of them."""
    edges = torch.linspace(-1, 1, bins + 1)
    counts = {kind: torch.histc(values, bins, -1, 1) for kind, values in measured.items()}
    return {"edges": edges.tolist()} | {
        kind: (c / c.sum() / (edges[1] - edges[0])).tolist() for kind, c in counts.items()
    }


def percentile(values: Tensor, percent: float) -> float:
    """The value, one of `values` (M,), that `percent` (0 to 100) per cent of them lie below; of any number of values."""
    rank = 1 + round((len(values) - 1) * percent / 100)  # torch.quantile refuses more than 16 million values
    return values.kthvalue(rank).values.item()
