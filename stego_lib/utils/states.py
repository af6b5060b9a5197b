"""Checkpoints: nested tensors and numbers in one safetensors file."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import explained
from .files import atomic

# File name of the checkpoint in a run folder.
CHECKPOINT = "checkpoint.safetensors"
# Metadata key of the nested structure with all values except tensors.
KEY = "state"


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """Writes nested dictionaries and lists of tensors, numbers and strings, atomically.

    A tensor is stored under its path, such as "model/head.linear.weight"; other values are JSON in the file's metadata.
    Tuples become lists.
    """
    tensors: dict[str, Tensor] = {}
    structure = _pack(state, "", tensors)
    content = save(tensors, {KEY: json.dumps(structure)})
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def load_state(path: str | Path) -> dict[str, Any]:
    """Reads a file of `save_state` to the CPU. Raises StegoError for a damaged or foreign file."""
    problem = f"{path} is missing, damaged or not a file of this project"
    with (
        explained(Exception, problem, "Remove or restore it."),
        safe_open(path, "pt") as file,
    ):  # safetensors raises many types
        return _unpack(json.loads(file.metadata()[KEY]), file)


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Converts a value for JSON; moves its tensors to `tensors`."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()  # safetensors rejects tensors that share memory
        return {"tensor": path}
    if isinstance(value, dict):  # a list of pairs, because keys of an optimizer's state are numbers
        return {"items": [[key, _pack(item, f"{path}/{key}".strip("/"), tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_pack(item, f"{path}/{i}".strip("/"), tensors) for i, item in enumerate(value)]
    return value


def _unpack(value: Any, file: Any) -> Any:
    """Inverse of `_pack`."""
    if isinstance(value, list):
        return [_unpack(item, file) for item in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return file.get_tensor(value["tensor"]).clone()  # else the file stays mapped, and Windows cannot replace it
        return {key: _unpack(item, file) for key, item in value["items"]}
    return value
