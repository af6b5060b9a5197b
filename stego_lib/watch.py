"""Detects collapse during training without labels, from the codes of a few fixed positions."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .experiment import Experiment
from .model import Stego
from .utils.files import read_json, write_json
from .utils.notices import notice

if TYPE_CHECKING:
    from .features import Features

# Steps between measurements.
EVERY = 25
# First step that may report a collapse, because initially the head is close to its random weights.
FIRST_REPORT = 50
# Number of images, and of grid cells in each, to measure.
IMAGES, CELLS = 32, 16
# Effective number of groups or clusters below which codes have collapsed.
MIN_GROUPS = 1.5
# Mean correspondence of a code with the nearest code of another image, below which codes have scattered.
MIN_NEAREST = 0.5


class Symptom(NamedTuple):
    """A sign of collapse and its remedy."""

    measure: str
    limit: float  # smaller values are reported
    finding: str
    cause: str
    remedy: str  # "raise" or "lower" the shifts


# Only the first symptom that applies is reported.
SYMPTOMS = (
    Symptom(
        "groups", MIN_GROUPS, "the codes are nearly all alike ({:.2f} groups): they have collapsed",
        "the shifts are below most correspondences, so nearly all pairs attract, even random ones", "raise",
    ),
    Symptom(
        "within", MIN_GROUPS, "the codes of each image are nearly all alike ({:.2f} groups): they have collapsed",
        "the shift of self pairs is below most correspondences within an image, so every image gets one code", "raise",
    ),
    Symptom(
        "nearest", MIN_NEAREST,
        "codes are unlike all codes in other images (mean nearest correspondence {:.2f}): they have scattered",
        "the shifts of kNN and self pairs are above nearly all correspondences, so even similar positions repel",
        "lower",
    ),
    Symptom(
        "clusters", MIN_GROUPS, "nearly all codes are in one cluster ({:.2f} in use): they have collapsed",
        "the codes have collapsed, or the images show one kind of region", "raise",
    ),
)  # fmt: skip
MEASURES = tuple(symptom.measure for symptom in SYMPTOMS)


def effective_groups(codes: Tensor) -> tuple[float, float]:
    """Effective number of groups of unit codes (P, M, K) of P images, between images and within images.

    1 / mean of max(S, 0) over pairs of positions in different images, and in the same image: n for n orthogonal groups
    of equal size, 1 for equal codes, infinity if all codes repel each other.
    """
    cosines, same = _cosines(codes)
    pull = cosines.clamp(min=0)
    means = [pull[pairs].mean().item() for pairs in (~same, same & ~torch.eye(len(pull), dtype=torch.bool))]
    between, within = (1 / mean if mean > 0 else float("inf") for mean in means)
    return between, within


def nearest_elsewhere(codes: Tensor) -> float:
    """Mean over all positions of the largest S with a position in another image, in [-1, 1]. codes: (P, M, K)."""
    cosines, same = _cosines(codes)
    return cosines.masked_fill(same, -1).amax(1).mean().item()


def effective_clusters(labels: Tensor, n_clusters: int) -> float:
    """exp of the entropy of cluster sizes: n for n equal clusters, 1 for a single one. labels: int64 (M,)."""
    share = torch.bincount(labels.flatten(), minlength=n_clusters).double()
    return torch.special.entr(share / share.sum()).sum().exp().item()


def _cosines(codes: Tensor) -> tuple[Tensor, Tensor]:
    """S between all positions, and whether they are in the same image: (P M, P M)."""
    flat, image = codes.flatten(0, 1), torch.arange(len(codes)).repeat_interleave(codes.shape[1])
    return flat @ flat.T, image[:, None] == image[None]


class Watch:
    """Measures the codes of a few positions every `EVERY` steps, writes watch.json, and shows a notice at collapse.

    watch.json holds "steps" and for each of them "groups" and "within" (`effective_groups`), "nearest"
    (`nearest_elsewhere`) and "clusters" (`effective_clusters` of the cluster probe, null before it is fitted);
    "collapsed"; and "seen", a finding with a remedy or null.
    """

    def __init__(self, folder: Path, features: "Features", experiment: Experiment, step: int):
        self.path, self.experiment = folder / "watch.json", experiment
        rows = torch.linspace(0, len(features) - 1, min(IMAGES, len(features))).long()
        maps = features.rows(rows).flatten(2)
        cells = torch.linspace(0, maps.shape[2] - 1, min(CELLS, maps.shape[2])).long()
        self.features = maps[:, :, cells, None]
        self.record: dict[str, Any] = {name: [] for name in ("steps", *MEASURES)} | {"collapsed": False, "seen": None}
        if step and self.path.exists():  # keep the measurements up to the step of a resumed run
            record = read_json(self.path)
            kept = sum(measured <= step for measured in record["steps"])
            self.record = record | {name: record[name][:kept] for name in ("steps", *MEASURES)}

    @torch.no_grad()
    def update(self, model: Stego, step: int) -> None:
        """Measures and writes watch.json if `step` is due. Call it after each step."""
        last = step == self.experiment.steps
        if step % EVERY and not last:
            return
        training = model.training
        model.eval()
        code = model(self.features.to(model.feature_mean.device))
        model.train(training)
        clusters = None
        if last or self.experiment.probes == "joint":
            clusters = effective_clusters(model.cluster_probe(code).argmax(1).cpu(), model.n_clusters)
        unit = F.normalize(code.cpu()[..., 0], dim=1).transpose(1, 2)
        values: dict[str, Any] = dict(
            zip(MEASURES, (*effective_groups(unit), nearest_elsewhere(unit), clusters), strict=True)
        )
        self.record["steps"].append(step)
        for name, value in values.items():  # JSON does not have infinity
            self.record[name].append(None if value in (None, float("inf")) else float(f"{value:.4g}"))
        symptoms = [s for s in SYMPTOMS if values[s.measure] is not None and values[s.measure] < s.limit]
        if symptoms and step >= FIRST_REPORT and not self.record["collapsed"]:
            finding = symptoms[0].finding.format(values[symptoms[0].measure])
            auto = "" if self.experiment.shifts == "auto" else "set shifts='auto', or "
            remedy = f"{auto}{symptoms[0].remedy} the shifts (chapter Choosing shifts and weights)"
            self.record |= {"collapsed": True, "seen": f"step {step}: {finding}; {remedy}"}
            notice(self.record["seen"])
        write_json(self.path, self.record)
