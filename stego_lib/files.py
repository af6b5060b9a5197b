"""Files that are either whole or not there: atomic writes, tensors without pickles from strangers, fingerprints."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; when the block ends well it replaces `path` in one step, else it is removed.

    A reader sees the old file or the new one, never half of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. Not-a-number is refused (ValueError): JSON has none."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic(path) as temporary:
        temporary.write_text(text)


def read_json(path: str | Path) -> Any:
    """Reads a JSON file; a broken one raises ValueError that names it."""
    try:
        return json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); it was cut short or edited by hand") from error


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """Writes a dictionary of tensors, numbers and strings (nested as you like), atomically."""
    with atomic(path) as temporary:
        torch.save(state, temporary)


def load_state(path: str | Path) -> dict[str, Any]:
    """Reads what `save_state` wrote, on the CPU, running no code from the file.

    Raises ValueError for a file that is cut short or holds anything but tensors, numbers and strings.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint of this project: {error}") from error


def fingerprint(*parts: Any) -> str:
    """Sixteen hexadecimal digits that change when any of the parts (numbers, strings, bytes, tensors, lists) does."""
    digest = hashlib.sha256()
    _feed(digest.update, parts)
    return digest.hexdigest()[:16]


def _feed(update: Callable[[bytes], None], part: Any) -> None:
    if isinstance(part, torch.Tensor):
        array = part.detach().cpu().contiguous()
        _feed(update, (str(array.dtype), tuple(array.shape)))
        update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(part, bytes):
        update(b"b%d:" % len(part) + part)
    elif isinstance(part, list | tuple):
        update(b"(%d:" % len(part))
        for item in part:
            _feed(update, item)
    else:
        text = repr(part).encode()
        update(b"r%d:" % len(text) + text)
