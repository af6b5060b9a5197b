"""Reads the checkpoints released by STEGO's authors: pickles of PyTorch Lightning 1.5 with OmegaConf options.

Neither package is needed, and no code of the file is executed, see `weights`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..datasets import DATASETS, Classes, cityscapes, cocostuff, potsdam
from ..datasets.classes import distinct_colors
from ..experiment import Experiment
from ..utils.errors import StegoError, explained
from ..utils.paths import user_path
from .dino import DinoViT, dino_vit
from .weights import read_weights

# Prefix of the backbone's tensors. DINO's names follow.
VIT = "net.model."
# Published names of the trained tensors -> names in `Stego`. A linear head has no "net.cluster2".
LAYERS = {
    "net.cluster1.0.weight": "head.linear.weight",
    "net.cluster1.0.bias": "head.linear.bias",
    "net.cluster2.0.weight": "head.nonlinear.0.weight",
    "net.cluster2.0.bias": "head.nonlinear.0.bias",
    "net.cluster2.2.weight": "head.nonlinear.2.weight",
    "net.cluster2.2.bias": "head.nonlinear.2.bias",
    "cluster_probe.clusters": "cluster_probe.clusters",
    "linear_probe.weight": "linear_probe.classifier.weight",
    "linear_probe.bias": "linear_probe.classifier.bias",
}
# Tensors that evaluation does not use: an unused probe, and the decoder of the reconstruction loss.
UNUSED = {"train_cluster_probe.clusters", "decoder.weight", "decoder.bias"}
# Attention heads of each published `model_type`.
HEADS = {"vit_tiny": 3, "vit_small": 6, "vit_base": 12}
# Published names of datasets -> names here, if they differ.
DATASET_NAMES = {"potsdam": "potsdam3", "directory": "folder"}
# Published options -> fields of `Experiment` with the same values.
OPTIONS = {
    "max_steps": "steps",
    "batch_size": "batch_size",
    "num_neighbors": "neighbors",
    "res": "train_size",
    "pointwise": "centering",
    "feature_samples": "points",
    "neg_samples": "negatives",
    "lr": "lr_head",
}
# Published options -> fields of `Official` with the same values.
OFFICIAL = {
    "zero_clamp": "zero_clamp",
    "stabalize": "stabilize",
    "rec_weight": "rec_weight",
    "crf_weight": "crf_weight",
    "aug_alignment_weight": "aug_alignment_weight",
}


@dataclass(frozen=True)
class Published:
    """A released checkpoint, converted."""

    experiment: Experiment
    """Settings in the file; the backbone is the file itself."""
    classes: Classes
    """Classes of the dataset, or 'class 0', 'class 1', ... if it is unknown."""
    vit: DinoViT
    """The backbone."""
    weights: dict[str, Tensor]
    """State dict of head and probes of `Stego`."""
    step: int
    """Training steps."""


def read_published(path: str | Path) -> Published:
    """Reads a released .ckpt file. Raises StegoError for missing or unknown tensors."""
    path = user_path(path)
    stored = read_weights(path)[0]
    problem = f"{path} is not a checkpoint released by STEGO's authors"
    with explained((AttributeError, KeyError, TypeError), problem, "Check the file."):
        tensors, options = stored["state_dict"], stored["hyper_parameters"]["cfg"]
        # OmegaConf keeps the options in _content, and the value of each in _val.
        options = {key: getattr(value, "_val", value) for key, value in options._content.items()}
    nonlinear = "net.cluster2.0.weight" in tensors
    layers = {name: ours for name, ours in LAYERS.items() if nonlinear or not name.startswith("net.cluster2.")}
    trained = {name for name in tensors if name not in UNUSED and not name.startswith(VIT)}
    if wrong := sorted(layers.keys() ^ trained):
        raise StegoError(f"{problem}: {', '.join(wrong)} missing or unknown. Check the file.")
    weights = {ours: tensors[name].float() for name, ours in layers.items()}
    backbone = {name.removeprefix(VIT): value for name, value in tensors.items() if name.startswith(VIT)}
    vit = dino_vit(backbone, path, HEADS.get(options.get("model_type", "")))
    n_classes, n_clusters = len(weights["linear_probe.classifier.bias"]), len(weights["cluster_probe.clusters"])
    dataset = options.get("dataset_name", "")
    dataset = DATASET_NAMES.get(dataset, dataset)
    crop = options.get("crop_type")
    values = _renamed(options, OPTIONS) | {
        "backbone": str(path),
        "code_dim": len(weights["head.linear.bias"]),
        "head": "nonlinear" if nonlinear else "linear",
        "dropout": 0.1 if options.get("dropout", True) else 0.0,
        "crop": crop if crop in ("five", "random") else "none",
        "official": _renamed(options, OFFICIAL)
        | {"keys": options.get("dino_feat_type") == "KK", "extra_clusters": n_clusters - n_classes},
    }
    if dataset in DATASETS:
        values["dataset"] = dataset
    for field, kind in (("weights", "weight"), ("shifts", "shift")):
        numbers = [options.get(f"{pair}_{kind}") for pair in ("pos_intra", "pos_inter", "neg_inter")]
        if None not in numbers:
            values[field] = numbers
    paper = {**cocostuff.CLASSES, "cityscapes": cityscapes.CLASSES, "potsdam3": potsdam.CLASSES}
    classes = paper.get(dataset)
    if classes is None or len(classes) != n_classes:
        classes = Classes(tuple(f"class {i}" for i in range(n_classes)), tuple(distinct_colors(n_classes)))
    return Published(Experiment.from_dict(values), classes, vit, weights, stored.get("global_step", 0))


def _renamed(options: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {field: options[name] for name, field in names.items() if options.get(name) is not None}
