"""Crops: each image is replaced by five crops of it (paper, section 3.4).

Pieces are cut when they are asked for, from an image in any format; a store of features asks once. `write_crops`
writes them as the published code does.
"""

import threading
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor

from ..utils.errors import StegoError
from ..utils.files import atomic, fingerprint, read_json, write_json
from ..utils.paths import user_path
from ..utils.progress import progress
from .base import Sample, SegmentationDataset

RATIO = 0.5
"""Height and width of a crop relative to the image."""
COUNT = 5
"""Crops an image."""
Box = tuple[int, int, int, int]
"""top, left, height, width in pixels."""


class Crops(SegmentationDataset, ABC):
    """`dataset` with each image replaced by `COUNT` pieces: crop c of image i is number 5 i + c.

    Names, label maps and classes are kept (`names[5 * i + c]` is the image's name and "-KINDc"). Not used itself: see
    `FiveCrop` and `RandomCrop`.
    """

    kind = "crop"

    def __init__(self, dataset: SegmentationDataset, ratio: float = RATIO):
        if not 0 < ratio <= 1:
            raise StegoError(f"a crop's ratio is above 0 and at most 1, not {ratio}")
        self.whole, self.ratio = dataset, ratio
        images = [path for path in dataset.images for _ in range(COUNT)]
        labels = [path for path in dataset.labels for _ in range(COUNT)]
        super().__init__(dataset.name, dataset.split, dataset.classes, images, labels)
        self._last = threading.local()
        self.names = [f"{name}-{self.kind}{i}" for name in dataset.names for i in range(COUNT)]

    @property
    def has_labels(self) -> bool:
        return self.whole.has_labels

    def sample(self, index: int) -> Sample:
        whole = self._whole("sample", index // COUNT)
        label = None if whole.label is None else self.cut_like(whole.label, index)
        return replace(whole, image=self.cut_like(whole.image, index), label=label)

    def image(self, index: int) -> Tensor:
        return self.cut_like(self._whole("image", index // COUNT), index)

    def label(self, index: int) -> Tensor | None:
        label = self._whole("label", index // COUNT)
        return None if label is None else self.cut_like(label, index)

    def _whole(self, what: str, number: int) -> Any:
        """`what` (sample, image or label) of image `number` of the whole dataset; each thread keeps the last for its other crops."""
        if getattr(self._last, "key", None) != (what, number):
            self._last.found, self._last.key = getattr(self.whole, what)(number), (what, number)
        return self._last.found

    @abstractmethod
    def boxes(self, index: int, height: int, width: int) -> list[Box]:
        """Where image `index` of this height and width is cut."""

    @abstractmethod
    def cut(self) -> list:
        """How images are cropped, for `identity`."""

    def settings(self, *, labels: bool) -> list:
        return [*self.whole.settings(labels=labels), *self.cut()]

    def identity(self, *, labels: bool = True) -> list:
        return [*self.whole.identity(labels=labels), *self.cut()]

    def state(self, *, labels: bool = True) -> list:
        return [*self.whole.state(labels=labels), *self.cut()]

    def cut_like(self, image: Tensor, index: int) -> Tensor:
        """The piece that crop `index` is, of a map (..., H, W) of the whole image."""
        whole, which = divmod(index, COUNT)
        top, left, height, width = self.boxes(whole, *image.shape[-2:])[which]
        if not height or not width:
            raise StegoError(
                f"image {self.images[index]} is {tuple(image.shape[-2:])} pixels (height, width): too small to be cut "
                "into crops; remove it, or train with crop='none'"
            )
        return image[..., top : top + height, left : left + width]


class FiveCrop(Crops):
    """The four corners and the center: top left, top right, bottom left, bottom right, center."""

    def boxes(self, index: int, height: int, width: int) -> list[Box]:
        return five_boxes(height, width, self.ratio)

    def cut(self) -> list:
        return ["five-crop", self.ratio]


class RandomCrop(Crops):
    """Five crops at random positions, the same for the same seed.

    The published code (its other crop type) draws its positions from Python's hash of tuples, which changed with
    Python 3.8, so its positions cannot be reproduced; number and size of the crops are its.
    """

    kind = "random"

    def __init__(self, dataset: SegmentationDataset, ratio: float = RATIO, seed: int = 0):
        super().__init__(dataset, ratio)
        self.seed = seed

    def boxes(self, index: int, height: int, width: int) -> list[Box]:
        h, w = int(self.ratio * height), int(self.ratio * width)
        places = np.random.default_rng([self.seed, index]).integers(0, (height - h + 1, width - w + 1), (COUNT, 2))
        return [(top, left, h, w) for top, left in places.tolist()]

    def cut(self) -> list:
        return ["random-crop", self.ratio, self.seed]


def five_boxes(height: int, width: int, ratio: float = RATIO) -> list[Box]:
    """(top, left, height, width) in pixels of the five crops of an image, in the order of `FiveCrop`."""
    h, w = int(ratio * height), int(ratio * width)
    corners = [(top, left, h, w) for top in (0, height - h) for left in (0, width - w)]
    return [*corners, (round((height - h) / 2), round((width - w) / 2), h, w)]


def _since(began: int, path: Path) -> bool:
    return path.exists() and path.stat().st_mtime_ns >= began


def write_crops(dataset: Crops, folder: str | Path) -> None:
    """Writes every crop below `folder` in the published layout, for use outside this project.

    Crops that are there are kept if they are of the same files; made-SPLIT.json says of which.

    img/SPLIT/N.jpg and, with labels, label/SPLIT/N.png with N = 5 * image + crop; a label map holds class + 1, and 0
    where ignored. names-SPLIT.txt tells which image a number came from, one name a line.
    """
    if len(dataset.classes) > 255:
        raise StegoError(f"{dataset.name} has {len(dataset.classes)} classes; the layout holds 255 at most")
    folder = user_path(folder)
    made, source = folder / f"made-{dataset.split}.json", {"source": fingerprint(dataset.identity())}
    if not made.exists() or read_json(made) != source:
        write_json(made, source)
    began = made.stat().st_mtime_ns
    for number in progress(range(len(dataset)), f"crops of {dataset.name} {dataset.split}"):
        image = folder / "img" / dataset.split / f"{number}.jpg"
        if not _since(began, image):
            with atomic(image) as temporary:
                TF.to_pil_image(dataset.image(number)).save(temporary)
        target, label = folder / "label" / dataset.split / f"{number}.png", dataset.label(number)
        if label is not None and not _since(began, target):
            with atomic(target) as temporary:
                Image.fromarray((label + 1).numpy().astype(np.uint8)).save(temporary)
    with atomic(folder / f"names-{dataset.split}.txt") as temporary:
        temporary.write_text("\n".join(dataset.names) + "\n", encoding="utf-8", errors="surrogateescape")
