"""STEGO's successors on the same features: variants of the chapter "After STEGO", and its tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stego_lib.backbone import EMBEDDED
from stego_lib.datasets import open_split, open_training_set
from stego_lib.datasets.classes import distinct_names
from stego_lib.evaluation import open_views, probe_confusion
from stego_lib.experiment import SUCCESSORS, Experiment
from stego_lib.features import open_features
from stego_lib.metrics import match, scores
from stego_lib.probes import fit_probes
from stego_lib.training import train
from stego_lib.utils.paths import user_path

from .results import MAIN, NAMES, mean_and_spread, read_records
from .study import Study, Variant

GROUP = "method"
# Steps by dataset and method at which the score has converged (`curve`, book/records/studies/successors_curves.csv).
# HP and CAUSE have none: they do not converge in minutes on a CPU. The depth term has the recipe's steps.
STEPS = {
    "scenes": {"smooseg": 1500, "primaps": 1500, "depthg": 300},
    "camvid": {"smooseg": 600, "primaps": 600},
}
# SmooSeg's two shifts for Cityscapes and DINO ViT-S/8 (released code); it has none for kNN pairs.
PUBLISHED_SHIFTS = (-0.02, 0.0, 0.5)
KMEANS = "k-means on the features"
# What the chapter compares on: folder of the main run records, which have k-means -> title.
SETS = {folder: ", ".join(MAIN[folder]) for folder in ("scenes", "camvid_photos_d6")}


def successors(base: Experiment) -> list[Variant]:
    """STEGO by the recipe `base`, and each successor in `STEPS` with its published settings and calibrated shifts."""
    methods = {
        method: base.but(**SUCCESSORS[method], method=method, steps=steps)
        for method, steps in STEPS[base.dataset].items()
    }
    published = methods["smooseg"].but(shifts=PUBLISHED_SHIFTS)
    return [
        Variant(GROUP, NAMES["stego"], base),
        *(Variant(GROUP, NAMES[method], experiment) for method, experiment in methods.items()),
        Variant(GROUP, f"{NAMES['smooseg']}, published shifts", published),
    ]


def base_of(folder: str, **changes: Any) -> Experiment:
    """The recipe of a folder in `MAIN`, with changes. A backbone that is not embedded is a file outside the project."""
    backbone = MAIN[folder][1]
    file = backbone if backbone in EMBEDDED else f"{backbone}.safetensors"
    return Experiment.preset(folder.partition("_")[0], **({"backbone": file} | changes))


def curve(method: str, experiment: Experiment, every: int, runs_dir: str | Path | None = None) -> pd.DataFrame:
    """Trains, and scores the clusters after every so many steps on the validation split, without CRF.

    Columns: dataset, method (the given name), seed, step, miou, accuracy. Not for CAUSE, which fits its clusters after
    the last step.
    """
    run = train(experiment.but(official={"keep_every": every}), runs_dir=runs_dir)
    views, rows = open_views(run, open_split(experiment, "val")), []
    training = open_features(
        open_training_set(experiment), run.backbone, experiment.train_size, run.folder.parent / "features"
    )
    for step, state in run.kept_weights():
        run.model.load_state_dict(state)
        if not experiment.own_prototypes:
            fit_probes(run.model, training, experiment.seed, linear=False)
        table = probe_confusion(run.model, views.plain, views.flipped)
        score = scores(table, match(table))
        rows.append([experiment.dataset, method, experiment.seed, step, score["miou"], score["accuracy"]])
    return pd.DataFrame(rows, columns=["dataset", "method", "seed", "step", "miou", "accuracy"]).round(2)


def comparison(study: Study, baselines: str | Path) -> pd.DataFrame:
    """One row per method: seeds, scores (mean ± standard deviation), linear probe, steps, seconds of training.

    baselines: folder of records of STEGO's recipe, for k-means on the same features.
    """
    rows = {KMEANS: _row(read_records(baselines), "kmeans_features")}
    for name, records in _recorded(study).items():
        seconds = pd.Series([record["training_seconds"] for record in records if "training_seconds" in record])
        rows[name] = _row(records, "cluster") | {"steps": str(records[0]["step"])}
        rows[name]["seconds of training"] = f"{seconds.median():.0f}" if len(seconds) else ""
    return pd.DataFrame.from_dict(rows, orient="index").fillna("").rename_axis("method")


def class_means(study: Study, baselines: str | Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """IoU of each class in percent, mean over seeds, of k-means and of each method; and the names of the classes."""
    kmeans = read_records(baselines)
    rows = {KMEANS: (kmeans, "kmeans_features")}
    rows |= {name: (records, "cluster") for name, records in _recorded(study).items()}
    means = {
        name: np.array([record["scores"][method]["iou"] for record in records], float).mean(0)
        for name, (records, method) in rows.items()
    }
    return means, distinct_names(kmeans[0]["classes"])


def overview(records: str | Path, seeds: Sequence[int]) -> pd.DataFrame:
    """mIoU of each method on each of `SETS`, without and with CRF; mean ± standard deviation. records: book/records."""
    tables = {}
    for folder, title in SETS.items():
        study = Study(successors(base_of(folder)), seeds, user_path(records) / "studies" / "successors")
        tables[title] = comparison(study, user_path(records) / folder)[["mIoU", "mIoU + CRF"]]
    return pd.concat(tables, axis=1, sort=False).fillna("").rename_axis(None)


def _recorded(study: Study) -> dict[str, list[dict[str, Any]]]:
    """The records of each variant that has any."""
    records = {variant.name: list(study.records(variant).values()) for variant in study.variants}
    return {name: some for name, some in records.items() if some}


def _row(records: list[dict[str, Any]], method: str) -> dict[str, Any]:
    """Scores of one method of some run records."""
    row: dict[str, Any] = {"seeds": len(records)}
    columns = {"accuracy": (method, "accuracy"), "mIoU": (method, "miou"), "mIoU + CRF": (f"{method}_crf", "miou")}
    if method == "cluster":
        columns["mIoU, linear probe (labels)"] = ("linear", "miou")
    for title, (key, score) in columns.items():
        values = [record["scores"][key][score] for record in records if key in record["scores"]]
        row[title] = mean_and_spread(values) if values else ""
    return row
