"""STEGO's successors on the same features: variants of the chapter "After STEGO", and its table."""

from pathlib import Path
from typing import Any

import pandas as pd

from ..experiment import SUCCESSORS, Experiment
from .results import NAMES, mean_and_spread, read_records
from .study import Study, Variant

GROUP = "method"
STEPS = {
    "scenes": {"smooseg": 1500, "primaps": 300, "hp": 60, "cause": 30},
    "camvid": {"smooseg": 300, "primaps": 120, "hp": 40, "cause": 30},
}
"""Steps by dataset and method that train for about a minute on one core of the machine of the records (AMD EPYC, no bfloat16
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


def comparison(study: Study, baselines: str | Path) -> pd.DataFrame:
    """One row per method: seeds, accuracy and mIoU without and with CRF, linear probe, steps, seconds; mean ± standard deviation.

    baselines: folder of records of STEGO's recipe, for k-means on the same features.
    """
    kmeans = read_records(baselines)
    rows = {"k-means on the features": _row(kmeans, "kmeans_features")}
    for variant in study.variants:
        kept = [record for seed in study.seeds if (record := study.record(variant, seed))]
        if kept:
            seconds = pd.Series([record["training_seconds"] for record in kept if "training_seconds" in record])
            more = {"steps": str(kept[0]["step"]), "seconds of training": f"{seconds.median():.0f}" if len(seconds) else ""}
            rows[variant.name] = _row(kept, "cluster") | more
    return pd.DataFrame.from_dict(rows, orient="index").fillna("").rename_axis("method")


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
