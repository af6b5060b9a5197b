"""Watches a training run for collapse, without labels: how many groups the codes of a few fixed positions form."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .experiment import Experiment
from .features import Features
from .model import Stego
from .utils.files import read_json, write_json
from .utils.notices import notice

EVERY = 25
"""Steps between two measurements."""
BEGIN = 50
"""Step of the first verdict; before it the head is close to its initial weights."""
IMAGES, CELLS = 32, 16
"""Images, and grid cells of each, that are measured."""
FEWEST = 1.5
"""Groups or clusters below which codes have collapsed: those of all images, or of each image, are nearly alike."""
LOOSEST = 0.5
"""Mean correspondence of a code with its nearest one in another image, below which codes have scattered."""

SEEN = ("groups", "within", "nearest", "clusters")
"""What is measured."""


@dataclass(frozen=True)
class Symptom:
    """What a run reports, and how to mend it."""

    measured: str
    """Which of `SEEN`."""
    below: float
    """The value below which it is reported."""
    finding: str
    """What the notice says, with a place for the value."""
    cause: str
    """Why it happens."""
    move: str
    """Where the shifts should go: "raise" or "lower"."""


SYMPTOMS = (
    Symptom(
        "groups", FEWEST, "the codes are nearly all alike ({:.2f} groups): they have collapsed",
        "the shifts lie below most correspondences, so nearly all pairs attract, random ones too", "raise",
    ),
    Symptom(
        "within", FEWEST, "the codes of each image are nearly all alike ({:.2f} groups): they have collapsed",
        "the shift of self pairs lies below most correspondences within an image, so every image gets one code", "raise",
    ),
    Symptom(
        "nearest", LOOSEST, "codes resemble none in other images (mean nearest correspondence {:.2f}): they have scattered",
        "the shifts of kNN and self pairs lie above nearly all correspondences, so even similar positions repel", "lower",
    ),
    Symptom(
        "clusters", FEWEST, "nearly all codes are in one cluster ({:.2f} in use): they have collapsed",
        "the cluster probe follows codes that have collapsed, or one kind of region fills the images", "raise",
    ),
)  # fmt: skip
"""What is looked for, the first that applies is reported."""


def effective_groups(codes: Tensor) -> tuple[float, float]:
    """Effective number of groups of unit codes (P, M, K) of P images, over all images and within one.

    1 / the mean of max(S, 0), over positions of different images and over different positions of the same image: n groups
    of equal size with orthogonal codes give n, equal codes give 1, codes that all repel each other give infinity.
    """
    images, positions, _ = codes.shape
    flat, own = codes.flatten(0, 1), torch.arange(images).repeat_interleave(positions)
    pull, same = (flat @ flat.T).clamp(min=0), own[:, None] == own[None]
    over, within = pull[~same].mean().item(), pull[same & ~torch.eye(len(flat), dtype=torch.bool)].mean().item()
    return _inverse(over), _inverse(within)


def _inverse(mean: float) -> float:
    return 1 / mean if mean > 0 else float("inf")


def nearest_elsewhere(codes: Tensor) -> float:
    """Mean over all positions of the largest S with a position of another image, in [-1, 1]."""
    images, positions, _ = codes.shape
    flat, own = codes.flatten(0, 1), torch.arange(images).repeat_interleave(positions)
    return (flat @ flat.T).masked_fill(own[:, None] == own[None], -1).amax(1).mean().item()


def effective_clusters(labels: Tensor, n_clusters: int) -> float:
    """exp of the entropy of cluster sizes: n for n equal clusters, 1 if one cluster holds all. labels: int64 (M,)."""
    share = torch.bincount(labels.flatten(), minlength=n_clusters).double()
    return torch.special.entr(share / share.sum()).sum().exp().item()


class Watch:
    """Measures the codes of a few fixed positions every `EVERY` steps, writes watch.json, and shows a notice once at collapse.

    It uses no random numbers and leaves the model unchanged. watch.json holds "steps"; for each of them "groups" and "within"
    (`effective_groups`), "nearest" (`nearest_elsewhere`) and "clusters" (`effective_clusters` of the cluster probe; null
    before a probe with probes="after" is fitted); "collapsed"; and "seen", the finding and what to change, or null.
    """

    def __init__(self, folder: Path, store: Features, experiment: Experiment, step: int):
        self.path, self.experiment = folder / "watch.json", experiment
        rows = torch.linspace(0, len(store) - 1, min(IMAGES, len(store))).long()
        features = store.rows(rows).flatten(2)
        cells = torch.linspace(0, features.shape[2] - 1, min(CELLS, features.shape[2])).long()
        self.features = features[:, :, cells, None]
        self.found: dict[str, Any] = {name: [] for name in ("steps", *SEEN)} | {"collapsed": False, "seen": None}
        if step and self.path.exists():
            self._resume(step)

    def _resume(self, step: int) -> None:
        """Keeps the measurements up to `step` of a resumed run."""
        known = read_json(self.path)
        kept = sum(one <= step for one in known["steps"])
        self.found = known | {name: known[name][:kept] for name in ("steps", *SEEN)}

    @torch.no_grad()
    def look(self, model: Stego, step: int) -> None:
        """Called after every step: measures if `step` is due, and writes watch.json."""
        last = step == self.experiment.steps
        if step % EVERY and not last:
            return
        training = model.training
        model.eval()
        code = model(self.features.to(model.feature_mean.device)).cpu()
        model.train(training)
        unit = F.normalize(code[..., 0], dim=1).transpose(1, 2)
        probed = last or self.experiment.probes == "joint"
        labels = model.cluster_probe(code.to(model.feature_mean.device)).argmax(1).cpu() if probed else None
        count = model.n_clusters
        used = None if labels is None else effective_clusters(labels, count)
        seen = (*effective_groups(unit), nearest_elsewhere(unit), used)
        for name, value in zip(("steps", *SEEN), (step, *map(_rounded, seen)), strict=True):
            self.found[name].append(value)
        if not self.found["collapsed"] and step >= BEGIN and (wrong := self._wrong(*seen)):
            self.found |= {"collapsed": True, "seen": f"step {step}: {wrong}"}
            notice(self.found["seen"])
        write_json(self.path, self.found)

    def _wrong(self, *seen: float | None) -> str | None:
        """What is wrong, and what to change, or None. seen: values in the order of `SEEN`."""
        values = dict(zip(SEEN, seen, strict=True))
        for symptom in SYMPTOMS:
            value = values[symptom.measured]
            if value is not None and value < symptom.below:
                return f"{symptom.finding.format(value)}. {self._advice(symptom.move)}"
        return None

    def _advice(self, move: str) -> str:
        if self.experiment.shifts == "auto":
            return f"{move.capitalize()} the shifts that 'auto' set, with percentiles (the chapter on choosing l and b), and look at the backbone's correspondences"
        return f"Set shifts='auto', or {move} the shifts; the run's histograms show where they are"


def _rounded(value: float | None) -> float | None:
    """Four digits; None for infinity, which JSON lacks."""
    return None if value is None or value == float("inf") else float(f"{value:.4g}")
