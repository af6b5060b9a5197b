"""Unpacks zip archives, and nothing outside the folder they are unpacked to."""

import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from ..utils.errors import StegoError
from ..utils.progress import progress
from .fetch import check_space

MOST, MUCH = 300, 2**30
"""Largest ratio of unpacked to packed size, above a minimum of bytes; images and label maps are compressed already."""


def unpack(archive: Path, folder: Path, place: Callable[[str], str | None]) -> int:
    """Unpacks members of the zip file `archive` below `folder`; returns how many.

    place: member's name -> path below `folder`, or None for a member to be left out. All names are looked at first: an
    archive with an absolute path, "..", a link or a device in it is refused as a whole (StegoError), whether or not that
    member is wanted. Each file appears when it is whole; files of the right content that are there are kept, so unpacking
    that was interrupted resumes. Hidden files and what macOS adds (__MACOSX) are left out. The archive's own checksums are verified. Raises StegoError for a damaged archive and a disk
    that is too small.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if _harmless(archive, member) and not member.is_dir()]
            members = [member for member in members if not _clutter(member.filename)]
            wanted = [(member, folder / path) for member in members if (path := place(member.filename))]
            if not wanted:
                raise StegoError(f"{archive} holds none of the files that are wanted of it; is it another archive?")
            if sum(member.file_size for member, _ in wanted) > max(MUCH, MOST * archive.stat().st_size):
                raise StegoError(f"{archive} is refused: it would unpack to more than {MOST} times its size")
            looked = progress(wanted, f"looking for files of {archive.name}")
            todo = [(member, path) for member, path in looked if not _whole(path, member)]
            folder.mkdir(parents=True, exist_ok=True)
            check_space(folder, sum(member.file_size for member, _ in todo), f"unpacking {archive.name}")
            for member, path in progress(todo, f"unpacking {archive.name}"):
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f".{path.name}.part")
                try:
                    with opened.open(member) as source, open(temporary, "wb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
                    temporary.replace(path)
                finally:
                    temporary.unlink(missing_ok=True)
    except (zipfile.BadZipFile, EOFError, RuntimeError) as error:
        raise StegoError(f"{archive} is damaged or no zip archive ({error}); remove it and get it again") from error
    return len(wanted)


def _harmless(archive: Path, member: zipfile.ZipInfo) -> bool:
    """True, or StegoError for a member that would be written outside the folder."""
    path, mode = PurePosixPath(member.filename), member.external_attr >> 16
    special = stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR)
    # orig_filename: Python replaces the separators of other systems in filename.
    if (
        path.is_absolute()
        or ".." in path.parts
        or "\\" in member.orig_filename
        or ":" in "".join(path.parts[:1])
        or special
    ):
        raise StegoError(f"{archive} is refused: its member {member.orig_filename!r} would leave the folder")
    return True


def _whole(path: Path, member: zipfile.ZipInfo) -> bool:
    """Whether a file exists with the content of the member."""
    if not path.exists() or path.stat().st_size != member.file_size:
        return False
    found = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            found = zlib.crc32(chunk, found)
    return found == member.CRC


def _clutter(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)
