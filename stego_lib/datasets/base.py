"""What a dataset is: images, label maps where there are any, and what the labels mean."""

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torchvision.transforms.functional as TF
from torch import Tensor

from ..utils.errors import StegoError
from ..utils.notices import notice
from .classes import Classes, Rules
from .images import Source, StoredImage, has_transparency, naming, read_ids, read_image

# Label of pixels that are left out of scores and of the linear probe.
IGNORED = -1
# In a label table: a stored id that must not occur.
UNKNOWN = -2
# Stored id of ignored pixels.
VOID = 255
# Raise this when an ordinary file gives other pixels or labels than before; run records hold fingerprints made with it.
READING = 2


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

    pieces = 1
    """Rows that an image file gives."""
    published = False
    """Decode labels as the authors' code does, where that differs (see `open_dataset`)."""
    release = ""
    """The ids that label maps hold, and what other ids probably mean, for an error; "" names the number of classes."""

    def __init__(self, name: str, split: str, classes: Classes, images: list[Path], labels: list[Path | None]):
        if not images:
            raise StegoError(f"{name} {split} lists no image. Get its files again.")
        self.name, self.split, self.classes = name, split, classes
        self.images, self.labels = images, labels
        self.names = [path.stem for path in images]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]  # no slices
        sample = self.sample(index)
        return sample.image, sample.label

    @property
    def rules(self) -> Rules:
        """How its images are read."""
        return self.classes.rules

    @property
    def has_labels(self) -> bool:
        """Whether every image has a label map."""
        return all(path is not None for path in self.labels)

    def sample(self, index: int) -> Sample:
        """Image and label map `index` with the digests of their files, each of which is read once."""
        image_file, image_sha256 = _open_hashed(self.images[index])
        label_path = self.labels[index]
        label_file, label_sha256 = (None, None) if label_path is None else _open_hashed(label_path)
        read = self.read(index, image_file)
        label = self.meaning(self.stored(index, label_file), index, read)
        return Sample(TF.pil_to_tensor(read.rgb), label, image_sha256, label_sha256)

    def image(self, index: int) -> Tensor:
        """Image `index`, uint8 (3, H, W), upright."""
        return TF.pil_to_tensor(self.read(index).rgb)

    def label(self, index: int) -> Tensor | None:
        """Label map `index`, int64 (H, W), or None. Transparent pixels of its image are ignored."""
        read = self.read(index) if self.labels[index] and has_transparency(self.images[index]) else None
        return self.meaning(self.stored(index), index, read)

    def read(self, index: int, file: BinaryIO | None = None) -> StoredImage:
        """Image `index`, its transparent pixels and its orientation. file: the file, if it is open already."""
        return read_image(file or self.images[index], self.rules)

    def stored(self, index: int, file: BinaryIO | None = None) -> np.ndarray | None:
        """The ids of label map `index` as stored, int64 (H, W), or None. file: the file, if it is open already."""
        path = self.labels[index]
        return None if path is None else self.read_label(file or path)

    def read_label(self, source: Source) -> np.ndarray:
        """The ids as stored, int64 (H, W), of a label map file."""
        return read_ids(source)

    def meaning(self, stored: np.ndarray | None, index: int, read: StoredImage | None = None) -> Tensor | None:
        """Class of each pixel of `stored` ids, int64 (H, W), where the image that was `read` is not transparent."""
        if stored is None:
            return None
        with naming(f"label map {self.labels[index]}"):
            label = self.decode(stored)
        if read is None:
            return torch.from_numpy(label)
        turned = read.orientation > 1 and self.rules.exif is None
        if label.shape != read.rgb.size[::-1]:
            hint = ', or write "exif": "ignore" into classes.json: EXIF data have turned the image' if turned else ""
            raise StegoError(
                f"{self.images[index]} is {read.rgb.size[::-1]}, its label map {self.labels[index]} is {label.shape} "
                f"(height, width). Make them agree{hint}."
            )
        if turned:
            notice(
                f"{self.name}: images are turned upright by EXIF, and label maps are assumed to match. If they match "
                'the stored pixels, write "exif": "ignore" into classes.json; "apply" ends this notice.'
            )
        if read.transparent is not None:
            label = np.where(read.transparent, IGNORED, label)
        return torch.from_numpy(label)

    def label_table(self) -> np.ndarray:
        """Class, `IGNORED` or `UNKNOWN` for each stored id from 0 to 255 and, last, for all others: int64 (257,)."""
        table = np.full(257, UNKNOWN)
        table[: len(self.classes)] = range(len(self.classes))
        table[VOID] = IGNORED
        return table

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """Turns ids as stored, int64 (H, W), into ids into `classes` and `IGNORED`; StegoError for unknown ids."""
        label = self.label_table()[np.where((stored >= 0) & (stored < 256), stored, 256)]
        if (label == UNKNOWN).any():
            wrong = np.unique(stored[label == UNKNOWN]).tolist()
            ids = ", ".join(map(str, wrong[:10])) + (", ..." if len(wrong) > 10 else "")
            release = self.release or f"{self.name} has ids 0 to {len(self.classes) - 1}, and {VOID} where ignored"
            raise StegoError(f"holds id {ids}. {release}.")
        return label

    def doubt(self, ids: np.ndarray) -> str:
        """Why label maps may belong to another release, or ""; `ids`: pixels of each stored id, int64 (256,)."""
        return ""

    def settings(self, *, labels: bool) -> list:
        """Name, split and all that decides, beside the files' content, which pixels or labels are read."""
        labels = labels and self.has_labels
        read = [READING, self.rules.range, self.rules.exif == "ignore"]
        return [self.name, self.split, *read, *([len(self.classes), self.published] if labels else [None, False])]

    def listing(self) -> list:
        """Name relative to their common folder, size and time of change of every file, found without reading any."""
        paths = list(dict.fromkeys(path for path in [*self.images, *self.labels] if path is not None))
        root = os.path.commonpath([path.parent for path in paths])
        states = []
        for path in paths:
            with naming(path):
                state = path.stat()
            states.append((str(path).removeprefix(root), state.st_size, state.st_mtime_ns))
        return states


def _open_hashed(path: Path) -> tuple[BinaryIO, str]:
    """A file's bytes as an open file, named like it, and their SHA-256."""
    with naming(path):
        content = path.read_bytes()
    file = io.BytesIO(content)
    file.name = str(path)
    return file, hashlib.sha256(content).hexdigest()
