"""Files: atomic writes, text and JSON, checksums and fingerprints."""

import errno
import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from .errors import DataNotFound, StegoError, brief

# Prefix of files that are being written. A killed process leaves them behind, see `remove_temporary`.
TEMPORARY = ".unfinished."
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def disk_errors(path: str | Path, remedy: str = "Make room, or choose another folder.") -> Iterator[None]:
    """Turns an error of the system below `path`, such as a full or read-only disk, into a StegoError."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not of the system
            raise
        reason = "the disk is full" if error.errno in FULL else error.strerror
        place = path if error.filename is None or TEMPORARY in str(error.filename) else error.filename
        raise StegoError(f"{place} cannot be read or written: {reason}. {remedy}") from error


def check_folder(folder: Path, remedy: str = "Choose another folder.") -> None:
    """Makes a folder. Raises StegoError if nothing can be written into it; called before long work."""
    with disk_errors(folder, remedy):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{TEMPORARY}{uuid.uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()


def sync(file: IO[Any]) -> None:
    """Waits until a file is on the disk. Some disks cannot sync, which is no error; a lost write is an OSError."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno in FULL | {errno.EIO}:
            raise


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, which replaces `path` in one step if the block succeeds, else is removed.

    A reader sees the old file or the new one, never a part. Raises StegoError as `disk_errors` does.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{path.stem[:40]}.{uuid.uuid4().hex[:8]}{path.suffix}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "r+b") as file:  # Windows syncs no file that is open for reading only
                sync(file)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def remove_temporary(folder: Path) -> None:
    """Removes temporary files of killed processes. No other process may be writing into `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. Raises ValueError for not-a-number, which JSON lacks."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def without_nan(value: Any) -> Any:
    """The value with None, JSON's null, in place of not-a-number (the IoU of a class that does not occur)."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def read_text(path: str | Path) -> str:
    """Reads a text file as UTF-8, with or without byte order mark, independent of the locale.

    Raises StegoError for a file that does not exist or is in another encoding, and OSError as `open` does.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataNotFound(f"{path} does not exist. Check the path.") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # as in UTF-16
        raise StegoError(f"{path} is not UTF-8 text. Save it as UTF-8.")
    return text


def read_json(path: str | Path) -> Any:
    """Reads a JSON file. Raises StegoError for a broken one, and DataNotFound if there is none."""
    try:
        return json.loads(read_text(path))
    except StegoError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise StegoError(f"{path} is not valid JSON ({brief(error)}). Correct or remove it.") from error


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
