"""The tensors and options of the checkpoints that STEGO's authors released.

They are pickles of PyTorch Lightning 1.5 with an OmegaConf object inside. Neither package is needed, and no code of the file
is run, see `pickles`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..utils.errors import StegoError
from ..utils.paths import user_path
from .dino import DinoViT, dino_vit
from .pickles import load_inert, plain

VIT = "net.model."
"""Prefix of the backbone's tensors; DINO's names follow."""
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
"""Tensors without a part in evaluation: a probe of an abandoned experiment, the decoder of the reconstruction loss."""
HEADS = {"vit_tiny": 3, "vit_small": 6, "vit_base": 12}
"""Attention heads of each published `model_type`."""


@dataclass(frozen=True)
class Released:
    """The content of a released checkpoint."""

    vit: DinoViT
    """The backbone."""
    weights: dict[str, Tensor]
    """Head and probes, under the names of `Stego`."""
    options: dict[str, Any]
    """The published options, plain values only."""
    step: int
    """Steps of training."""


def read_released(path: str | Path) -> Released:
    """Reads a released .ckpt file. Raises StegoError that names each tensor that is missing or unknown."""
    path = user_path(path)
    stored = load_inert(path)
    tensors = stored.get("state_dict")
    if not isinstance(tensors, dict):
        raise StegoError(f"{path} is not a released STEGO checkpoint: it holds no state_dict")
    _check_names(path, tensors)
    try:
        options = plain(stored.get("hyper_parameters")) or {}
    except StegoError as error:
        raise StegoError(f"{path}: {error}") from None
    options = options["cfg"] if isinstance(options.get("cfg"), dict) else options
    weights = {ours: tensors[name].float() for name, ours in LAYERS.items() if name in tensors}
    backbone = {name.removeprefix(VIT): value for name, value in tensors.items() if name.startswith(VIT)}
    step = stored.get("global_step")
    return Released(
        dino_vit(backbone, str(path), HEADS.get(str(options.get("model_type")))),
        weights,
        options,
        step if isinstance(step, int) else 0,
    )


def _check_names(path: Path, tensors: dict[str, Any]) -> None:
    """Raises StegoError unless every tensor is known and none is missing; `dino_vit` checks those of the backbone."""
    foreign = [str(name) for name, value in tensors.items() if not isinstance(value, Tensor)]
    if foreign:
        raise StegoError(f"{path} is not a released STEGO checkpoint: {', '.join(foreign[:5])} is no tensor")
    unknown = [name for name in tensors if name not in LAYERS and name not in UNUSED and not name.startswith(VIT)]
    nonlinear = any(name in tensors for name in OPTIONAL)
    missing = [name for name in LAYERS if name not in tensors and (nonlinear or name not in OPTIONAL)]
    if unknown or missing:
        wrong = [*(f"{name} is unknown" for name in unknown), *(f"{name} is missing" for name in missing)]
        raise StegoError(f"{path} is not a released STEGO checkpoint: {'; '.join(wrong)}")
