"""A study: variants of an experiment, several seeds each, one run record per run. Recorded runs are not repeated."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd

from stego_lib.backbone import EMBEDDED, Backbone, fit_sizes
from stego_lib.calibration import AUTO
from stego_lib.datasets import open_dataset, open_split, open_training_set
from stego_lib.evaluation import evaluate, probe_confusion
from stego_lib.experiment import MACHINE, Experiment
from stego_lib.features import open_features
from stego_lib.metrics import identity, match, scores
from stego_lib.training import train
from stego_lib.utils.environment import environment
from stego_lib.utils.errors import StegoError
from stego_lib.utils.files import fingerprint, without_nan, write_json
from stego_lib.utils.paths import runs_root, user_path
from stego_lib.utils.progress import progress

from .fixed_heads import fixed_head
from .results import mean_and_spread, read_record

NOT_DISTINCTIVE = ("data_root", "device", *MACHINE)
"""Fields of an experiment that do not change its results."""


_DEFAULTS = Experiment.from_dict({}).to_dict()


@dataclass(frozen=True)
class Variant:
    """One row of a study."""

    group: str
    """The varied quantity."""
    name: str
    """Its value."""
    experiment: Experiment
    """Its seed is replaced by each of the study's."""
    fixed: str | None = None
    """A head of `FIXED_HEADS` in place of a trained one."""
    crf: bool = False
    """Whether the row reads the scores after the CRF."""
    start: Experiment | None = None
    """The experiment whose run of the same seed this one starts from, trained first if there is none."""

    def start_name(self, seed: int) -> str | None:
        """What a record names as the run that it started from."""
        return None if self.start is None else self.start.but(seed=seed).name


class Study:
    """Variants times seeds, and the records of them in a folder.

    A record belongs to a variant if their experiments differ in `NOT_DISTINCTIVE` alone and, for an embedded backbone, if the
    record names the current weights: embedded weights may be replaced under the same name.
    """

    def __init__(self, variants: Sequence[Variant], seeds: Sequence[int], folder: str | Path):
        self.variants, self.seeds, self.folder = list(variants), list(seeds), user_path(folder)
        self._records: dict[Any, Any] = {}
        for path in sorted(self.folder.glob("*.json")):
            self._keep(read_record(path))

    def record(self, variant: Variant, seed: int) -> dict[str, Any] | None:
        """The run record of a variant with a seed, or None."""
        found = self._records.get(_key_of(variant, seed))
        current = current_weights(variant.experiment.backbone)
        if found is None or not found["scores"] or (current and _weights_of(found) != current):
            return None
        return found

    def missing(self) -> list[tuple[Variant, int]]:
        """Variants and seeds without a record, each run once, the first seed of all variants first."""
        found: dict[Any, tuple[Variant, int]] = {}
        for seed in self.seeds:
            for variant in self.variants:
                if self.record(variant, seed) is None:
                    found.setdefault(_key_of(variant, seed), (variant, seed))
        return list(found.values())

    def run(self, limit: int | None = None, runs_dir: str | Path | None = None) -> None:
        """Trains and scores the missing runs, at most `limit` (None: all), and writes a record for each."""
        for variant, seed in progress(self.missing()[:limit], "runs of the study"):
            record = run_variant(variant, seed, runs_dir)
            name = re.sub(r"[^a-z0-9.]+", "-", f"{variant.group} {variant.name}".lower()).strip("-")
            write_json(self.folder / f"{name}-seed{seed}-{fingerprint(*_key_of(variant, seed))[:8]}.json", record)
            self._keep(record)

    def scores(self) -> pd.DataFrame:
        """One row per recorded variant, seed and probe: group, name, seed, probe ("cluster", "linear"), accuracy, miou."""
        rows = []
        for variant in self.variants:
            for seed in self.seeds:
                found = (self.record(variant, seed) or {"scores": {}})["scores"]
                for probe in ("cluster", "linear"):
                    score = found.get(f"{probe}_crf" if variant.crf else probe)
                    if score:
                        values = {key: score[key] for key in ("accuracy", "miou")}
                        rows.append(
                            {"group": variant.group, "name": variant.name, "seed": seed, "probe": probe} | values
                        )
        return pd.DataFrame(rows, columns=["group", "name", "seed", "probe", "accuracy", "miou"])

    def table(self, group: str) -> pd.DataFrame:
        """One row per variant of a group: seeds on record, and accuracy and mIoU of both probes, mean ± standard deviation."""
        found, rows = self.scores(), {}
        for variant in self.variants:
            if variant.group != group:
                continue
            own = found[(found["group"] == group) & (found["name"] == variant.name)]
            row: dict[str, Any] = {"seeds": own["seed"].nunique()}
            for probe in ("cluster", "linear"):
                of_probe = own[own["probe"] == probe]
                for score, title in (("accuracy", "accuracy"), ("miou", "mIoU")):
                    values = of_probe[score]
                    row[f"{probe} {title}"] = mean_and_spread(values.mean(), values.std()) if len(values) else "not run"
            rows[variant.name] = row
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis(group)

    def seconds(self) -> pd.Series:
        """Seconds that each recorded run took, training and scoring together."""
        found = [self.record(variant, seed) for variant in self.variants for seed in self.seeds]
        return pd.Series([record["seconds"] for record in found if record and "seconds" in record], dtype=float)

    def _keep(self, record: dict[str, Any]) -> None:
        self._records[_key(record["experiment"], record.get("fixed_head"))] = record


