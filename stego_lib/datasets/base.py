"""Base class of the datasets: reads images and label maps, and decodes labels."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as TF
from torch import Tensor

from ..utils.errors import StegoError
from ..utils.notices import notice
from .classes import Classes, Rules
from .images import StoredImage, naming, read_ids, read_image

# Label of pixels that scores and the linear probe ignore.
IGNORED = -1
# Marks invalid ids in a label table.
UNKNOWN = -2
# Stored id of ignored pixels.
VOID = 255
# Version of the readers, part of all fingerprints. Increase it when ordinary files give other pixels or labels.
READER_VERSION = 2


@dataclass(frozen=True, eq=False)
class Sample:
    """An image, its label map, and the SHA-256 of their files."""

    image: Tensor
    """uint8 (3, H, W), RGB, upright."""
    label: Tensor | None
    """int64 (H, W), class ids and `IGNORED`; None for an image without a label map."""
    image_sha256: str
    label_sha256: str | None


class SegmentationDataset(Sequence):
    """A split of a dataset: `dataset[i]` is an image and its label map (or None), see `Sample`.

    `names[i]` is a unique name of image i.
    """

    pieces = 1
    """Samples per image file."""
    published = False
    """Decode labels as the authors' code does (see `open_dataset`)."""
    ignored_ids: tuple[int, ...] = (VOID,)
    """Stored ids of ignored pixels."""
    expected_ids = ""
    """Valid ids of label maps and the usual cause of others, for errors; by default the number of classes."""

    def __init__(self, name: str, split: str, classes: Classes, images: list[Path], labels: list[Path | None]):
        if not images:
            raise StegoError(f"{name} {split} has no images. Download the dataset again.")
        self.name, self.split, self.classes = name, split, classes
        self.images, self.labels = images, labels
        self.names = [path.stem for path in images]

    def __repr__(self) -> str:
        return f"SegmentationDataset({self.name} {self.split}, {len(self)} images, {len(self.classes)} classes)"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]  # no slices
        sample = self.sample(index)
        return sample.image, sample.label

    @property
    def rules(self) -> Rules:
        """Rules for reading the images."""
        return self.classes.rules

    @property
    def has_labels(self) -> bool:
        """Whether every image has a label map."""
        return all(path is not None for path in self.labels)

    def sample(self, index: int) -> Sample:
        """Reads image and label map `index`, each file once, with the digests of the files."""
        content = _content(self.images[index])
        stored, image_sha256 = self.read(index, content), hashlib.sha256(content).hexdigest()
        image = TF.pil_to_tensor(stored.rgb)
        path = self.labels[index]
        if path is None:
            return Sample(image, None, image_sha256, None)
        content = _content(path)
        ids, label_sha256 = self.read_label(path, content), hashlib.sha256(content).hexdigest()
        with naming(f"label map {path}"):
            label = self.decode(ids)
        rotated = stored.orientation > 1 and self.rules.exif is None
        if label.shape != stored.rgb.size[::-1]:
            hint = ', or write "exif": "ignore" into classes.json, because EXIF rotates the image' if rotated else ""
            raise StegoError(
                f"{self.images[index]} is {stored.rgb.size[::-1]}, its label map {path} is {label.shape} "
                f"(height, width). Make them equal{hint}."
            )
        if rotated:
            notice(
                f"{self.name}: images are rotated by EXIF, and label maps are assumed to match. If they match the "
                'stored pixels, write "exif": "ignore" into classes.json, otherwise "exif": "apply".'
            )
        if stored.transparent is not None:
            label = np.where(stored.transparent, IGNORED, label)
        return Sample(image, torch.from_numpy(label), image_sha256, label_sha256)

    def image(self, index: int) -> Tensor:
        """Image `index`, uint8 (3, H, W)."""
        return TF.pil_to_tensor(self.read(index).rgb)

    def label(self, index: int) -> Tensor | None:
        """Label map `index`, int64 (H, W), or None. Transparent pixels of the image are ignored."""
        return self.sample(index).label

    def read(self, index: int, content: bytes | None = None) -> StoredImage:
        """Image `index` with transparency and orientation. content: of the file, if already read."""
        return read_image(self.images[index], self.rules, content)

    def read_label(self, path: Path, content: bytes) -> np.ndarray:
        """Stored ids of a label map, int64 (H, W)."""
        return read_ids(path, content)

    def label_table(self) -> np.ndarray:
        """Maps stored ids 0 to 255 and, last, all others to class ids, `IGNORED` or `UNKNOWN`: int64 (257,)."""
        table = np.full(257, UNKNOWN)
        table[: len(self.classes)] = range(len(self.classes))
        table[list(self.ignored_ids)] = IGNORED
        return table

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """Converts stored ids to class ids and `IGNORED`, int64 (H, W). Raises StegoError for unknown ids."""
        label = self.label_table()[np.where((stored >= 0) & (stored < 256), stored, 256)]
        if (label == UNKNOWN).any():
            wrong = np.unique(stored[label == UNKNOWN]).tolist()
            ids = ", ".join(map(str, wrong[:10])) + (", ..." if len(wrong) > 10 else "")
            valid = f"{self.name} has ids 0 to {len(self.classes) - 1}, and {VOID} where ignored"
            raise StegoError(f"contains id {ids}. {self.expected_ids or f'{valid}. Correct the file or the classes'}.")
        return label

    def settings(self, *, labels: bool) -> list:
        """Everything that determines pixels or labels apart from the content of the files, for fingerprints."""
        labels = labels and self.has_labels
        read = [READER_VERSION, self.rules.range, self.rules.exif == "ignore"]
        return [self.name, self.split, *read, *([len(self.classes), self.published] if labels else [None, False])]

    def listing(self) -> list:
        """Relative path, size and modification time of every file."""
        paths = list(dict.fromkeys(path for path in [*self.images, *self.labels] if path is not None))
        root = os.path.commonpath([path.parent for path in paths])
        listed = []
        for path in paths:
            with naming(path):
                state = path.stat()
            listed.append((str(path).removeprefix(root), state.st_size, state.st_mtime_ns))
        return listed


def _content(path: Path) -> bytes:
    with naming(path):
        return path.read_bytes()
