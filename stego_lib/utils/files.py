"""Files: atomic writes, text and JSON, checksums and fingerprints."""

import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .errors import DataNotFound, StegoError, explained

# Prefix of temporary files. Those of killed processes are deleted by `remove_temporary`.
TEMPORARY = ".unfinished."


@contextmanager
def disk_errors(path: str | Path, remedy: str = "Make room, or choose another folder.") -> Iterator[None]:
    """Turns an operating system's error at `path`, such as a full or read-only disk, into a StegoError."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not from the operating system, for example Pillow's
            raise
        failed = path if error.filename is None or TEMPORARY in str(error.filename) else error.filename
        raise StegoError(f"{failed} cannot be read or written: {error.strerror}. {remedy}") from error


def check_folder(folder: Path, remedy: str = "Choose another folder.") -> None:
    """Creates a folder and checks that it is writable, before long work. Raises StegoError otherwise."""
    with disk_errors(folder, remedy):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{TEMPORARY}{uuid.uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path that replaces `path` in one step when the block succeeds, and is deleted otherwise.

    Readers see either the old file or the complete new one. Raises StegoError as `disk_errors` does.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{path.stem[:40]}.{uuid.uuid4().hex[:8]}{path.suffix}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "r+b") as file:  # Windows only syncs files opened for writing
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Like `atomic`, for a folder. If another process has written it, that one is kept."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as temporary:
        unfinished = Path(temporary) / folder.name
        unfinished.mkdir()
        yield unfinished
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise


def remove_temporary(folder: Path) -> None:
    """Deletes temporary files of killed processes. No other process may be writing to `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. Raises ValueError for NaN, which JSON does not have."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def without_nan(value: Any) -> Any:
    """Replaces NaN (the IoU of a class that does not occur) by None, JSON's null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def read_text(path: str | Path) -> str:
    """Reads UTF-8 text, with or without a byte order mark. Raises StegoError for a missing file or another encoding."""
    try:
        with explained(UnicodeDecodeError, f"{path} is not UTF-8 text", "Save it as UTF-8."):
            return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataNotFound(f"{path} does not exist. Check the path.") from None


def read_json(path: str | Path) -> Any:
    """Reads a JSON file. Raises StegoError if it is invalid, DataNotFound if it is missing."""
    with explained((OSError, ValueError, RecursionError), f"{path} is not valid JSON", "Correct or remove it."):
        return json.loads(read_text(path))


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*parts: Any) -> str:
    """16 hexadecimal digits that identify the parts: numbers, strings, bytes, tensors, or lists of these."""
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
