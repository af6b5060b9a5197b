"""Reads untrusted PyTorch checkpoints: tensors and plain values, without running code from the file.

A pickle is a program; whatever it wants to call it must name first. Here a name is either one of the few functions that
put tensors together or a placeholder that remembers what it was called with and does nothing. `torch.load` with
weights_only=True refuses such files as a whole, for the sake of a few options in them, so the format is read here: a zip
file of a pickle and, one member each, the tensors' bytes.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.errors import StegoError, brief
from ..utils.files import refuse_bomb, refuse_swollen

STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
"""PyTorch's names of a tensor's bytes, by type."""


class Placeholder:
    """Stands for an object of a class that is not loaded. `state` and `items` are what the pickle would have put into it."""

    state: Any
    items: dict[Any, Any]

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
    _function: Any

    def __init__(self, function: Any):
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"the file tries to set {name!r} of a function")


def _tensor(stored: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """The tensor of that shape in stored values (n,); PyTorch refuses one that reaches beyond them."""
    return torch.as_strided(stored, size, stride, offset)


ALLOWED = {
    ("torch._utils", "_rebuild_tensor_v2"): _Allowed(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Allowed(lambda data, *_: data),
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): _Allowed(lambda *_: {}),
    ("__builtin__", "dict"): dict,
    ("builtins", "dict"): dict,
    ("__builtin__", "list"): list,
    ("builtins", "list"): list,
}
"""All that a pickle can call: constructors of tensors and of plain containers."""


class Unpickler(pickle._Unpickler):
    """Finds nothing but `ALLOWED`; every other name gives a class of placeholders. Nothing is imported.

    The one written in Python: it keeps what a pickle numbers in a dictionary, where the one written in C makes room for
    every number up to the highest, 64 GB for the ten bytes that name the four billionth.
    """

    def __init__(self, file: Any, archive: zipfile.ZipFile | None = None, folder: str = ""):
        super().__init__(file, encoding="utf-8")
        self.archive, self.folder = archive, folder
        self.stored: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What the pickle may call by that name."""
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        known = ALLOWED.get((module, name))
        return type(str(name), (Placeholder,), {}) if known is None else known

    def persistent_load(self, reference: Any) -> Tensor:
        """The values (n,) of the storage that ("storage", type, key, device, n) refers to."""
        kind, dtype, key, *_ = reference
        if kind != "storage" or not isinstance(dtype, torch.dtype) or self.archive is None:
            raise pickle.UnpicklingError(f"{reference!r} is no storage")
        if key not in self.stored:
            content = bytearray(self.archive.read(f"{self.folder}/data/{key}"))
            self.stored[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self.stored[key]


def load_inert(path: Path) -> dict[str, Any]:
    """The dictionary in a PyTorch file, on the CPU; objects of foreign classes become `Placeholder` objects.

    Raises StegoError for a file that is missing, broken, in PyTorch's format of before 2020 or no such dictionary.
    """
    if not path.is_file():
        raise StegoError(f"checkpoint {path.resolve()} does not exist")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("no zip file; files of PyTorch before 1.6 must be saved again by a later one")
        refuse_bomb(path)
        with zipfile.ZipFile(path) as archive:
            stored = _read(archive)
        refuse_swollen(stored, path)
    except Exception as error:  # zipfile, pickle and torch raise a dozen kinds for a broken file
        raise StegoError(f"{path} cannot be read as a PyTorch checkpoint ({brief(error)}); get it again") from error
    if not isinstance(stored, dict):
        raise StegoError(f"{path} is not a checkpoint: it holds no dictionary")
    return stored


def _read(archive: zipfile.ZipFile) -> Any:
    names = archive.namelist()
    (folder,) = {name.partition("/")[0] for name in names}
    order = f"{folder}/byteorder"
    if order in names and archive.read(order) != b"little":
        raise ValueError("its numbers are big-endian")
    return Unpickler(io.BytesIO(archive.read(f"{folder}/data.pkl")), archive, folder).load()


PLAIN_VALUES = 100_000
"""How many values `plain` looks at: a few bytes of a pickle can nest lists to more than there are atoms."""


def plain(value: Any) -> Any:
    """Numbers, strings, lists and dictionaries out of placeholders of OmegaConf (and of dict-like classes); the rest is None.

    StegoError where they are nested without end.
    """
    try:
        return _plain(value, [PLAIN_VALUES])
    except RecursionError:
        raise StegoError("the options in the checkpoint hold themselves; it is no released one") from None


def _plain(value: Any, left: list[int]) -> Any:
    left[0] -= 1
    if left[0] < 0:
        raise StegoError(f"the options in the checkpoint hold more than {PLAIN_VALUES:,} values; it is no released one")
    if isinstance(value, Placeholder):
        state = value.state if isinstance(value.state, dict) else {}
        for key in ("_content", "_val"):  # of an OmegaConf container, of an OmegaConf leaf
            if key in state:
                return _plain(state[key], left)
        return _plain(value.items, left) if value.items else None
    if isinstance(value, dict):
        return {key: _plain(item, left) for key, item in value.items() if isinstance(key, str | int)}
    if isinstance(value, list | tuple):
        return [_plain(item, left) for item in value]
    return value if isinstance(value, bool | int | float | str) else None
