"""Run records and results with made-up numbers."""

import numpy as np

from stego_book.studies import speed
from stego_book.studies.study import Variant


def record(seed: int, **experiment: object) -> dict:
    """A run record with scores drawn from the seed."""
    rng = np.random.default_rng(seed)
    names = ("linear", "cluster", "kmeans_features")  # not in the order of tables
    scores = {
        name: {"accuracy": float(rng.uniform(30, 90)), "miou": float(rng.uniform(10, 60)), "iou": [1.0, None]}
        for name in names
    }
    return {
        "experiment": {"dataset": "scenes", "steps": 5, "seed": seed} | experiment,
        "step": 5,
        "split": "val",
        "scores": scores,
    }


def study_record(variant: Variant, seed: int, miou: float, weights: str | None = None) -> dict:
    """The run record of a variant of a study: an mIoU without the CRF, one point more with it."""
    scores = {
        name: {"accuracy": miou + 10, "miou": miou, "iou": [miou]} for name in ("cluster", "linear", "cluster_crf")
    }
    scores["cluster_crf"] = {"accuracy": miou + 11, "miou": miou + 1, "iou": [miou]}
    about = {"experiment": variant.experiment.but(seed=seed).to_record(), "step": 3, "scores": scores, "seconds": 2.0}
    return about | ({"backbone_weights": weights} if weights else {})


def ways(**seconds: float) -> dict:
    """Times of each way, in seconds; underscores in names are spaces."""
    return {
        name.replace("_", " "): {"median_s": value, "min_s": value, "max_s": value, "n": 3}
        for name, value in seconds.items()
    }


def speed_rows() -> dict:
    """Rows of a result of `make bench`."""
    evaluated = {"published, no CRF": 2.0, "ours, no CRF": 0.5, "published, its CRFs": 1.0, "ours, with CRF": 1.0}
    least = {
        name: {speed.NETWORK: s, "ViT-S/8, 320 px": 2 * s} for name, s in {"float32": 0.1, "bfloat16": 0.5}.items()
    }
    return {
        "limits": {
            "gflop_per_s": {"float32": 100.0, "bfloat16": 20.0}, "flop_per_image": dict.fromkeys(least["float32"], 10000000000.0),
            "least_s_per_image": least, "cores": 2,
        },
        "rest": {"batch": 4, "ways": ways(published=0.2, ours=0.1)},
        "step": {"batch": 16, "ways": ways(published=10, store=0.25, online_float32=5)},
        "extraction": {"batch": 4, "ways": ways(published=1.2, float32=0.6, bfloat16=2.4), "bfloat16_cosine": {"mean": 0.9999}},
        "evaluation": {"kinds": {"smooth": {"ways": ways(**evaluated)}}},
        "neighbors": {
            "ways": ways(published=0.2, ours=0.1), "many": {"images": 1000, "seconds": 2.0},
            "extrapolated": {"images": 600_000, "hours": 200.0, "bytes": 3e9},
        },
        "memory": {"peak_bytes": 2_500_000_000, "store_bytes": 10_000_000_000},
        "recipe": {"total_s": 7200, "measured": {"step": {"median_s": 0.5}}},
    }  # fmt: skip