def _weights_of(record: dict[str, Any]) -> str | None:
    return record.get("provenance", {}).get("weights") or record.get("backbone_weights")


@cache
def current_weights(backbone: str) -> str | None:
    """Fingerprint of the weights of an embedded backbone; None for any other."""
    return Backbone(backbone).weights_id if backbone in EMBEDDED else None


def run_variant(variant: Variant, seed: int, runs_dir: str | Path | None = None) -> dict[str, Any]:
    """Trains (or, for a fixed head, fits) a variant with a seed and scores it.

    Returns its run record, and "seconds"; for a trained one also "training_seconds", features included where they were missing.
    The run that it starts from is not among them.

    StegoError for data without labels, before any work.
    """
    started, experiment = time.perf_counter(), variant.experiment.but(seed=seed)
    if not open_split(experiment, "val").has_labels:
        raise StegoError(
            f"{experiment.dataset} has no labels in val, so its runs cannot be compared by scores; train.ipynb trains without them"
        )
    if variant.start is not None:
        begun = train(variant.start.but(seed=seed), runs_dir=runs_dir, resume=True)
        started, experiment = time.perf_counter(), experiment.but(start_from=str(begun.folder))
    if variant.fixed is None:
        run = train(experiment, runs_dir=runs_dir)
        trained = time.perf_counter() - started
        evaluate(run, baselines=False)
        record = run.metrics | {"training_seconds": round(trained, 1)}
        record["experiment"]["start_from"] = variant.start_name(seed)
    else:
        record = score_fixed(variant.fixed, experiment, runs_dir)
    return record | {"seconds": round(time.perf_counter() - started, 1)}


def score_fixed(kind: str, experiment: Experiment, runs_dir: str | Path | None = None) -> dict[str, Any]:
    """A run record of a fixed head (`fixed_heads.fixed_head`): step 0, and the scores of both probes."""
    root = user_path(runs_dir, runs_root()) / "features"
    backbone = Backbone.of(experiment)
    experiment = fit_sizes(experiment, backbone.geometry)
    stored = partial(
        open_features,
        backbone=backbone,
        root=root,
        feature_store=experiment.feature_store,
        published=experiment.official.published,
    )
    held_out = open_dataset(experiment.dataset, experiment.data_root, "val")
    plain = stored(held_out, size=experiment.eval_size)
    mirrored = stored(held_out, size=experiment.eval_size, mirror=True) if experiment.mirror else None
    model = fixed_head(kind, stored(open_training_set(experiment), size=experiment.train_size), experiment)
    table = probe_confusion(model, plain, mirrored)
    found = {"cluster": scores(table, match(table))}
    if model.linear_probe.trained:
        found["linear"] = scores(
            linear := probe_confusion(model, plain, mirrored, probe="linear"), identity(len(linear))
        )
    return without_nan({
        "experiment": experiment.to_record(),
        "fixed_head": kind,
        "backbone_weights": backbone.weights_id,
        "step": 0,
        "split": "val",
        "images": len(held_out),
        "classes": list(held_out.classes.names),
        "scores": found,
        "matching": match(table).tolist(),
        "confusion": table.tolist(),
        "environment": environment(),
    })  # fmt: skip


def _key_of(variant: Variant, seed: int) -> tuple[str, ...]:
    return _key(variant.experiment.but(seed=seed).to_record() | {"start_from": variant.start_name(seed)}, variant.fixed)


def _key(experiment: dict[str, Any], fixed: str | None) -> tuple[str, ...]:
    """Identifies a run: its experiment without `NOT_DISTINCTIVE`, missing keys at their defaults, shifts="auto" resolved."""
    complete = _DEFAULTS | experiment
    if complete["shifts"] == "auto":
        complete["shifts"] = list(AUTO)
    kept = {key: value for key, value in complete.items() if key not in NOT_DISTINCTIVE}
    return (repr(sorted(kept.items())), str(fixed))
