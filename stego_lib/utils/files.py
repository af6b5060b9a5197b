"""Files: atomic writes, locks, JSON, tensors read without running code, fingerprints."""

import codecs
import errno
import hashlib
import io
import json
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from .errors import StegoError, brief
from .notices import notice
from .paths import user_path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".unfinished."
"""Prefix of files that are being written. A killed process leaves them behind, see `remove_temporary`."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ELOOP}


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turns an OSError of a write below `path` into a StegoError: disk full, no permission, not a folder."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StegoError(
                f"{path} cannot be written: the disk is full or a limit is reached ({error.strerror}); "
                "make room and start again. What stood there before is untouched"
            ) from error
        if error.errno in REFUSED:
            raise StegoError(
                f"{path} cannot be written ({error.strerror}); name a folder that can, or change its permissions"
            ) from error
        raise


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, which replaces `path` in one step if the block succeeds, else is removed.

    A reader sees the old file or the new one, never a part. Raises StegoError where the disk refuses.
    """
    path = user_path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{TEMPORARY}{path.stem[:40]}.", suffix=path.suffix)
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


def remove_temporary(folder: Path) -> None:
    """Removes temporary files of killed processes. The caller must hold the lock of `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, busy: str, *, wait: bool) -> Iterator[None]:
    """Holds the lock file `path`; the system releases it however the process ends.

    If another process holds it: gives the notice `busy` and waits, or without `wait` raises StegoError(busy).
    """
    with disk_errors(path):
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise StegoError(busy) from None
            notice(busy)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


class Claims:
    """Numbers that each belong to at most one process; the system releases those of a process that ends.

    On systems without POSIX locks every claim succeeds.
    """

    def __init__(self, path: Path):
        self.path = path
        with disk_errors(path):
            self._file = open(path, "a+b")
        if fcntl:
            fcntl.lockf(self._file, fcntl.LOCK_SH, 1, 0)  # byte 0: this process is here; byte n + 1: number n

    def take(self, number: int) -> bool:
        """Claims the number; returns whether it now belongs to this process."""
        return fcntl is None or self._lock(number + 1)

    def release(self, number: int) -> None:
        """Releases the number."""
        if fcntl:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number + 1)

    def alone(self) -> bool:
        """Whether certainly no other process has this file open."""
        return fcntl is not None and self._lock(0)

    def close(self) -> None:
        """Releases all numbers."""
        self._file.close()

    def _lock(self, byte: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError:
            return False
        return True


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. Not-a-number is refused (ValueError): JSON has none."""
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

    Raises StegoError for a file in another encoding, and OSError as `open` does.
    """
    content = user_path(path).read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:4]:
        raise StegoError(f"{path} is stored as UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise StegoError(f"{path} is not stored as UTF-8 (line {line}); save it as UTF-8") from None


def read_json(path: str | Path) -> Any:
    """Reads a JSON file; raises StegoError for a broken one."""
    try:
        return json.loads(read_text(path))
    except (FileNotFoundError, StegoError):
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise StegoError(
            f"{path} is not valid JSON ({brief(error)}); it was cut short or edited by hand: mend or remove it"
        ) from error


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """Writes a nested dictionary of tensors, numbers and strings, atomically."""
    buffer = io.BytesIO()  # torch's own writer names neither the file nor the reason when the disk is full
    torch.save(state, buffer)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_state(path: str | Path) -> dict[str, Any]:
    """Reads what `save_state` wrote, onto the CPU, without running code from the file.

    Raises StegoError for a file that is truncated or holds anything but tensors, numbers and strings.
    """
    state = load_tensors(Path(path))
    if not isinstance(state, dict):
        raise StegoError(f"{path} cannot be read as a checkpoint of this project: it holds no dictionary")
    return state


def load_tensors(path: Path, allowed: tuple[type, ...] = ()) -> Any:
    """Reads a torch.save file of tensors, plain values, containers and `allowed` classes onto the CPU.

    Runs no code from the file, and takes about as much memory as the file is large, see `refuse_bomb` and `refuse_swollen`.
    Raises StegoError for a file that is broken or holds something else, FileNotFoundError if there is none.
    """
    try:
        refuse_bomb(path)
        with torch.serialization.safe_globals(list(allowed)):
            stored = torch.load(path, map_location="cpu", weights_only=True)
        refuse_swollen(stored, path)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch, zipfile and pickle raise a dozen kinds for a broken file
        raise StegoError(
            f"{path} cannot be read as a file of tensors ({brief(error)}): it is cut short, changed or another kind of "
            "file; remove it or put a whole one there"
        ) from error
    return stored


def refuse_bomb(path: Path) -> None:
    """ValueError for a zip file that is a TorchScript program, or whose members claim more bytes than it has.

    PyTorch stores tensors uncompressed, and would run a program.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.filename.rpartition("/")[2] == "constants.pkl" for member in members):
        raise ValueError("it is a TorchScript program, not a checkpoint")
    packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if packed or sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("its members would unpack to more than the file's size")


def refuse_swollen(stored: Any, path: Path) -> None:
    """ValueError for tensors that claim more elements than the file has bytes for, by strides of 0 or sharing."""
    total, seen, todo = 0, set(), [stored]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            todo += value
    if total > 2 * path.stat().st_size + 2**20:
        raise ValueError(f"its tensors claim {total:,} bytes, the file has {path.stat().st_size:,}")


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
