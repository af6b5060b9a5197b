"""Reads the checkpoints released by STEGO's authors: pickles of PyTorch Lightning 1.5 with OmegaConf options.

Neither package is needed, and no code of the file is executed, see `weights`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..datasets import DATASETS, Classes
from ..datasets.classes import distinct_colors
from ..experiment import Experiment
from ..utils.errors import StegoError
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
    stored = stored if isinstance(stored, dict) else {}
    tensors, options = _tensors(stored, path), _options(stored)
    weights = {ours: tensors[name].float() for name, ours in LAYERS.items() if name in tensors}
    backbone = {name.removeprefix(VIT): value for name, value in tensors.items() if name.startswith(VIT)}
    vit = dino_vit(backbone, path, HEADS.get(str(options.get("model_type"))))
    n_classes, n_clusters = len(weights["linear_probe.classifier.bias"]), len(weights["cluster_probe.clusters"])
    dataset = DATASET_NAMES.get(str(options.get("dataset_name")), str(options.get("dataset_name")))
    crop = options.get("crop_type")
    official = _renamed(options, OFFICIAL)
    official |= {"keys": options.get("dino_feat_type") == "KK", "extra_clusters": n_clusters - n_classes}
    values = _renamed(options, OPTIONS) | {
        "backbone": str(path),
        "code_dim": len(weights["head.linear.bias"]),
        "head": "nonlinear" if "head.nonlinear.0.weight" in weights else "linear",
        "dropout": 0.1 if options.get("dropout", True) else 0.0,
        "crop": crop if crop in ("five", "random") else "none",
        "official": official,
    }
    if dataset in DATASETS:
        values["dataset"] = dataset
    for field, kind in (("weights", "weight"), ("shifts", "shift")):
        numbers = [options.get(f"{pair}_{kind}") for pair in ("pos_intra", "pos_inter", "neg_inter")]
        if None not in numbers:
            values[field] = numbers
    classes = _known_classes(dataset)
    if classes is None or len(classes) != n_classes:
        classes = Classes(tuple(f"class {i}" for i in range(n_classes)), tuple(distinct_colors(n_classes)))
    step = stored.get("global_step")
    return Published(Experiment.from_dict(values), classes, vit, weights, step if isinstance(step, int) else 0)


def _tensors(stored: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Returns the state dict. Raises StegoError for missing or unknown tensors of head and probes."""
    tensors = stored.get("state_dict")
    tensors = tensors if isinstance(tensors, dict) else {}
    tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    nonlinear = any(name.startswith("net.cluster2.") for name in tensors)
    expected = {name for name in LAYERS if nonlinear or not name.startswith("net.cluster2.")}
    trained = {name for name in tensors if name not in UNUSED and not name.startswith(VIT)}
    if wrong := sorted(expected ^ trained):
        raise StegoError(f"{path} is not a released STEGO checkpoint: {', '.join(wrong)} missing or unknown.")
    return tensors


def _options(stored: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of an OmegaConf object or a dictionary."""
    parameters = stored.get("hyper_parameters")
    options = parameters.get("cfg", parameters) if isinstance(parameters, dict) else None
    options = getattr(options, "_content", options)
    return {key: getattr(value, "_val", value) for key, value in options.items()} if isinstance(options, dict) else {}


def _renamed(options: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {field: options[name] for name, field in names.items() if options.get(name) is not None}


def _known_classes(dataset: str) -> Classes | None:
    """Classes of a dataset of the paper."""
    from ..datasets import cityscapes, cocostuff, potsdam

    if dataset in cocostuff.FORMS:
        return cocostuff.FORMS[dataset].classes
    return {"cityscapes": cityscapes.CLASSES, "potsdam3": potsdam.CLASSES}.get(dataset)
