"""Reads the checkpoints that STEGO's authors released.

They are pickles of PyTorch Lightning 1.5 with an OmegaConf object inside. Neither package is needed and no code from the
file is run: see `inert`. What the network looks like is read off its tensors; the options in the file say the rest.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..datasets import DATASETS, Classes, cityscapes, cocostuff, potsdam
from ..datasets.folder import distinct_colors
from ..experiment import Experiment
from ..networks.dino import DinoViT, dino_vit
from ..networks.pickles import load_inert, plain
from ..runtime.errors import StegoError
from ..runtime.paths import user_path

VIT = "net.model."
"""Prefix of the backbone's tensors; what follows are DINO's names."""
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
"""Published names of the trained tensors -> the names in `Stego`."""
OPTIONAL = {name for name in LAYERS if name.startswith("net.cluster2.")}
"""Missing where the head is the linear branch alone."""
UNUSED = {"train_cluster_probe.clusters", "decoder.weight", "decoder.bias"}
"""Tensors that take no part in evaluation: a probe of an abandoned experiment, the decoder of the reconstruction loss."""
HEADS = {"vit_tiny": 3, "vit_small": 6, "vit_base": 12}
"""Attention heads of each published `model_type`."""
DATASET_NAMES = {"potsdam": "potsdam3", "directory": "folder"}
"""Published names of datasets -> ours, where they differ."""
OPTIONS = {
    "max_steps": "steps", "batch_size": "batch_size", "num_neighbors": "neighbors", "res": "train_size", "dino_feat_type": "features",
    "zero_clamp": "zero_clamp", "stabalize": "stabilize", "pointwise": "centering", "feature_samples": "points", "neg_samples": "negatives",
    "lr": "lr_head", "rec_weight": "rec_weight", "crf_weight": "crf_weight", "aug_alignment_weight": "aug_alignment_weight",
}  # fmt: skip
"""Published options -> fields of `Experiment`, where the value is taken as it is."""


@dataclass(frozen=True)
class Published:
    """What a released checkpoint holds."""

    experiment: Experiment
    """The recipe, as far as the file tells; its backbone is the file itself, in float32 as published."""
    classes: Classes
    """Names and colors where the dataset is known and has as many, else 'class 0', 'class 1', ..."""
    vit: DinoViT
    """The backbone."""
    weights: dict[str, Tensor]
    """Head and probes, under the names of `Stego`."""
    step: int
    """Steps of training."""


def read_published(path: str | Path) -> Published:
    """Reads one of the released .ckpt files. Raises StegoError that names each tensor that is missing or unknown."""
    path = user_path(path)
    stored = load_inert(path)
    tensors = stored.get("state_dict")
    if not isinstance(tensors, dict):
        raise StegoError(f"{path} is not a released STEGO checkpoint: it holds no state_dict")
    _account_for(path, tensors)
    try:
        options = plain(stored.get("hyper_parameters")) or {}
    except StegoError as error:
        raise StegoError(f"{path}: {error}") from None
    options = options["cfg"] if isinstance(options.get("cfg"), dict) else options
    weights = {ours: tensors[name].float() for name, ours in LAYERS.items() if name in tensors}
    backbone = {name.removeprefix(VIT): value for name, value in tensors.items() if name.startswith(VIT)}
    vit = dino_vit(backbone, str(path), HEADS.get(str(options.get("model_type"))))
    n_classes, n_clusters = len(weights["linear_probe.classifier.bias"]), len(weights["cluster_probe.clusters"])
    dataset = str(options.get("dataset_name"))
    dataset = DATASET_NAMES.get(dataset, dataset)
    values = {ours: options[name] for name, ours in OPTIONS.items() if options.get(name) is not None}
    values |= {
        "backbone": str(path), "precision": "float32", "code_dim": len(weights["head.linear.bias"]), "extra_clusters": n_clusters - n_classes,
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
    step = stored.get("global_step")
    return Published(
        Experiment.from_dict(values),
        known if known is not None and len(known) == n_classes else _numbered(n_classes),
        vit,
        weights,
        step if isinstance(step, int) else 0,
    )


def _account_for(path: Path, tensors: dict[str, Any]) -> None:
    """Raises StegoError unless every tensor is known and none is missing. (Those of the backbone: `dino_vit` looks.)"""
    foreign = [str(name) for name, value in tensors.items() if not isinstance(value, Tensor)]
    if foreign:
        raise StegoError(f"{path} is not a released STEGO checkpoint: {', '.join(foreign[:5])} is no tensor")
    unknown = [name for name in tensors if name not in LAYERS and name not in UNUSED and not name.startswith(VIT)]
    nonlinear = any(name in tensors for name in OPTIONAL)
    missing = [name for name in LAYERS if name not in tensors and (nonlinear or name not in OPTIONAL)]
    if unknown or missing:
        wrong = [*(f"{name} is unknown" for name in unknown), *(f"{name} is missing" for name in missing)]
        raise StegoError(f"{path} is not a released STEGO checkpoint: {'; '.join(wrong)}")


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
