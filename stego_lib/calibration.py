"""Sets the shifts of a run from the correspondences of its training features, without labels."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .experiment import Experiment
from .loss import center, correspondence, negative_permutation, published_permutation, random_coords, sample
from .utils.progress import progress

if TYPE_CHECKING:
    from .features import Features

# Number of images to measure, which gives IMAGES x points^4 correspondences of each kind.
IMAGES = 256
# Percentiles for shifts="auto": 25 % of the self and kNN pairs attract, and 3 % of the random pairs. The chapter on
# choosing shifts and weights shows the experiments.
AUTO_SHIFTS = ("p75", "p75", "p97")


def calibrate(features: "Features", neighbors: Tensor, mean: Tensor, experiment: Experiment) -> dict[str, Any]:
    """Sets the three shifts from correspondences on up to `IMAGES` training images.

    Numbers are kept, percentiles are computed, and "auto" is `AUTO_SHIFTS`. For the parameters see
    `measure_correspondences`.

    Returns
    -------
    dict
        Triples for self, kNN and random pairs: "shifts", b of the loss; "rule", the numbers or percentiles such as
        "p75"; "attracting", the share of pairs with a correspondence above the shift. "images", their number;
        "reason", a summary in words; and `histograms`.
    """
    measured = measure_correspondences(features, neighbors, mean, experiment)
    rule, shifts = shift_rule(experiment), resolve_shifts(experiment, measured)
    images = min(len(features), IMAGES)
    pairs = zip(measured.values(), shifts, strict=True)
    attracting = [(values > shift).double().mean().item() for values, shift in pairs]
    shares = [
        f"{name} {f'at {setting}' if isinstance(setting, str) else 'given'}: {100 * share:.1f} % of the pairs attract"
        for name, setting, share in zip(("self", "kNN", "random"), rule, attracting, strict=True)
    ]
    source = "by the rule 'auto'" if experiment.shifts == "auto" else "by the experiment"
    centering = "spatially centered" if experiment.centering else "not centered"
    reason = f"set {source} on correspondences of {images} training images, {centering}; {', '.join(shares)}"
    values = {"shifts": shifts, "rule": rule, "attracting": attracting, "images": images, "reason": reason}
    return values | histograms(measured)


def shift_rule(experiment: Experiment) -> tuple[float | str, ...]:
    """The shifts of an experiment as numbers or percentiles: `AUTO_SHIFTS` for "auto"."""
    return experiment.shifts if isinstance(experiment.shifts, tuple) else AUTO_SHIFTS


def measure_correspondences(
    features: "Features", neighbors: Tensor, mean: Tensor, experiment: Experiment
) -> dict[str, Tensor]:
    """Measures feature correspondences as in the loss: "self", "knn" and "rand", float32 (M,).

    neighbors: of each image, int64 (N, k); mean: subtracted from the features, (1, C, 1, 1); experiment: for points,
    batch size, seed and centering.
    """
    generator = torch.Generator().manual_seed(experiment.seed)
    partner_of = published_permutation if experiment.official.published else negative_permutation
    order = torch.randperm(len(features), generator=generator)[:IMAGES]
    measured: dict[str, list[Tensor]] = {"self": [], "knn": [], "rand": []}
    for rows in progress(order.split(experiment.batch_size), "measuring correspondences"):
        if len(rows) < 2:
            continue  # a single image has no random partner
        partners = neighbors[rows, torch.randint(neighbors.shape[1], (len(rows),), generator=generator)]
        feats, feats_knn = features.rows(rows) - mean, features.rows(partners) - mean
        coords1, coords2 = (random_coords(len(rows), experiment.points, generator) for _ in range(2))
        f = sample(feats, coords1)
        pairs = {
            "self": f,
            "knn": sample(feats_knn, coords2),
            "rand": sample(feats[partner_of(len(rows), generator)], coords2),
        }
        for kind, other in pairs.items():
            values = correspondence(f, other)
            measured[kind].append((center(values) if experiment.centering else values).flatten())
    return {kind: torch.cat(values) for kind, values in measured.items()}


def resolve_shifts(experiment: Experiment, measured: dict[str, Tensor]) -> tuple[float, float, float]:
    """The three shifts as numbers; 'p70' is the 70th percentile of the correspondences of its kind of pair."""
    own, knn, rand = (
        percentile(values, float(shift[1:])) if isinstance(shift, str) else shift
        for shift, values in zip(shift_rule(experiment), measured.values(), strict=True)
    )
    return own, knn, rand


def balance(
    measured: dict[str, Tensor], shifts: tuple[float, float, float], weights: tuple[float, float, float]
) -> dict[str, dict[str, float]]:
    """Mean attractive and repulsive force of each kind of pair before training.

    The derivative of the loss by S is -(F - b) for S > 0, so F - b acts as a force.

    Returns
    -------
    dict
        For self, knn and rand: "shift"; "attracting", the share of pairs with F > b; "pull" and "push", weight times
        the mean positive and negative force; "net", pull - push, which equals weight * (mean F - b).
    """
    forces = {}
    for (kind, values), shift, weight in zip(measured.items(), shifts, weights, strict=True):
        force = values.double() - shift
        pull, push = (weight * (sign * force).clamp(min=0).mean().item() for sign in (1, -1))
        attracting = (force > 0).double().mean().item()
        forces[kind] = {"shift": shift, "attracting": attracting, "pull": pull, "push": push, "net": pull - push}
    return forces


def histograms(measured: dict[str, Tensor], bins: int = 100) -> dict[str, list[float]]:
    """Histogram densities of the measured correspondences over [-1, 1] by kind of pair, and the "edges" of the bins."""
    edges = torch.linspace(-1, 1, bins + 1)
    counts = {kind: torch.histc(values, bins, -1, 1) for kind, values in measured.items()}
    densities = {kind: (count / count.sum() / (edges[1] - edges[0])).tolist() for kind, count in counts.items()}
    return {"edges": edges.tolist()} | densities


def percentile(values: Tensor, percent: float) -> float:
    """The nearest member of `values` (M,) to a percentile, 0 to 100."""
    return float(np.percentile(values.numpy(), percent, method="nearest"))
