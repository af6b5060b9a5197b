"""Where the files of a dataset lie, and which label map belongs to which image."""

import os
from functools import cache
from pathlib import Path

from ..utils.errors import DataNotFound, StegoError
from ..utils.files import checksum
from ..utils.paths import user_path
from .formats import SUFFIXES


def list_images(folder: Path) -> list[Path]:
    """Images directly in `folder`, sorted by name. StegoError for a folder that cannot be read."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise StegoError(f"folder {folder} cannot be read ({error.strerror})") from error
    return [path for path in paths if path.suffix.lower() in SUFFIXES and visible(path)]


def visible(path: Path) -> bool:
    """False for hidden files and folders, and what macOS writes beside each file of an archive (._NAME, __MACOSX)."""
    return not path.name.startswith(".") and path.name != "__MACOSX"


def pair_by_stem(images: list[Path], labels: Path, suffix: str = ".png") -> list[Path | None]:
    """The label map `labels`/STEM`suffix` of each image; StegoError lists images that have none."""
    found = [labels / f"{path.stem}{suffix}" for path in images]
    missing = [path.name for path in found if not path.exists()]
    if missing:
        stem = next(path.stem for path, label in zip(images, found, strict=True) if not label.exists())
        try:
            like = min(path.name for path in labels.iterdir() if visible(path) and path.name.startswith(stem))
            hint = f", but it holds {like}: call label maps like their images, and save them as {suffix[1:].upper()}"
        except (OSError, ValueError):
            hint = ""
        raise StegoError(
            f"{len(missing)} of {len(images)} label maps are missing in {labels}, the first is {missing[0]}{hint}"
        )
    return list(found)


def find_folder(
    root: str | Path, names: tuple[str, ...], needs: str | tuple[str, ...], layout: str, source: str
) -> Path:
    """The dataset's folder: the first of root/NAME, or root itself, in which `needs` (or one of several) exists.

    Raises DataNotFound that says where it looked, which files belong there (`layout`) and where they come from (`source`).
    """
    root = user_path(root)
    candidates = [*(root / name for name in names), root]
    for folder in candidates:
        if any((folder / need).exists() for need in ((needs,) if isinstance(needs, str) else needs)):
            return folder
    raise DataNotFound(
        f"{names[0]} was not found in {candidates[0].resolve()}\n"
        f"  belongs there: {layout}\n  where to get it: {source}\n"
        f"  elsewhere already? name the folder above it: data_root=FOLDER (papermill: -p data_root FOLDER)"
    )


def check_split(name: str, split: str, known: tuple[str, ...] = ("train", "val")) -> None:
    """Raises StegoError for a split that the dataset does not have."""
    if split not in known:
        raise StegoError(f"{name} has no split {split!r}; it has {', '.join(known)}")


def checksum_of(path: Path) -> str:
    """SHA-256 of a file, computed once per process and state of the file."""
    state = state_of(path)
    try:
        return _cached_checksum(path, state.st_ino, state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise StegoError(f"{path} cannot be read ({error.strerror}); replace or remove it") from error


@cache
def _cached_checksum(path: Path, *_state: int) -> str:
    return checksum(path)


def state_of(path: Path) -> os.stat_result:
    """`path.stat()`; StegoError for a file that cannot be read."""
    try:
        return path.stat()
    except OSError as error:
        raise StegoError(f"{path} cannot be read ({error.strerror}); replace or remove it") from error
