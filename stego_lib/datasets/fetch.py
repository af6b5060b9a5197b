"""Downloads files: resumable, verified, atomic."""

import errno
import os
import shutil
import time
from pathlib import Path
from urllib.parse import urlsplit

import pooch
import requests

from ..utils.errors import StegoError
from ..utils.files import disk_errors, read_text
from ..utils.progress import progress

TIMEOUT = 30
"""Timeout of the server, in seconds."""
TRIES = 5
"""Attempts to resume an interrupted download."""
WAIT = 1.0
"""Seconds before a download is resumed, times the number of attempts so far."""
CHUNK = 1 << 16
"""Bytes read at a time; an interruption loses less than this."""
HEADERS = {"Accept-Encoding": "identity"}  # a compressed answer could not be resumed or measured
BROKEN = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


def fetch(url: str, path: Path, sha256: str | None = None) -> str:
    """Downloads `url` to `path`, unless it is there; returns the SHA-256 of the file, which `verify` has seen.

    sha256: the checksum that the file must have, None where none is published: then the length that the server announces
    is checked, and the checksum is stored, so that the next call verifies the file. What a broken download got is kept as
    PATH.part, and the next call resumes there. Raises StegoError for no network, an address that is gone, a wrong
    checksum, a full disk and a folder that cannot be written.
    """
    if path.exists():
        return verify(path, sha256)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        pooch.get_logger().setLevel("WARNING")  # what it says of every download is meant for programmers
        try:
            pooch.retrieve(url, sha256 or read_checksum(path), path.name, path.parent, downloader=Resuming(path))
        except StegoError:
            raise
        except requests.RequestException as error:
            raise StegoError(f"{url} cannot be downloaded: {error}") from error
        except ValueError as error:  # pooch's word for a wrong checksum
            raise StegoError(f"{url} was downloaded, but is not the expected file: {error} Nothing was kept") from error
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise StegoError(f"the disk of {path.parent} is full; make room and start again, it resumes") from error
            raise
        return verify(path, sha256)


def verify(path: Path, sha256: str | None = None) -> str:
    """The SHA-256 of `path`, compared with `sha256` or else with the one stored beside it, and stored if none is.

    Raises StegoError if it is another one.
    """
    known, found = sha256 or read_checksum(path), pooch.file_hash(str(path))
    if known and found != known:
        raise StegoError(f"{path} is damaged: its SHA-256 is {found}, not {known}; remove it and start again")
    write_checksum(path, found)
    return found


class Resuming:
    """A downloader for pooch that resumes downloads, also those of earlier processes."""

    def __init__(self, path: Path):
        self.path, self.part = path, path.with_name(path.name + ".part")
        self.tag = path.with_name(path.name + ".part.tag")
        """The server's name for the version that the part belongs to: parts of two versions must not be joined."""

    def __call__(self, url: str, output_file: str, _pooch: object) -> None:
        failures = 0
        while True:
            before = self._have()
            try:
                self._download(url)
                break
            except BROKEN as error:
                failures = 1 if self._have() > before else failures + 1
                if failures >= TRIES or _unreachable(error):
                    raise StegoError(
                        f"{url} broke off or cannot be reached ({type(error).__name__}); check the network and start again: "
                        f"{self._have():,} bytes are kept, and it resumes there\n  or download it otherwise to {self.path}"
                    ) from error
                time.sleep(WAIT * failures)
        os.replace(self.part, output_file)
        self.tag.unlink(missing_ok=True)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _download(self, url: str) -> None:
        """One connection: adds to the part what is missing."""
        have = self._have()
        headers = dict(HEADERS)
        if have:
            headers["Range"] = f"bytes={have}-"
            if self.tag.exists():
                headers["If-Range"] = self.tag.read_text(encoding="utf-8")
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            if answer.status_code == 416 and answer.headers.get("Content-Range", "").endswith(f"/{have}"):
                return  # all of it was there
            if answer.status_code == 416:
                self.part.unlink()
                return self._download(url)
            refuse(answer)
            if answer.status_code != 206:
                have = 0  # the server sends the file from its beginning
            length = answer.headers.get("Content-Length")
            total = have + int(length) if length else None
            if total:
                check_space(self.part.parent, total - have, url)
            tag = answer.headers.get("ETag", "")
            if tag and not tag.startswith("W/"):
                self.tag.write_text(tag, encoding="utf-8")
            bar = progress((), self.path.name, total=total, initial=have, unit="B", unit_scale=True)
            with bar, open(self.part, "ab" if have else "wb") as file:
                for chunk in answer.iter_content(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
        if total and self._have() != total:
            raise requests.ConnectionError(f"{self._have()} of {total} bytes came")


def remote_size(url: str) -> int:
    """Bytes of the file at `url`, 0 if the server does not say; StegoError if it is not there or out of reach."""
    try:
        answer = requests.head(url, headers=HEADERS, timeout=TIMEOUT, allow_redirects=True)
    except BROKEN as error:
        raise StegoError(
            f"{urlsplit(url).netloc} cannot be reached ({type(error).__name__}); check the network"
        ) from error
    if answer.status_code in (405, 501):  # a server that does not answer this question
        return 0
    refuse(answer)
    return int(answer.headers.get("Content-Length", 0))


def refuse(answer: requests.Response) -> None:
    """Raises StegoError if the server did not give the file."""
    if answer.status_code >= 400:
        raise StegoError(
            f"{answer.url} answers {answer.status_code} {answer.reason}; if the file has moved, download it from its new "
            "address and put it where data/README.md says"
        )


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raises StegoError if fewer than `needed` bytes are free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StegoError(
            f"{what} needs {needed / 1e9:.2f} GB, the disk of {folder} has {free / 1e9:.2f} GB free; make room, or name another "
            "disk with --root"
        )


def checksum_file(path: Path) -> Path:
    """Where the checksum of `path` is kept: PATH.sha256, as the program sha256sum writes and reads it."""
    return path.with_name(path.name + ".sha256")


def read_checksum(path: Path) -> str | None:
    """The stored checksum of `path`, or None."""
    stored = checksum_file(path)
    return read_text(stored).split()[0] if stored.exists() else None


def write_checksum(path: Path, sha256: str) -> None:
    """Stores the checksum of `path` beside it."""
    checksum_file(path).write_text(f"{sha256}  {path.name}\n", encoding="utf-8")


def _unreachable(error: Exception) -> bool:
    """Whether the server was never reached, so that another attempt at once is useless."""
    return "Failed to resolve" in str(error) or "Connection refused" in str(error)
