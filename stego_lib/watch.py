"""Watches a training run for collapse, without labels: how many groups the codes of a few fixed positions form."""

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

# Steps between two measurements.
EVERY = 25
# Step of the first verdict; before it the head is close to its initial weights.
BEGIN = 50
# Images, and grid cells of each, that are measured.
IMAGES, CELLS = 32, 16
# Groups or clusters below which codes have collapsed.
FEWEST = 1.5
# Mean correspondence of a code with its nearest code in another image, below which codes have scattered.
LOOSEST = 0.5


class Symptom(NamedTuple):
    """A sign of collapse and what to do about it."""

    measure: str
    limit: float  # values below it are reported
    finding: str
    cause: str
    move: str  # where the shifts should go: "raise" or "lower"


# The first that applies is reported.
SYMPTOMS = (
    Symptom(
        "groups",
        FEWEST,
        "the codes are nearly all alike ({:.2f} groups): they have collapsed",
        "the shifts lie below most correspondences, so nearly all pairs attract, random ones too",
        "raise",
    ),
    Symptom(
        "within",
        FEWEST,
        "the codes of each image are nearly all alike ({:.2f} groups): they have collapsed",
        "the shift of self pairs lies below most correspondences within an image, so every image gets one code",
        "raise",
    ),
    Symptom(
        "nearest",
        LOOSEST,
        "codes resemble none in other images (mean nearest correspondence {:.2f}): they have scattered",
        "the shifts of kNN and self pairs lie above nearly all correspondences, so even similar positions repel",
        "lower",
    ),
    Symptom(
        "clusters",
        FEWEST,
        "nearly all codes are in one cluster ({:.2f} in use): they have collapsed",
        "the cluster probe follows codes that have collapsed, or one kind of region fills the images",
        "raise",
    ),
)
MEASURES = tuple(symptom.measure for symptom in SYMPTOMS)


def effective_groups(codes: Tensor) -> tuple[float, float]:
    """Effective number of groups of unit codes (P, M, K) of P images, over all images and within one.

    1 / the mean of max(S, 0), over positions of different images and over different positions of the same image: n
    groups of equal size with orthogonal codes give n, equal codes give 1, codes that all repel each other give
    infinity.
    """
    cosines, same = _cosines(codes)
    pull = cosines.clamp(min=0)
    others, own = pull[~same].mean().item(), pull[same & ~torch.eye(len(pull), dtype=torch.bool)].mean().item()
    return _inverse(others), _inverse(own)


def nearest_elsewhere(codes: Tensor) -> float:
    """Mean over all positions of the largest S with a position of another image, in [-1, 1]. codes as above."""
    cosines, same = _cosines(codes)
    return cosines.masked_fill(same, -1).amax(1).mean().item()


def effective_clusters(labels: Tensor, n_clusters: int) -> float:
    """exp of the entropy of cluster sizes: n for n equal clusters, 1 if one cluster holds all. labels: int64 (M,)."""
    share = torch.bincount(labels.flatten(), minlength=n_clusters).double()
    return torch.special.entr(share / share.sum()).sum().exp().item()


def _cosines(codes: Tensor) -> tuple[Tensor, Tensor]:
    """S between all positions, and whether both are of the same image: (P M, P M)."""
    flat, image = codes.flatten(0, 1), torch.arange(len(codes)).repeat_interleave(codes.shape[1])
    return flat @ flat.T, image[:, None] == image[None]


def _inverse(mean: float) -> float:
    return 1 / mean if mean > 0 else float("inf")


class Watch:
    """Measures the codes of a few positions every `EVERY` steps, writes watch.json, and shows a notice at collapse.

    It uses no random numbers and leaves the model unchanged. watch.json holds "steps"; for each of them "groups" and
    "within" (`effective_groups`), "nearest" (`nearest_elsewhere`) and "clusters" (`effective_clusters` of the cluster
    probe; null before a probe with probes="after" is fitted); "collapsed"; and "seen", the finding and what to change,
    or null.
    """

    def __init__(self, folder: Path, features: "Features", experiment: Experiment, step: int):
        self.path, self.experiment = folder / "watch.json", experiment
        rows = torch.linspace(0, len(features) - 1, min(IMAGES, len(features))).long()
        maps = features.rows(rows).flatten(2)
        cells = torch.linspace(0, maps.shape[2] - 1, min(CELLS, maps.shape[2])).long()
        self.features = maps[:, :, cells, None]
        self.record: dict[str, Any] = {name: [] for name in ("steps", *MEASURES)} | {"collapsed": False, "seen": None}
        if step and self.path.exists():  # a resumed run keeps the measurements up to its step
            record = read_json(self.path)
            kept = sum(measured <= step for measured in record["steps"])
            self.record = record | {name: record[name][:kept] for name in ("steps", *MEASURES)}

    @torch.no_grad()
    def look(self, model: Stego, step: int) -> None:
        """Called after every step: measures if `step` is due, and writes watch.json."""
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
        values = dict(zip(MEASURES, (*effective_groups(unit), nearest_elsewhere(unit), clusters), strict=True))
        self.record["steps"].append(step)
        for name, value in values.items():  # JSON has no infinity
            self.record[name].append(None if value in (None, float("inf")) else float(f"{value:.4g}"))
        if step >= BEGIN and not self.record["collapsed"]:
            self._judge(step, values)
        write_json(self.path, self.record)

    def _judge(self, step: int, values: dict[str, float | None]) -> None:
        """Records the first symptom that applies, with a notice."""
        for symptom in SYMPTOMS:
            value = values[symptom.measure]
            if value is not None and value < symptom.limit:
                remedy = f"{symptom.move} the shifts, see the chapter on choosing l and b"
                if self.experiment.shifts != "auto":
                    remedy = f"set shifts='auto', or {remedy}"
                self.record |= {"collapsed": True, "seen": f"step {step}: {symptom.finding.format(value)}; {remedy}"}
                notice(self.record["seen"])
                return
