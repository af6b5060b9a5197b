"""Run records and results with made-up numbers."""

from typing import Any

import numpy as np

from stego_book.studies.study import Variant
from stego_lib import Experiment

PROVENANCE = {"images": None, "labels": None, "weights": "a", "precision": "float32", "store": "full", "start": None}


def record(seed: int, provenance: dict[str, Any] | None = None, **experiment: Any) -> dict[str, Any]:
    """A run record of scenes with scores drawn from the seed. provenance: changes of `PROVENANCE`."""
    rng = np.random.default_rng(seed)
    names = ("linear", "cluster", "kmeans_features")  # not in the order of tables
    scores = {
        name: {"accuracy": float(rng.uniform(30, 90)), "miou": float(rng.uniform(10, 60)), "iou": [1.0, None]}
        for name in names
    }
    return {
        "experiment": Experiment.preset("scenes", seed=seed, **({"crf": False} | experiment)).to_record(),
        "provenance": PROVENANCE | {"versions": {}} | (provenance or {}),
        "step": 5,
        "split": "val",
        "scores": scores,
    }


def study_record(variant: Variant, seed: int, miou: float, **provenance: Any) -> dict[str, Any]:
    """The run record of a variant of a study: an mIoU without the CRF, one point more with it."""
    scores = {
        name: {"accuracy": miou + 10, "miou": miou, "iou": [miou]} for name in ("cluster", "linear", "cluster_crf")
    }
    scores["cluster_crf"] = {"accuracy": miou + 11, "miou": miou + 1, "iou": [miou]}
    about = {"experiment": variant.experiment.but(seed=seed).to_record(), "step": 3, "scores": scores, "seconds": 2.0}
    about |= {"provenance": PROVENANCE | {"weights": None, "versions": {}} | provenance}
    return about | {"fixed_head": variant.fixed_head}


def ways(**seconds: float) -> dict[str, Any]:
    """Times of each way, in seconds; underscores in names are spaces."""
    return {"ways": {name.replace("_", " "): {"median_s": value} for name, value in seconds.items()}}


def speed_rows() -> dict[str, Any]:
    """Rows of a result of `make bench`."""
    evaluated = {"published, no CRF": 2.0, "ours, no CRF": 0.5, "published, its CRFs": 1.0, "ours, with CRF": 1.0}
    exact = {"images": 600_000, "hours": 200.0, "bytes": 3e9}
    return {
        "rest": {"batch": 4} | ways(published=0.2, ours=0.1),
        "step": {"batch": 16} | ways(published=10, store=0.25, online_float32=5),
        "extraction": {"batch": 4, "bfloat16_cosine": {"mean": 0.9999}}
        | ways(published=1.2, float32=0.6, bfloat16=2.4),
        "evaluation": {"kinds": {"smooth": ways(**evaluated)}},
        "neighbors": ways(published=0.2, ours=0.1) | {"many": {"images": 1000, "seconds": 2.0}, "extrapolated": exact},
        "memory": {"peak_bytes": 2_500_000_000, "store_bytes": 10_000_000_000},
        "recipe": {"total_s": 7200, "measured": {"step": {"median_s": 0.5}}},
    }
