"""The shifts of a run, from the correspondences measured on its training features, without labels."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .experiment import Experiment
from .loss import center, correspondence, negative_permutation, published_permutation, random_coords, sample
from .utils.progress import progress

if TYPE_CHECKING:
    from .features import Features

# Images that are measured: IMAGES x points^4 correspondences of each kind.
IMAGES = 256
# What shifts="auto" stands for: a quarter of the self and kNN pairs attract, and three in a hundred random ones. The
# chapter on choosing l and b shows the trials behind it.
AUTO_SHIFTS = ("p75", "p75", "p97")


@dataclass(frozen=True)
class Calibration:
    """The three shifts of a run and the reason for them; every triple is self, kNN, random."""

    shifts: tuple[float, float, float]
    """b, as the loss uses them."""
    rule: tuple[float | str, ...]
    """The experiment's shifts: numbers, or percentiles of the measured correspondences such as 'p75'."""
    attracting: tuple[float, float, float]
    """Share of the measured pairs above their shift, in [0, 1]: those that attract."""
    images: int
    """Training images that were measured."""
    reason: str
    """The same in words."""
    histograms: dict[str, list[float]]
    """Densities of the measured correspondences, see `histograms`."""

    def to_dict(self) -> dict[str, Any]:
        """Keys and values for JSON, the histograms' keys among the others."""
        values = asdict(self)
        return values.pop("histograms") | values


def calibrate(features: "Features", neighbors: Tensor, mean: Tensor, experiment: Experiment) -> Calibration:
    """Measures correspondences on up to `IMAGES` training images, and sets the three shifts.

    Shifts that are numbers stay, percentiles are looked up, and "auto" is `AUTO_SHIFTS`. Parameters: as in
    `measure_correspondences`.
    """
    measured = measure_correspondences(features, neighbors, mean, experiment)
    rule, shifts = shift_rule(experiment), resolve_shifts(experiment, measured)
    images = min(len(features), IMAGES)
    kinds = zip(("self", "kNN", "random"), rule, measured.values(), shifts, strict=True)
    attracting, shares = [], []
    for name, given, values, shift in kinds:
        attracting.append((values > shift).double().mean().item())
        origin = f"at {given}" if isinstance(given, str) else "given"
        shares.append(f"{name} {origin}: {100 * attracting[-1]:.1f} % of the pairs attract")
    source = "by the rule 'auto'" if experiment.shifts == "auto" else "by the experiment"
    how = "spatially centered" if experiment.centering else "not centered"
    reason = f"set {source} on correspondences of {images} training images, {how}; {', '.join(shares)}"
    own, knn, rand = attracting
    return Calibration(shifts, rule, (own, knn, rand), images, reason, histograms(measured))


def shift_rule(experiment: Experiment) -> tuple[float | str, ...]:
    """The experiment's shifts as numbers or percentiles, with `AUTO_SHIFTS` in place of "auto"."""
    return experiment.shifts if isinstance(experiment.shifts, tuple) else AUTO_SHIFTS


def measure_correspondences(
    features: "Features", neighbors: Tensor, mean: Tensor, experiment: Experiment
) -> dict[str, Tensor]:
    """Feature correspondences as the loss sees them, centered if the experiment says so.

    Parameters
    ----------
    features
        Of the training images.
    neighbors
        Nearest neighbors of each image, int64 (N, k).
    mean
        Subtracted from the features, (1, C, 1, 1).
    experiment
        Gives points, batch size, seed and centering.

    Returns
    -------
    dict
        "self", "knn", "rand": float32 (M,).
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
    """The three shifts as numbers: 'p70' becomes the 70th percentile of the measured correspondences of its kind."""
    own, knn, rand = (
        percentile(values, float(shift[1:])) if isinstance(shift, str) else shift
        for shift, values in zip(shift_rule(experiment), measured.values(), strict=True)
    )
    return own, knn, rand


def balance(
    measured: dict[str, Tensor], shifts: tuple[float, float, float], weights: tuple[float, float, float]
) -> dict[str, dict[str, float]]:
    """Mean attractive and repulsive force of each kind of pairs at these shifts, before any training.

    The slope of the loss against S is -(F - b) wherever S > 0, so F - b acts as a force.

    Returns
    -------
    dict
        For self, knn and rand: "shift"; "attracting", the share of pairs with F > b; "pull" and "push", weight times
        the mean force of either sign; "net", pull - push, which equals weight * (mean F - b).
    """
    forces = {}
    for (kind, values), shift, weight in zip(measured.items(), shifts, weights, strict=True):
        force = values.double() - shift
        pull, push = (weight * (sign * force).clamp(min=0).mean().item() for sign in (1, -1))
        attracting = (force > 0).double().mean().item()
        forces[kind] = {"shift": shift, "attracting": attracting, "pull": pull, "push": push, "net": pull - push}
    return forces


def histograms(measured: dict[str, Tensor], bins: int = 100) -> dict[str, list[float]]:
    """Densities of the measured correspondences over [-1, 1] by kind, and "edges", the borders of the bins."""
    edges = torch.linspace(-1, 1, bins + 1)
    counts = {kind: torch.histc(values, bins, -1, 1) for kind, values in measured.items()}
    densities = {kind: (count / count.sum() / (edges[1] - edges[0])).tolist() for kind, count in counts.items()}
    return {"edges": edges.tolist()} | densities


def percentile(values: Tensor, percent: float) -> float:
    """The member of `values` (M,) that `percent` (0 to 100) per cent of them lie below."""
    return float(np.percentile(values.numpy(), percent, method="nearest"))
