"""Finds the files of a dataset, and the label map of each image."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unicodedata import normalize

from ..utils.errors import DataNotFound, StegoError
from ..utils.files import checksum
from ..utils.paths import user_path
from .images import SUFFIXES, naming

# Suffixes of images, videos and archives that are reported as ignored.
UNSUPPORTED = {
    ".heic", ".heif", ".dng", ".nef", ".cr2", ".cr3", ".arw", ".raf", ".rw2", ".svg", ".psd", ".exr", ".npy", ".pdf",
    ".mp4", ".mov", ".zip", ".tar",
}  # fmt: skip
# Subfolders of label maps and results, which are not reported as ignored.
RESULTS = {"labels", "overlays", "depth", "labelme", "panoptic", "geotiff"}


def list_images(folder: Path) -> list[Path]:
    """Like `images_in`, but raises StegoError if there are none."""
    images = images_in(folder)
    if not images:
        problem = f"has no images{ignored_files(folder)}" if folder.is_dir() else "does not exist or is a file"
        raise StegoError(f"Folder {folder} {problem}. Pass the folder that contains the .jpg, .png or other images.")
    return images


def images_in(folder: Path) -> list[Path]:
    """Images in `folder` without subfolders, sorted by name; none if it does not exist."""
    files = _entries(folder, files=True) if folder.is_dir() else []
    return [path for path in files if path.suffix.lower() in SUFFIXES]


def _entries(folder: Path, files: bool = False) -> list[Path]:
    """Visible files and folders, or only files, sorted."""
    with naming(folder), os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not (files and entry.is_dir()))
    return list(filter(visible, (folder / name for name in names)))


def visible(path: Path) -> bool:
    """False for hidden files and those that macOS adds to archives (._NAME, __MACOSX)."""
    return not path.name.startswith(".") and path.name != "__MACOSX"


def ignored_files(folder: Path) -> str:
    """Summary of files that are not read, " (30 .heic, 5 images in subfolders are not read)", or ""."""
    kinds: Counter[str] = Counter()
    for path in _entries(folder):
        suffix = path.suffix.lower()
        if suffix in UNSUPPORTED:
            kinds[suffix] += 1
        elif suffix not in SUFFIXES and path.name not in RESULTS and path.is_dir():
            kinds["images in subfolders"] += sum(inner.suffix.lower() in SUFFIXES for inner in path.rglob("*"))
    parts = [f"{count} {kind}" for kind, count in kinds.most_common() if count]
    return f" ({', '.join(parts)} are not read)" if parts else ""


def by_name(paths: list[Path], name: Callable[[Path], str]) -> dict[str, Path]:
    """Name of each path (Unicode NFC) -> path. Raises StegoError for two equal names, and for an empty list."""
    named: dict[str, Path] = {}
    problem = "" if paths else "The list of images is empty"
    for path in paths:
        other = named.setdefault(normalize("NFC", name(path)), path)
        if other is not path:
            problem = f"{path} and {other.name} have the same file name {name(path)!r}"
    if problem:
        raise StegoError(f"{problem}. Add or rename images, so that each has its own file name.")
    return named


def pair_by_stem(images: list[Path], labels: Path, suffix: str = ".png") -> list[Path | None]:
    """The label map `labels`/STEM`suffix` of each image. Raises StegoError if one is missing."""
    present = {path.name for path in _entries(labels)} if labels.is_dir() else set()
    paths: list[Path | None] = [labels / f"{path.stem}{suffix}" for path in images]
    check_files(paths, "label maps", present)
    return paths


def check_files(paths: list[Path | None], what: str, present: set[str] | None = None) -> None:
    """Raises StegoError if files are missing. present: names of the existing files, if known."""
    missing = [path for path in paths if path and not (path.exists() if present is None else path.name in present)]
    if missing:
        raise StegoError(
            f"{len(missing)} of {len(paths)} {what} are missing, for example {missing[0]}. Add them; label maps have "
            "the names of their images."
        )


def find_folder(root: str | Path, names: tuple[str, ...], needs: tuple[str, ...], layout: str, source: str) -> Path:
    """The first of the folders root/NAME, and root itself, that holds one of `needs`.

    Raises DataNotFound with the expected files (`layout`) and where to get them (`source`).
    """
    root = user_path(root)
    candidates = [*(root / name for name in names), root]
    for folder in candidates:
        if any((folder / need).exists() for need in needs):
            return folder
    raise DataNotFound(
        f"{names[0]} was not found in {candidates[0].resolve()}\n"
        f"  expected files: {layout}\n  where to get them: {source}\n"
        f"  stored elsewhere? set data_root to the parent folder (papermill: -p data_root FOLDER)"
    )


def checksum_of(path: Path) -> str:
    """SHA-256 of an image or label map."""
    with naming(path):
        return checksum(path)
