"""Reads weight files without executing code from them."""

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..utils.errors import StegoError, explained


class Stub:
    """Placeholder for a class of PyTorch Lightning or OmegaConf. Unpickling only fills its `__dict__`."""


# Classes in the checkpoints of STEGO's authors, whose packages are not needed.
STUBS = (
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "typing.Any",
)
# Objects that a pickle may create in addition to PyTorch's own list. DINO's checkpoints hold a Namespace. PyTorch only
# fills plain dictionaries, so one replaces OmegaConf's defaultdict.
ALLOWED: list[Any] = [
    dict,
    list,
    argparse.Namespace,
    (lambda *_: {}, "collections.defaultdict"),
    *((Stub, name) for name in STUBS),
]
# Keys of the state dict in checkpoints of various authors.
WRAPPERS = ("state_dict", "model", "teacher", "target_encoder")


def read_weights(path: Path) -> tuple[Any, dict[str, str]]:
    """Reads content and metadata of a .safetensors file, or of a file of `torch.save`, which has no metadata.

    Raises StegoError for a missing or broken file, and for objects outside `ALLOWED`.
    """
    problem = f"weights file {path.absolute()} is missing or broken, or holds objects other than tensors"
    with explained(Exception, problem, "Check the file."):  # torch, pickle and safetensors raise many types
        if path.suffix.lower() == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True), {}


def unwrap(stored: Any, first: str) -> dict[str, Tensor]:
    """Extracts the state dict of a network whose first tensor is called `first` from the authors' checkpoint."""
    for key in WRAPPERS:
        if isinstance(stored, dict) and isinstance(stored.get(key), dict):
            stored = stored[key]
    if not isinstance(stored, dict):
        return {}
    tensors = {str(name): value for name, value in stored.items() if isinstance(value, Tensor)}
    prefixes = [name.removesuffix(first) for name in tensors if name.endswith(first)]  # such as 'module.encoder_q.'
    prefix = min(prefixes, key=len, default="")
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def fill(network: nn.Module, weights: dict[str, Tensor], source: Any, assign: bool = False) -> None:
    """Loads weights as float32. Raises StegoError unless all names and shapes match the network."""
    weights = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    try:
        network.load_state_dict(weights, assign=assign)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise StegoError(f"{source} does not contain the weights of this network. {reason}") from error
