"""STEGO's successors on the same features: variants and tables of the chapter "Successors of STEGO"."""

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
from stego_lib.utils.errors import check_choice
from stego_lib.utils.paths import user_path

from .results import MAIN, NAMES, mean_and_spread
from .study import Study, Variant

GROUP = "method"
KMEANS = "k-means on the features"
# Dataset -> method -> steps until the score converges, see `curve` and records/studies/successors_curves.csv.
# HP and CAUSE have none: on a CPU they do not converge in the time of the others.
STEPS = {
    "scenes": {"smooseg": 1500, "primaps": 2000, "depthg": 300},
    "camvid": {"smooseg": 600},
    "labelmefacade": {"smooseg": 600},
}
# Steps of PriMaPs-EM if it starts from k-means instead of its first stage.
EM_STEPS = 600
# Column title -> score and probe.
COLUMNS = {
    "accuracy": ("accuracy", "cluster"),
    "mIoU": ("miou", "cluster"),
    "border F": ("border_f", "cluster"),
    "mIoU, linear probe (labels)": ("miou", "linear"),
}
# Folder of the main run records -> title of the dataset.
SETS = {folder: ", ".join(MAIN[folder]) for folder in ("scenes", "camvid_photos_d6", "labelmefacade")}


def successors(base: Experiment) -> list[Variant]:
    """k-means, STEGO by the recipe `base`, and the successors in `STEPS`: published settings, calibrated shifts."""
    check_choice("dataset", base.dataset, STEPS)
    base = base.but(crf=False)
    kmeans = base.but(head="none", steps=1)  # no weights to train
    variants = [Variant(GROUP, KMEANS, kmeans), Variant(GROUP, NAMES["stego"], base)]
    for method, steps in STEPS[base.dataset].items():
        experiment = base.but(**SUCCESSORS[method], method=method, steps=steps)
        variants.append(Variant(GROUP, NAMES[method], experiment))
        if method == "primaps":
            variants.append(
                Variant(GROUP, f"{NAMES[method]} from k-means", experiment.but(steps=EM_STEPS), start=kmeans)
            )
    return variants


def base_of(folder: str, **changes: Any) -> Experiment:
    """The recipe of a folder in `MAIN`, with changes. Backbones that are not embedded are files outside the project."""
    backbone = MAIN[folder][1]
    file = backbone if backbone in EMBEDDED else f"{backbone}.safetensors"
    return Experiment.preset(folder.partition("_")[0], **({"backbone": file} | changes))


def curve(method: str, experiment: Experiment, every: int, runs_dir: str | Path | None = None) -> pd.DataFrame:
    """Trains, and scores the clusters every `every` steps on the validation split, without CRF.

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


def comparison(study: Study) -> pd.DataFrame:
    """One row per method: seeds, steps, scores of clusters and linear probe (percent, mean ± standard deviation)."""
    scores = study.scores()
    table = scores.groupby("name", sort=False).agg(seeds=("seed", "nunique"), steps=("step", "first"))
    means = scores.groupby(["name", "probe"])[["accuracy", "miou", "border_f"]].agg(mean_and_spread).unstack()
    return (
        table.astype({"steps": str})
        .assign(**{title: means[key] for title, key in COLUMNS.items()})
        .rename_axis("method")
    )


def class_means(study: Study) -> tuple[dict[str, np.ndarray], list[str]]:
    """Method -> IoU of each class in percent, mean over seeds; and the class names."""
    recorded = {variant.name: list(study.records(variant).values()) for variant in study.variants}
    recorded = {name: records for name, records in recorded.items() if records}
    means = {
        name: np.array([record["scores"]["cluster"]["iou"] for record in records], float).mean(0)
        for name, records in recorded.items()
    }
    return means, distinct_names(next(iter(recorded.values()))[0]["classes"])


def overview(records: str | Path, seeds: Sequence[int]) -> pd.DataFrame:
    """mIoU of each method on each of `SETS`, mean ± standard deviation. records: book/records."""
    folder = user_path(records) / "studies" / "successors"
    tables = {
        title: comparison(Study(successors(base_of(name)), seeds, folder))["mIoU"] for name, title in SETS.items()
    }
    return pd.concat(tables, axis=1, sort=False).fillna("").rename_axis(None)
