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
