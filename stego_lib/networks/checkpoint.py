"""The experiment and classes of a released STEGO checkpoint, from its options and tensors."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..datasets import DATASETS, Classes, cityscapes, cocostuff, potsdam
from ..datasets.classes import distinct_colors
from ..experiment import Experiment
from ..utils.paths import user_path
from .dino import DinoViT
from .released import read_released

DATASET_NAMES = {"potsdam": "potsdam3", "directory": "folder"}
"""Published names of datasets -> ours, where they differ."""
OPTIONS = {
    "max_steps": "steps", "batch_size": "batch_size", "num_neighbors": "neighbors", "res": "train_size", 
    "pointwise": "centering", "feature_samples": "points", "neg_samples": "negatives",
    "lr": "lr_head",
}  # fmt: skip
"""Published options -> fields of `Experiment` with the same values."""
OFFICIAL = {
    "zero_clamp": "zero_clamp", "stabalize": "stabilize", "rec_weight": "rec_weight", "crf_weight": "crf_weight",
    "aug_alignment_weight": "aug_alignment_weight",
}  # fmt: skip
"""Published options -> fields of `experiment.Official` with the same values."""


@dataclass(frozen=True)
class Published:
    """A released checkpoint in terms of this library."""

    experiment: Experiment
    """The recipe, as far as the file states it; its backbone is the file itself, in float32 as published."""
    classes: Classes
    """Names and colors where the dataset is known and has as many, else 'class 0', 'class 1', ..."""
    vit: DinoViT
    """The backbone."""
    weights: dict[str, Tensor]
    """Head and probes, under the names of `Stego`."""
    step: int
    """Steps of training."""


def read_published(path: str | Path) -> Published:
    """Reads a released .ckpt file. Raises StegoError that names each tensor that is missing or unknown."""
    path = user_path(path)
    found = read_released(path)
    weights, options = found.weights, found.options
    n_classes, n_clusters = len(weights["linear_probe.classifier.bias"]), len(weights["cluster_probe.clusters"])
    dataset = str(options.get("dataset_name"))
    dataset = DATASET_NAMES.get(dataset, dataset)
    values = {ours: options[name] for name, ours in OPTIONS.items() if options.get(name) is not None}
    official = {ours: options[name] for name, ours in OFFICIAL.items() if options.get(name) is not None}
    values |= {
        "official": official | {"keys": options.get("dino_feat_type") == "KK", "extra_clusters": n_clusters - n_classes},
        "backbone": str(path), "precision": "float32", "code_dim": len(weights["head.linear.bias"]),
        "head": "nonlinear" if "head.nonlinear.0.weight" in weights else "linear",
        "dropout": 0.1 if options.get("dropout", True) else 0.0,
        "crop": crop if (crop := options.get("crop_type")) in ("five", "random") else "none",
    }  # fmt: skip
    if dataset in DATASETS:
        values["dataset"] = dataset
    for ours, kind in (("weights", "weight"), ("shifts", "shift")):
        three = [options.get(f"{pair}_{kind}") for pair in ("pos_intra", "pos_inter", "neg_inter")]
        if None not in three:
            values[ours] = three
    known = _classes_of(dataset)
    classes = known if known is not None and len(known) == n_classes else _numbered(n_classes)
    return Published(Experiment.from_dict(values), classes, found.vit, weights, found.step)


def _classes_of(dataset: str) -> Classes | None:
    """Classes of a dataset that a checkpoint may have been trained on."""
    if dataset in cocostuff.FORMS:
        coarse = cocostuff.FORMS[dataset].coarse
        names = tuple(cocostuff.TABLE["names"][c] for c in coarse)
        return Classes(names, tuple(cocostuff.COLORS[c] for c in coarse))
    return {"cityscapes": cityscapes.CLASSES, "potsdam3": potsdam.CLASSES}.get(dataset)


def _numbered(count: int) -> Classes:
    """Classes without names."""
    return Classes(tuple(f"class {i}" for i in range(count)), tuple(distinct_colors(count)))
