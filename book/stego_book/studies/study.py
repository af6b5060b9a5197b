"""Studies: variants of an experiment with several seeds each, and one run record per run."""

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from stego_lib.backbone import EMBEDDED, Backbone, choose_device, choose_precision
from stego_lib.calibration import AUTO_SHIFTS
from stego_lib.datasets import open_split, open_training_set
from stego_lib.evaluation import evaluate
from stego_lib.experiment import Experiment
from stego_lib.features.store import content_fingerprints
from stego_lib.provenance import Provenance
from stego_lib.training import train
from stego_lib.utils.errors import StegoError
from stego_lib.utils.fields import split_backbone
from stego_lib.utils.files import fingerprint, write_json
from stego_lib.utils.paths import runs_root, user_path
from stego_lib.utils.progress import progress

from .fixed_heads import score_fixed_head
from .results import SCORES, mean_and_spread, read_records

PROBES = ("cluster", "linear")


@dataclass(frozen=True)
class Variant:
    """One row of a study."""

    group: str
    """The varied quantity."""
    name: str
    """The value."""
    experiment: Experiment
    """Its seed is replaced by the study's seeds."""
    crf: bool = False
    """Whether the row reads the scores after the CRF."""
    start: Experiment | None = None
    """Experiment whose run with the same seed initializes this one; trained first if missing."""
    fixed_head: str | None = None
    """A head of `FIXED_HEADS` instead of a trained one."""

    def identity(self, seed: int) -> str:
        """Fingerprint of everything except the provenance; equals `identity` of its record."""
        values = self.experiment.but(seed=seed).to_record()
        values["start_from"] = None if self.start is None else self.start.but(seed=seed).name
        return identity(values, self.fixed_head)


def identity(experiment: dict[str, Any], fixed_head: str | None) -> str:
    """Fingerprint of a run from its experiment (`Experiment.to_record`), with shifts="auto" replaced by its rule."""
    if experiment["shifts"] == "auto":
        experiment = experiment | {"shifts": list(AUTO_SHIFTS)}
    return fingerprint(repr(sorted(experiment.items())), str(fixed_head))


def vary(base: Experiment, group: str, changes: Mapping[str, dict[str, Any]]) -> list[Variant]:
    """A group of variants: name -> changes of `base`, without CRF."""
    return [Variant(group, name, base.but(**{"crf": False, **change})) for name, change in changes.items()]


class Study:
    """All variants with all seeds, and their records in a folder. Recorded runs are not repeated.

    A record belongs to a variant if the experiment, precision, feature store and, if available here, backbone weights
    and images agree. Values missing in a record are not compared. Raises StegoError if records of a variant have
    different provenances and all of them match.
    """

    def __init__(self, variants: Sequence[Variant], seeds: Sequence[int], folder: str | Path, *others: str | Path):
        """folder: records, also of new runs; others: folders with further records."""
        self.variants, self.seeds, self.folder = list(variants), list(seeds), user_path(folder)
        self._records: dict[str, list[dict[str, Any]]] = {}
        for some in (self.folder, *map(user_path, others)):
            for record in read_records(some) if any(some.glob("*.json")) else []:
                self._keep(record)

    def record(self, variant: Variant, seed: int) -> dict[str, Any] | None:
        """The run record of a variant with a seed, or None."""
        return self.records(variant).get(seed)

    def records(self, variant: Variant) -> dict[int, dict[str, Any]]:
        """The records of a variant by seed."""
        candidates = {seed: self._records.get(variant.identity(seed), []) for seed in self.seeds}
        recorded = [origin(record) for records in candidates.values() for record in records]
        images = any(values.get("images") or values.get("data") for values in recorded)
        here = known_here(variant.experiment, images)
        by_seed: dict[int, dict[str, Any]] = {}
        for seed, records in candidates.items():
            for record in records:
                if not record["scores"] or differing(record, here):
                    continue
                for other in by_seed.values():
                    if fields := differing(record, origin(other), ignored=("start",)):
                        text = f"{self.folder} holds records of {variant.name!r} that differ in {', '.join(fields)}"
                        raise StegoError(f"{text}. Keep them in separate folders.")
                by_seed[seed] = record
        return by_seed

    def missing(self) -> list[tuple[Variant, int]]:
        """Variants and seeds without a record, without duplicates, ordered by seed."""
        runs: dict[Any, tuple[Variant, int]] = {}
        for seed in self.seeds:
            for variant in self.variants:
                if self.record(variant, seed) is None:
                    store = (variant.experiment.precision, variant.experiment.feature_store)
                    runs.setdefault((variant.identity(seed), store), (variant, seed))
        return list(runs.values())

    def run(self, limit: int | None = None, runs_dir: str | Path | None = None) -> None:
        """Trains and scores the missing runs, at most `limit` (None: all), and writes a record for each."""
        for variant, seed in progress(self.missing()[:limit], "runs of the study"):
            record = run_variant(variant, seed, runs_dir)
            name = re.sub(r"[^a-z0-9.]+", "-", f"{variant.group} {variant.name}".lower()).strip("-")
            key = fingerprint(variant.identity(seed), Provenance.from_dict(record["provenance"]).key())[:8]
            write_json(self.folder / f"{name}-seed{seed}-{key}.json", record)
            self._keep(record)

    def scores(self) -> pd.DataFrame:
        """One row per recorded variant, seed and probe: group, name, seed, step, probe, scores (percent)."""
        rows = []
        for variant in self.variants:
            for seed, record in self.records(variant).items():
                for probe in PROBES:
                    if score := record["scores"].get(f"{probe}_crf" if variant.crf else probe):
                        values = [score.get(key) for key in SCORES]
                        rows.append([variant.group, variant.name, seed, record["step"], probe, *values])
        return pd.DataFrame(rows, columns=["group", "name", "seed", "step", "probe", *SCORES])

    def table(self, group: str) -> pd.DataFrame:
        """One row per variant of a group: recorded seeds, accuracy and mIoU of both probes, mean ± deviation."""
        names = [variant.name for variant in self.variants if variant.group == group]
        scores = self.scores().query("group == @group")
        table = scores.groupby(["name", "probe"])[["accuracy", "miou"]].agg(mean_and_spread).unstack()
        table.columns = [f"{probe} {'mIoU' if score == 'miou' else score}" for score, probe in table.columns]
        columns = [f"{probe} {score}" for probe in PROBES for score in ("accuracy", "mIoU")]
        table = table.astype(object).reindex(index=names, columns=columns, fill_value="not run").fillna("not run")
        table.insert(0, "seeds", scores.groupby("name")["seed"].nunique().reindex(names).fillna(0).astype(int))
        return table.rename_axis(group)

    def seconds(self) -> pd.Series:
        """Seconds of each recorded run (training and scoring)."""
        records = [record for variant in self.variants for record in self.records(variant).values()]
        return pd.Series([record["seconds"] for record in records if "seconds" in record], dtype=float)

    def _keep(self, record: dict[str, Any]) -> None:
        key = identity(record["experiment"], record.get("fixed_head"))
        self._records.setdefault(key, []).append(record)


