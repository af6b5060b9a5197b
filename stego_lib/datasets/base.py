"""What a data set is: pictures, label maps where there are any, and what the labels mean."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import DataNotFound, StegoError
from ..files import checksum
from ..paths import user_path

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "TIFF", "WEBP", "GIF", "PPM")
"""What is looked for in a picture file, whatever its name says. Pillow knows more; EPS, say, it hands to a program that runs it."""
BROKEN = (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError, MemoryError)
"""What Pillow raises for a file that it cannot read."""
IGNORED = -1
"""Label of pixels that are left out of scores and of the linear probe."""
VOID = 255
"""How label maps of one's own store it."""


@dataclass(frozen=True)
class Classes:
    """Names of the classes and their colours in figures; position = label id."""

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    """(R, G, B) of each class, 0 to 255."""

    def __post_init__(self) -> None:
        if len(self.names) != len(self.colors) or not self.names:
            raise StegoError(
                f"{len(self.names)} class names and {len(self.colors)} colours: there must be as many, and one at least"
            )

    def __len__(self) -> int:
        return len(self.names)


class SegmentationDataset(Sequence):
    """A split of a data set: `dataset[i]` is a picture and its label map.

    The picture is uint8 (3, H, W), RGB. The label map is int64 (H, W) with ids into `classes` and `IGNORED`, or None
    for a picture without one. `names[i]` tells the pictures apart.
    """

    published = False
    """Decode labels as the published code does, where that differs (see `open_dataset`)."""

    def __init__(self, name: str, split: str, classes: Classes, pictures: list[Path], labels: list[Path | None]):
        self.name, self.split, self.classes = name, split, classes
        self.pictures, self.labels = pictures, labels
        self.names = [path.stem for path in pictures]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]  # no slices
        picture, label = self.picture(index), self.label(index)
        if label is not None and label.shape != picture.shape[1:]:
            raise StegoError(
                f"{self.pictures[index]} is {tuple(picture.shape[1:])}, its label map {self.labels[index]} is {tuple(label.shape)} (height, width); they must agree"
            )
        return picture, label

    @property
    def has_labels(self) -> bool:
        """Whether every picture has a label map."""
        return all(path is not None for path in self.labels)

    def picture(self, index: int) -> Tensor:
        """Picture `index`, uint8 (3, H, W), turned upright as its EXIF data say."""
        return TF.pil_to_tensor(open_picture(self.pictures[index]))

    def label(self, index: int) -> Tensor | None:
        """Label map `index`, int64 (H, W), or None."""
        path = self.labels[index]
        if path is None:
            return None
        stored = self.read_label(path)
        if stored.ndim != 2:
            raise StegoError(
                f"label map {path} has shape {stored.shape}; it must hold one class id a pixel (8-bit grey or palette PNG)"
            )
        if stored.dtype.kind not in "biu":
            raise StegoError(
                f"label map {path} holds {stored.dtype} values; class ids are whole numbers (8-bit grey PNG)"
            )
        try:
            return torch.from_numpy(self.decode(stored.astype(np.int64)))
        except StegoError as error:
            raise StegoError(f"label map {path} {error}") from None

    def read_label(self, path: Path) -> np.ndarray:
        """The ids as stored, (H, W), of a label map file; StegoError names a file that is broken."""
        try:
            with Image.open(path, formats=FORMATS) as file:
                return np.array(file)
        except BROKEN as error:
            raise StegoError(f"label map {path} cannot be read ({error}); replace the file") from error

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """Turns ids as stored, int64 (H, W), into ids into `classes` and `IGNORED`.

        As they are, `VOID` ignored, and StegoError for an id that is neither, unless a data set says otherwise.
        """
        known = (stored >= 0) & (stored < len(self.classes))
        if wrong := np.unique(stored[~known & (stored != VOID)]).tolist():
            raise StegoError(
                f"holds id {', '.join(map(str, wrong[:5]))}, but {self.name} has {len(self.classes)} classes: ids are 0 to "
                f"{len(self.classes) - 1}, and {VOID} where ignored; mend the label map, or the list of classes"
            )
        return np.where(known, stored, IGNORED)

    def identity(self, *, labels: bool = True) -> list:
        """What a stored result depends on, wherever the files lie: name, split, classes, and name and checksum of every file.

        Without `labels`, of the images alone. Reads every file once for each state of it; `state` reads none.
        """
        files = self._files(labels)
        with ThreadPoolExecutor() as pool:  # hashing runs outside Python's lock
            sums = list(pool.map(_checksum, files))
        return [*self._about(labels), [(path.name, sum_) for path, sum_ in zip(files, sums, strict=True)]]

    def state(self, *, labels: bool = True) -> list:
        """What `identity` was computed for: place, size and time of change of every file, found without reading any."""
        return [*self._about(labels), [(str(p), (s := _state(p)).st_size, s.st_mtime_ns) for p in self._files(labels)]]

    def _about(self, labels: bool) -> list:
        """Name and split, and what decides beside the files which ids are ignored."""
        labels = labels and self.has_labels
        return [self.name, self.split, *([len(self.classes), self.published] if labels else [None, False])]

    def _files(self, labels: bool) -> list[Path]:
        return [path for path in [*self.pictures, *(self.labels if labels else ())] if path is not None]


def _checksum(path: Path) -> str:
    state = _state(path)
    try:
        return _checksum_of(path, state.st_ino, state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise StegoError(f"{path} cannot be read ({error.strerror}); replace or remove it") from error


@cache
def _checksum_of(path: Path, *_state: int) -> str:
    """Computed once a process and state of the file."""
    return checksum(path)


def _state(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise StegoError(f"{path} cannot be read ({error.strerror}); replace or remove it") from error


def open_picture(path: Path) -> Image.Image:
    """Any readable picture as an upright RGB image; of an animated one the first frame.

    16 bits a channel become 8. StegoError names a file that is broken, above Pillow's limit of about 179 megapixels, or
    of 32-bit values, whose range nobody knows.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            upright = ImageOps.exif_transpose(file)
            if upright.mode.startswith("I;16"):  # Pillow's own conversion cuts off at 255
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            elif upright.mode in ("I", "F"):
                raise ValueError("it holds 32-bit values; save it with 8 or 16 bits a channel")
            return upright.convert("RGB")
    except BROKEN as error:
        raise StegoError(f"picture {path} cannot be read ({error}); replace or remove the file") from error


def list_pictures(folder: Path) -> list[Path]:
    """Pictures directly in `folder`, sorted by name. StegoError for a folder that cannot be read."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise StegoError(f"folder {folder} cannot be read ({error.strerror})") from error
    return [path for path in paths if path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")]


def pair_by_stem(pictures: list[Path], labels: Path, suffix: str = ".png") -> list[Path | None]:
    """The label map `labels`/STEM`suffix` of each picture; StegoError lists pictures that have none."""
    found = [labels / f"{path.stem}{suffix}" for path in pictures]
    missing = [path.name for path in found if not path.exists()]
    if missing:
        raise StegoError(
            f"{len(missing)} of {len(pictures)} label maps are missing in {labels}, the first is {missing[0]}"
        )
    return list(found)


def find_folder(
    root: str | Path, names: tuple[str, ...], needs: str | tuple[str, ...], layout: str, source: str
) -> Path:
    """The data set's folder: the first of root/NAME, or root itself, in which `needs` (or one of several) exists.

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
    """Raises StegoError for a split that the data set does not have."""
    if split not in known:
        raise StegoError(f"{name} has no split {split!r}; it has {', '.join(known)}")
