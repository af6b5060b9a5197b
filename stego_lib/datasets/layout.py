"""Where the files of a dataset lie, and which label map belongs to which image."""

import os
from collections import Counter
from pathlib import Path

from ..utils.errors import DataNotFound, StegoError
from ..utils.files import checksum
from ..utils.paths import user_path
from .images import SUFFIXES, naming

# Endings of files that nobody expects to be read as images.
COMPANIONS = {
    ".txt", ".md", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".yaml", ".yml", ".html", ".ini", ".db", ".py", ".ipynb",
    ".log", ".xmp", ".aae", ".tfw", ".jgw", ".pgw", ".wld", ".prj", ".ovr", ".aux", ".lnk", ".url", ".sha256", ".md5",
}  # fmt: skip
# Subfolders that hold label maps and results, not images.
RESULTS = {"labels", "overlays", "depth", "labelme", "panoptic", "geotiff"}


def list_images(folder: Path) -> list[Path]:
    """Images directly in `folder`, sorted by name. StegoError if there is none, or the folder cannot be read."""
    images = _images(folder) if folder.is_dir() else []
    if not images:
        problem = f"holds no image{left_out(folder)}" if folder.is_dir() else "does not exist, or is a file"
        raise StegoError(f"Folder {folder} {problem}. Name the folder in which the .jpg, .png or other images are.")
    return images


def has_images(folder: Path) -> bool:
    """Whether a folder exists and holds an image."""
    return folder.is_dir() and bool(_images(folder))


def _images(folder: Path) -> list[Path]:
    return [path for path in _entries(folder, files=True) if path.suffix.lower() in SUFFIXES]


def _entries(folder: Path, files: bool = False) -> list[Path]:
    """The visible files and folders in a folder, or its files alone, sorted."""
    with naming(folder), os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not (files and entry.is_dir()))
    return list(filter(visible, (folder / name for name in names)))


def visible(path: Path) -> bool:
    """False for hidden files and folders, and what macOS writes into archives (._NAME, __MACOSX)."""
    return not path.name.startswith(".") and path.name != "__MACOSX"


def left_out(folder: Path) -> str:
    """What of a folder is not read, " (30 .heic, 5 images in subfolders are not read)"; "" for nothing."""
    kinds: Counter[str] = Counter()
    for path in _entries(folder):
        suffix = path.suffix.lower()
        if suffix in SUFFIXES | COMPANIONS or path.name in RESULTS:
            continue
        if path.is_dir():
            kinds["images in subfolders"] += sum(inner.suffix.lower() in SUFFIXES for inner in path.rglob("*"))
        else:
            kinds[suffix or "files without an ending"] += 1
    parts = [f"{count} {kind}" for kind, count in kinds.most_common() if count]
    return f" ({', '.join(parts)} are not read)" if parts else ""


def pair_by_stem(images: list[Path], labels: Path, suffix: str = ".png") -> list[Path | None]:
    """The label map `labels`/STEM`suffix` of each image. StegoError if one is missing."""
    present = {path.name for path in _entries(labels)} if labels.is_dir() else set()
    paths: list[Path | None] = [labels / f"{path.stem}{suffix}" for path in images]
    check_files(paths, "label maps", present)
    return paths


def check_files(paths: list[Path | None], what: str, present: set[str] | None = None) -> None:
    """StegoError that counts missing files and names the first. present: names of the existing ones, if known."""
    missing = [path for path in paths if path and not (path.exists() if present is None else path.name in present)]
    if missing:
        raise StegoError(
            f"{len(missing)} of {len(paths)} {what} are missing, the first is {missing[0]}. Put them there; label maps "
            "have the names of their images."
        )


def find_folder(root: str | Path, names: tuple[str, ...], needs: tuple[str, ...], layout: str, source: str) -> Path:
    """The dataset's folder: the first of root/NAME, or root itself, that holds one of `needs`.

    Raises DataNotFound that says where it looked, which files belong there (`layout`) and their `source`.
    """
    root = user_path(root)
    candidates = [*(root / name for name in names), root]
    for folder in candidates:
        if any((folder / need).exists() for need in needs):
            return folder
    raise DataNotFound(
        f"{names[0]} was not found in {candidates[0].resolve()}\n"
        f"  belongs there: {layout}\n  where to get it: {source}\n"
        f"  elsewhere already? name the folder above it: data_root=FOLDER (papermill: -p data_root FOLDER)"
    )


def checksum_of(path: Path) -> str:
    """SHA-256 of a file."""
    with naming(path):
        return checksum(path)
