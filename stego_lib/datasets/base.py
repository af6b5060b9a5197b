"""What a dataset is: images, label maps where there are any, and what the labels mean."""

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor

from ..utils.errors import StegoError
from ..utils.progress import progress
from .classes import Classes, Finding, listed
from .formats import BROKEN, FORMATS, Rules, stored_numbers
from .images import StoredImage, read_image, transparent_part
from .layout import checksum_of, state_of

IGNORED = -1
"""Label of pixels that are left out of scores and of the linear probe."""
VOID = 255
"""How label maps of one's own store it."""
READING = 2
"""To be raised whenever the same file gives other pixels or labels than before."""


@dataclass(frozen=True, eq=False)
class Sample:
    """An image, its label map, and the SHA-256 of their files."""

    image: Tensor
    """uint8 (3, H, W)."""
    label: Tensor | None
    """int64 (H, W) with ids into the classes and `IGNORED`."""
    image_sha256: str
    label_sha256: str | None


class SegmentationDataset(Sequence):
    """A split of a dataset: `dataset[i]` is an image and its label map.

    The image is uint8 (3, H, W), RGB. The label map is int64 (H, W) with ids into `classes` and `IGNORED`, or None
    for an image without one. `names[i]` tells the images apart.
    """

    published = False
    """Decode labels as the published code does, where that differs (see `open_dataset`)."""
    files_checked = False
    """Whether every file was read and found good, see `intact`."""

    def doubts(self, ids: np.ndarray) -> list[Finding]:
        """Why the label maps may be those of another release of the dataset. ids: pixels of each stored id, int64 (256,)."""
        return []

    def __init__(self, name: str, split: str, classes: Classes, images: list[Path], labels: list[Path | None]):
        self.name, self.split, self.classes = name, split, classes
        self.images, self.labels = images, labels
        self.names = [path.stem for path in images]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def rules(self) -> Rules:
        """How its images are read."""
        return self.classes.rules

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]  # no slices
        sample = self.sample(index)
        return sample.image, sample.label

    def sample(self, index: int) -> Sample:
        """Image and label map `index` with the digests of their files, each of which is read once."""
        image_file, image_sha256 = _open_hashed(self.images[index])
        label_path = self.labels[index]
        label_file, label_sha256 = (None, None) if label_path is None else _open_hashed(label_path)
        read = self.read(index, image_file)
        label = self.meaning(self.stored(index, label_file), index, read)
        return Sample(TF.pil_to_tensor(read.rgb), label, image_sha256, label_sha256)

    @property
    def has_labels(self) -> bool:
        """Whether every image has a label map."""
        return all(path is not None for path in self.labels)

    def read(self, index: int, file: BinaryIO | None = None) -> StoredImage:
        """Image `index` and what its file says of itself. file: the file, if it is open already."""
        return read_image(file or self.images[index], self.rules)

    def image(self, index: int) -> Tensor:
        """Image `index`, uint8 (3, H, W), turned upright as its EXIF data say unless `rules` say otherwise."""
        return TF.pil_to_tensor(self.read(index).rgb)

    def label(self, index: int) -> Tensor | None:
        """Label map `index`, int64 (H, W), or None. Transparent pixels of its image are ignored."""
        return self.meaning(self.stored(index), index)

    def stored(self, index: int, file: BinaryIO | None = None) -> np.ndarray | None:
        """The ids of label map `index` as they are stored, int64 (H, W), or None. file: the file, if it is open already."""
        path = self.labels[index]
        if path is None:
            return None
        stored = self.read_label(file or path)
        if stored.ndim != 2:
            raise StegoError(
                f"label map {path} has shape {stored.shape}; it must hold one class id per pixel (8-bit gray or palette PNG)"
            )
        if stored.dtype.kind not in "biu":
            raise StegoError(
                f"label map {path} holds {stored.dtype} values; class ids are whole numbers (8-bit gray PNG)"
            )
        return stored.astype(np.int64)

    def meaning(self, stored: np.ndarray | None, index: int, read: StoredImage | None = None) -> Tensor | None:
        """What `stored` ids of label map `index` mean, int64 (H, W); compared with its image where that was `read`."""
        if stored is None:
            return None
        if read is not None and stored.shape != read.rgb.size[::-1]:
            raise StegoError(self._sizes_differ(index, read, stored.shape))
        try:
            found = self.decode(stored)
        except StegoError as error:
            raise StegoError(f"label map {self.labels[index]} {error}") from None
        transparent = read.transparent if read else transparent_part(self.images[index], self.rules)
        if transparent is not None and transparent.shape == found.shape:
            found = np.where(transparent, IGNORED, found)
        return torch.from_numpy(found)

    def _sizes_differ(self, index: int, read: StoredImage, size: tuple[int, ...]) -> str:
        """The error for a label map of another size than its image."""
        own, path, label = read.rgb.size[::-1], self.images[index], self.labels[index]
        text = f"{path} is {own}, its label map {label} is {tuple(size)} (height, width); they must agree"
        if read.orientation <= 4 or size != own[::-1]:
            return text
        if self.rules.exif == "ignore":
            return f"{text}. The image is left as stored, though its EXIF data (orientation {read.orientation}) turn it"
        return (
            f"{text}. EXIF data (orientation {read.orientation}) have turned the image; if label maps are drawn on the "
            'stored pixels, write "exif": "ignore" into classes.json, else turn this label map'
        )

    def read_label(self, source: Path | BinaryIO) -> np.ndarray:
        """The ids as stored, (H, W), of a label map file, closed or open; StegoError names a file that is broken."""
        path = getattr(source, "name", source) if not isinstance(source, Path) else source
        try:
            with Image.open(source, formats=FORMATS) as file:
                if file.format == "JPEG":  # whatever its name says
                    raise StegoError(
                        f"label map {path} is a JPEG, which changes ids at edges; export the labels anew as PNG"
                    )
                return stored_numbers(file, self.rules)
        except StegoError:  # a ValueError too
            raise
        except BROKEN as error:
            raise StegoError(f"label map {path} cannot be read ({error}); replace the file") from error

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """Turns ids as stored, int64 (H, W), into ids into `classes` and `IGNORED`.

        As they are, `VOID` ignored, and StegoError for an id that is neither, unless a dataset says otherwise.
        """
        count = len(self.classes)
        known = (stored >= 0) & (stored < count)
        if wrong := np.unique(stored[~known & (stored != VOID)]).tolist():
            hint = ""
            if len(wrong) > 20:
                hint = "; so many ids are a photograph, colors, or a label map saved as JPEG"
            elif wrong == [count] and not (stored == 0).any():
                hint = "; ids seem to start at 1: subtract 1"
            raise StegoError(
                f"holds id {listed(wrong)}, but {self.name} has {count} classes: ids are 0 to "
                f"{count - 1}, and {VOID} where ignored; mend the label map, or the list of classes{hint}"
            )
        return np.where(known, stored, IGNORED)

    def identity(self, *, labels: bool = True) -> list:
        """What a stored result depends on, wherever the files lie: name, split, classes, and name and checksum of every file.

        Without `labels`, of the images alone. Reads every file once for each state of it; `state` reads none.
        """
        files = self._files(labels)
        with ThreadPoolExecutor() as pool:  # hashing runs outside Python's lock
            sums = list(
                progress(pool.map(checksum_of, files), f"checksums of {self.name} {self.split}", total=len(files))
            )
        return [*self._about(labels), [(path.name, sum_) for path, sum_ in zip(files, sums, strict=True)]]

    def state(self, *, labels: bool = True) -> list:
        """What `identity` was computed for: place, size and time of change of every file, found without reading any."""
        return [
            *self._about(labels),
            [(str(p), (s := state_of(p)).st_size, s.st_mtime_ns) for p in self._files(labels)],
        ]

    def settings(self, *, labels: bool) -> list:
        """Name and split, and what decides beside the content of the files which pixels, or labels, are read from them."""
        return self._about(labels)

    def _about(self, labels: bool) -> list:
        """Name and split, how images are read, and what decides beside the files which ids are ignored."""
        labels = labels and self.has_labels
        read = [READING, self.rules.range, self.rules.exif == "ignore"]
        return [self.name, self.split, *read, *([len(self.classes), self.published] if labels else [None, False])]

    def _files(self, labels: bool) -> list[Path]:
        return [path for path in [*self.images, *(self.labels if labels else ())] if path is not None]


def _open_hashed(path: Path) -> tuple[BinaryIO, str]:
    """A file's bytes as an open file, named like it, and their SHA-256. StegoError for a file that cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StegoError(f"{path} cannot be read ({error.strerror}). Replace or remove the file.") from error
    file = io.BytesIO(content)
    file.name = str(path)
    return file, hashlib.sha256(content).hexdigest()
