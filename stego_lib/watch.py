"""Watches a training run for collapse, without labels: how many groups the codes of a few fixed places fall into."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .experiment import Experiment
from .features.store import Features
from .model import Stego
from .runtime.files import read_json, write_json
from .runtime.notices import notice

EVERY = 25
"""Steps between two looks."""
BEGIN = 50
"""Step of the first verdict: before it the head is close to where it began."""
IMAGES, CELLS = 32, 16
"""Images and grid cells of each that are looked at."""
FEWEST = 1.5
"""Groups, or clusters, below which codes have collapsed: those of all images, or those of each image, are nearly alike."""
LOOSEST = 0.5
"""Mean correspondence of a code with the one that is most like it in another image, below which codes have scattered."""

SEEN = ("groups", "within", "nearest", "clusters")
"""What a look counts."""


def effective_groups(codes: Tensor) -> tuple[float, float]:
    """How many groups unit codes (P, M, K) of P images fall into, over all images and within one.

    1 / the mean of max(S, 0), over places of different images and over different places of the same one: n groups of the
    same size whose codes stand at right angles give n; codes that are all alike give 1; codes that all avoid each other
    give infinity.
    """
    images, places, _ = codes.shape
    flat, own = codes.flatten(0, 1), torch.arange(images).repeat_interleave(places)
    pull, same = (flat @ flat.T).clamp(min=0), own[:, None] == own[None]
    over, within = pull[~same].mean().item(), pull[same & ~torch.eye(len(flat), dtype=torch.bool)].mean().item()
    return _inverse(over), _inverse(within)


def _inverse(mean: float) -> float:
    return 1 / mean if mean > 0 else float("inf")


def nearest_elsewhere(codes: Tensor) -> float:
    """Mean over all places of the largest S with a place of another image, in [-1, 1]; 1 if every code has its like."""
    images, places, _ = codes.shape
    flat, own = codes.flatten(0, 1), torch.arange(images).repeat_interleave(places)
    return (flat @ flat.T).masked_fill(own[:, None] == own[None], -1).amax(1).mean().item()


def effective_clusters(labels: Tensor, n_clusters: int) -> float:
    """exp of the entropy of cluster occupancy: n if n clusters are equally full, 1 if one has everything. labels: int64 (M,)."""
    share = torch.bincount(labels.flatten(), minlength=n_clusters).double()
    return torch.special.entr(share / share.sum()).sum().exp().item()


class Watch:
    """Looks at the codes of a few fixed places every `EVERY` steps, keeps what it sees in the run folder, and says once if it is collapse.

    It draws nothing at random and leaves the model as it is. watch.json: "steps", and for each of them "groups" and
    "within" (`effective_groups`), "nearest" (`nearest_elsewhere`) and "clusters" (`effective_clusters` of the cluster probe's
    choice; null while the probe waits for the end, as with probes="after"); "collapsed", true or false; and "seen", what was
    seen and what to change, or null.
    """

    def __init__(self, folder: Path, store: Features, experiment: Experiment, step: int):
        self.path, self.experiment = folder / "watch.json", experiment
        rows = torch.linspace(0, len(store) - 1, min(IMAGES, len(store))).long()
        features = store.rows(rows).flatten(2)
        cells = torch.linspace(0, features.shape[2] - 1, min(CELLS, features.shape[2])).long()
        self.features = features[:, :, cells, None]
        self.found: dict[str, Any] = {name: [] for name in ("steps", *SEEN)} | {"collapsed": False, "seen": None}
        if step and self.path.exists():
            self._take_up(step)

    def _take_up(self, step: int) -> None:
        """What was seen up to `step` of a run that goes on; later looks are made again."""
        known = read_json(self.path)
        kept = sum(one <= step for one in known["steps"])
        self.found = known | {name: known[name][:kept] for name in ("steps", *SEEN)}

    @torch.no_grad()
    def look(self, model: Stego, step: int) -> None:
        """To be called after every step: looks if `step` is due, and writes watch.json."""
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
        count = len(model.cluster_probe.clusters)
        used = None if labels is None else effective_clusters(labels, count)
        seen = (*effective_groups(unit), nearest_elsewhere(unit), used)
        for name, value in zip(("steps", *SEEN), (step, *map(_rounded, seen)), strict=True):
            self.found[name].append(value)
        if not self.found["collapsed"] and step >= BEGIN and (wrong := self._wrong(*seen)):
            self.found |= {"collapsed": True, "seen": f"step {step}: {wrong}"}
            notice(self.found["seen"])
        write_json(self.path, self.found)

    def _wrong(self, groups: float, within: float, nearest: float, clusters: float | None) -> str | None:
        """What is wrong with a look, and what to change, or None."""
        if groups < FEWEST:
            return f"the codes are nearly all alike ({groups:.2f} groups): they have collapsed. {self._advice('raise')}"
        if within < FEWEST:
            return f"the codes of each image are nearly all alike ({within:.2f} groups): they have collapsed. {self._advice('raise')}"
        if nearest < LOOSEST:
            return (
                f"codes have no like in other images (mean nearest correspondence {nearest:.2f}): they have scattered. "
                f"{self._advice('lower')}"
            )
        if clusters is not None and clusters < FEWEST:
            return f"nearly all codes are in one cluster ({clusters:.2f} in use): they have collapsed. {self._advice('raise')}"
        return None

    def _advice(self, move: str) -> str:
        if self.experiment.shifts == "auto":
            return f"{move.capitalize()} the shifts that 'auto' set, with percentiles (the chapter on choosing l and b), and look at the backbone's correspondences"
        return f"Set shifts='auto', or {move} the shifts; the run's histograms show where they are"


def _rounded(value: float | None) -> float | None:
    """Four digits, and null for infinity, which JSON lacks."""
    return None if value is None or value == float("inf") else float(f"{value:.4g}")
