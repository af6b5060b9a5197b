"""STEGO's successors on the same features: variants of the chapter "After STEGO", and its table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stego_lib.backbone import EMBEDDED
from stego_lib.datasets.classes import distinct_names
from stego_lib.experiment import SUCCESSORS, Experiment
from stego_lib.utils.paths import user_path

from .results import MAIN, NAMES, mean_and_spread, read_records
from .study import Study, Variant

GROUP = "method"
STEPS = {
    "scenes": {"smooseg": 1500, "primaps": 300, "hp": 60, "cause": 30},
    "camvid": {"smooseg": 300, "primaps": 120, "hp": 40, "cause": 30},
}
"""Steps by dataset and method that train for a minute to one and a half on one core of the machine of the records (AMD EPYC, no bfloat16
units), at which STEGO's recipe takes half a minute; DepthG has the recipe's."""
PUBLISHED_SHIFTS = (-0.02, 0.0, 0.5)
"""SmooSeg's two, of Cityscapes and DINO ViT-S/8 (released code); it has none of kNN pairs."""


def successors(base: Experiment) -> list[Variant]:
    """STEGO by the recipe `base`, and each successor with its published settings; shifts are calibrated unless they are named.

    DepthG is among them for scenes, which come with depth maps.
    """
    steps = STEPS.get(base.dataset, {})
    made = {
        method: base.but(**SUCCESSORS[method], method=method, steps=steps.get(method, base.steps))
        for method in SUCCESSORS
        if method != "depthg" or base.dataset == "scenes"
    }
    found = [Variant(GROUP, NAMES["stego"], base), *(Variant(GROUP, NAMES[key], one) for key, one in made.items())]
    on_code = made["primaps"].but(head=base.head, code_dim=base.code_dim)
    published = made["smooseg"].but(shifts=PUBLISHED_SHIFTS)
    return [
        *found,
        Variant(GROUP, f"{NAMES['primaps']} on STEGO's code", on_code, start=base),
        Variant(GROUP, f"{NAMES['smooseg']}, published shifts", published),
    ]


KMEANS = "k-means on the features"
SETS = {folder: ", ".join(MAIN[folder]) for folder in ("scenes", "camvid", "camvid_photos")}
"""What the chapter compares on: folder of the main run records, which have k-means -> title. The newest backbone was not compared."""


def base_of(folder: str, **changes: Any) -> Experiment:
    """The recipe of one of `SETS`, with changes. A backbone that is not embedded is a file, which is not part of the project."""
    _, backbone = MAIN[folder]
    file = backbone if backbone in EMBEDDED else f"{backbone}.safetensors"
    return Experiment.preset(folder.partition("_")[0], **({"backbone": file} | changes))


def comparison(study: Study, baselines: str | Path) -> pd.DataFrame:
    """One row per method: seeds, accuracy and mIoU without and with CRF, linear probe, steps, seconds; mean ± standard deviation.

    baselines: folder of records of STEGO's recipe, for k-means on the same features.
    """
    rows = {KMEANS: _row(read_records(baselines), "kmeans_features")}
    for name, kept in _kept(study).items():
        seconds = pd.Series([record["training_seconds"] for record in kept if "training_seconds" in record])
        more = {"steps": str(kept[0]["step"]), "seconds of training": f"{seconds.median():.0f}" if len(seconds) else ""}
        rows[name] = _row(kept, "cluster") | more
    return pd.DataFrame.from_dict(rows, orient="index").fillna("").rename_axis("method")


def class_means(study: Study, baselines: str | Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """IoU of each class, in percent, mean over seeds, of k-means and of each method without CRF; and the names of the classes."""
    kmeans = read_records(baselines)
    rows = {KMEANS: (kmeans, "kmeans_features")} | {name: (kept, "cluster") for name, kept in _kept(study).items()}
    means = {
        name: np.array([record["scores"][key]["iou"] for record in kept], float).mean(0)
        for name, (kept, key) in rows.items()
    }
    return means, distinct_names(kmeans[0]["classes"])


def overview(records: str | Path, seeds: Sequence[int]) -> pd.DataFrame:
    """mIoU of each method on each of `SETS`, without and with CRF; mean ± standard deviation. records: book/records."""
    columns: dict[tuple[str, str], pd.Series] = {}
    for folder, title in SETS.items():
        study = Study(successors(base_of(folder)), seeds, user_path(records) / "studies" / "successors")
        table = comparison(study, user_path(records) / folder)
        columns |= {(title, score): table[score] for score in ("mIoU", "mIoU + CRF")}
    return (
        pd.DataFrame(columns)
        .reindex(dict.fromkeys(name for column in columns.values() for name in column.index))
        .fillna("")
    )


def _kept(study: Study) -> dict[str, list[dict[str, Any]]]:
    """The records of each variant that has any."""
    found = {
        variant.name: [record for seed in study.seeds if (record := study.record(variant, seed))]
        for variant in study.variants
    }
    return {name: kept for name, kept in found.items() if kept}


def _row(records: list[dict[str, Any]], method: str) -> dict[str, Any]:
    """Scores of one method of some run records."""
    row: dict[str, Any] = {"seeds": len(records)}
    columns = {"accuracy": (method, "accuracy"), "mIoU": (method, "miou"), "mIoU + CRF": (f"{method}_crf", "miou")}
    if method == "cluster":
        columns["mIoU, linear probe (labels)"] = ("linear", "miou")
    for title, (key, score) in columns.items():
        values = pd.Series([record["scores"][key][score] for record in records if key in record["scores"]])
        row[title] = mean_and_spread(values.mean(), values.std()) if len(values) else ""
    return row
