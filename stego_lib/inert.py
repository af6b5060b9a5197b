"""Reads PyTorch checkpoints of strangers: tensors and plain values come out, and nothing that the pickle asks for is run.

A pickle is a program; whatever it wants to call it must name first. Here a name is either one of the few functions that
put tensors together or a placeholder that remembers what it was called with and does nothing.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._utils import _rebuild_parameter, _rebuild_tensor_v2

from .errors import StegoError, brief


class Placeholder:
    """Stands for an object of a class that is not loaded. `state` and `items` are what the pickle would have put into it."""

    def __new__(cls, *arguments: Any, **options: Any) -> "Placeholder":
        made = super().__new__(cls)
        made.state, made.items = None, {}
        return made

    def __init__(self, *arguments: Any, **options: Any):
        pass

    def __call__(self, *arguments: Any, **options: Any) -> "Placeholder":
        return Placeholder()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        """Keeps an item of what would be a list."""
        self.items[len(self.items)] = value


class _Allowed:
    """A function that a pickle may call and cannot change: its state can't be set."""

    __slots__ = ("_function",)

    def __init__(self, function: Any):
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"the file tries to set {name!r} of a function")


ALLOWED = {
    ("torch._utils", "_rebuild_tensor_v2"): _Allowed(_rebuild_tensor_v2),
    ("torch._utils", "_rebuild_parameter"): _Allowed(_rebuild_parameter),
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): _Allowed(lambda *_: {}),
    ("__builtin__", "dict"): dict,
    ("builtins", "dict"): dict,
    ("__builtin__", "list"): list,
    ("builtins", "list"): list,
}
"""All that a pickle can call: constructors of tensors and of plain containers."""


class Unpickler(pickle.Unpickler):
    """Finds nothing but `ALLOWED`; every other name gives a class of placeholders. Nothing is imported."""

    def find_class(self, module: str, name: str) -> Any:
        known = ALLOWED.get((module, name))
        return type(str(name), (Placeholder,), {}) if known is None else known


_MODULE = SimpleNamespace(
    __name__="inert",
    Unpickler=Unpickler,
    load=lambda file, **options: Unpickler(file, **options).load(),
)
"""Takes the place of the module pickle in torch.load, which adds the reading of storages."""


def load_inert(path: Path) -> dict[str, Any]:
    """The dictionary in a PyTorch file, on the CPU; objects of foreign classes become `Placeholder` objects.

    Raises StegoError for a file that is missing, broken or no such dictionary.
    """
    if not path.is_file():
        raise StegoError(f"checkpoint {path.resolve()} does not exist")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if any(name.rpartition("/")[2] == "constants.pkl" for name in file.namelist()):
                raise StegoError(f"{path} is a TorchScript program, not a checkpoint")  # torch.load would start it
    try:
        stored = torch.load(path, map_location="cpu", pickle_module=_MODULE, weights_only=False)
    except Exception as error:  # torch, zipfile and pickle raise a dozen kinds for a broken file
        raise StegoError(f"{path} cannot be read as a PyTorch checkpoint ({brief(error)})") from error
    if not isinstance(stored, dict):
        raise StegoError(f"{path} is not a checkpoint: it holds no dictionary")
    return stored


def plain(value: Any) -> Any:
    """Numbers, strings, lists and dictionaries out of placeholders of OmegaConf (and of dict-like classes); the rest is None."""
    if isinstance(value, Placeholder):
        state = value.state if isinstance(value.state, dict) else {}
        for key in ("_content", "_val"):  # of an OmegaConf container, of an OmegaConf leaf
            if key in state:
                return plain(state[key])
        return plain(value.items) if value.items else None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if isinstance(key, str | int)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str) else None