def origin(record: dict[str, Any]) -> dict[str, Any]:
    """Provenance of a record, and "data", the fingerprint of the scored images."""
    return {**record["provenance"], "data": record.get("data")}


def differing(record: dict[str, Any], known: dict[str, Any], ignored: Sequence[str] = ()) -> list[str]:
    """Names of the values in `known` that differ from the record's."""
    own = origin(record)
    unknown = [key for key in own if own[key] is None or known.get(key) is None]
    fields = Provenance.from_dict(own).differing(Provenance.from_dict(known), (*unknown, *ignored))
    return fields + ["data"] * ("data" not in unknown and own["data"] != known["data"])


def known_here(experiment: Experiment, images: bool) -> dict[str, Any]:
    """The provenance that a run of `experiment` would have on this machine. images: include the image fingerprints."""
    precision = choose_precision(experiment.precision, choose_device(experiment.device))
    _, file = split_backbone(experiment.backbone)
    at_hand = experiment.backbone in EMBEDDED or (file and user_path(file).is_file())
    return {
        "weights": _weights(experiment.backbone) if at_hand else None,
        "precision": str(precision).removeprefix("torch."),
        "store": experiment.feature_store,
        **(_images(experiment.dataset, experiment.data_root, experiment.crop, experiment.n_classes) if images else {}),
    }


@cache
def _weights(backbone: str) -> str:
    return Backbone(backbone, device="cpu").weights_id


@cache
def _images(dataset: str, data_root: str, crop: str, n_classes: int | None) -> dict[str, str | None]:
    """Fingerprints of the training images and of the validation images ("data"), if available."""
    experiment = Experiment.from_dict(dict(dataset=dataset, data_root=data_root, crop=crop, n_classes=n_classes))
    if dataset == "scenes" and not (user_path(data_root) / dataset).exists():
        return {}  # opening them would generate them
    fingerprints: dict[str, str | None] = {}
    with suppress(StegoError):
        fingerprints["images"] = content_fingerprints(open_training_set(experiment), runs_root() / "features")["images"]
    with suppress(StegoError):
        fingerprints["data"] = content_fingerprints(open_split(experiment, "val"), runs_root() / "features")["images"]
    return fingerprints


def run_variant(variant: Variant, seed: int, runs_dir: str | Path | None = None) -> dict[str, Any]:
    """Trains (or, for a fixed head, fits) and scores a variant. Returns its run record with "seconds".

    For a trained variant also "training_seconds", without the run that it starts from.
    """
    started, experiment = time.perf_counter(), variant.experiment.but(seed=seed)
    if not open_split(experiment, "val").has_labels:
        raise StegoError(f"{experiment.dataset} has no labels in val, so its runs cannot be compared by scores.")
    if variant.start is not None:
        first = train(variant.start.but(seed=seed), runs_dir=runs_dir, resume=True)
        started, experiment = time.perf_counter(), experiment.but(start_from=str(first.folder))
    if variant.fixed_head is not None:
        record = score_fixed_head(variant.fixed_head, experiment, runs_dir)
    else:
        run = train(experiment, runs_dir=runs_dir)
        trained = time.perf_counter() - started
        record = evaluate(run, baselines=False) | {"training_seconds": round(trained, 1)}
        record["experiment"]["start_from"] = variant.start and variant.start.but(seed=seed).name
    return record | {"seconds": round(time.perf_counter() - started, 1)}
