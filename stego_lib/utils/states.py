"""States of training: nested tensors and numbers in one safetensors file."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import StegoError, brief
from .files import atomic

# Key of the metadata that holds everything but the tensors.
KEY = "state"


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """Writes nested dictionaries and lists of tensors, numbers and strings, atomically.

    Tensors are stored under their path, such as "model/head.linear.weight"; all else is JSON in the file's metadata.
    Tuples become lists.
    """
    tensors: dict[str, Tensor] = {}
    structure = _pack(state, "", tensors)
    content = save(tensors, {KEY: json.dumps(structure)})
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def load_state(path: str | Path) -> dict[str, Any]:
    """Reads what `save_state` wrote, onto the CPU. Raises StegoError for a damaged or other file."""
    try:
        with safe_open(path, "pt") as file:
            return _unpack(json.loads(file.metadata()[KEY]), file)
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors has an error class of its own
        raise StegoError(f"{path} is damaged or not a file of this project ({brief(error)}). Remove it.") from error


def _pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """The value for JSON; its tensors go to `tensors`."""
    if isinstance(value, Tensor):
        tensors[place] = value.detach().cpu().contiguous().clone()  # safetensors refuses tensors that share memory
        return {"tensor": place}
    if isinstance(value, dict):  # as a list: keys may be numbers, as in the state of an optimizer
        return {"items": [[key, _pack(item, f"{place}/{key}".strip("/"), tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_pack(item, f"{place}/{i}".strip("/"), tensors) for i, item in enumerate(value)]
    return value


def _unpack(value: Any, file: Any) -> Any:
    """The inverse of `_pack`."""
    if isinstance(value, list):
        return [_unpack(item, file) for item in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return file.get_tensor(value["tensor"])
        return {key: _unpack(item, file) for key, item in value["items"]}
    return value
