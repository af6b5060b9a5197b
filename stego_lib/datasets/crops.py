"""Crops: each image is replaced by five crops of it (paper, section 3.4), cut when they are asked for."""

import threading
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from ..utils.errors import StegoError
from .base import Sample, SegmentationDataset

# Height and width of a crop relative to the image.
RATIO = 0.5
# Crops per image.
COUNT = 5
# top, left, height, width in pixels.
Box = tuple[int, int, int, int]


class Crops(SegmentationDataset, ABC):
    """`dataset` with each image replaced by `COUNT` crops: crop c of image i is number 5 i + c.

    Classes are kept; `names[5 * i + c]` is the image's name and "-KINDc". Use `FiveCrop` or `RandomCrop`.
    """

    kind = "crop"
    pieces = COUNT

    def __init__(self, dataset: SegmentationDataset, ratio: float = RATIO):
        if not 0 < ratio <= 1:
            raise StegoError(f"A crop's ratio is {ratio}. Choose a number above 0, at most 1.")
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
        """The sample, image or label of whole image `number`; each thread keeps the last for its other crops."""
        if getattr(self._last, "key", None) != (what, number):
            self._last.value, self._last.key = getattr(self.whole, what)(number), (what, number)
        return self._last.value

    @abstractmethod
    def boxes(self, index: int, height: int, width: int) -> list[Box]:
        """Where image `index` of this height and width is cut."""

    @abstractmethod
    def cut(self) -> list:
        """How images are cropped, for `settings`."""

    def settings(self, *, labels: bool) -> list:
        return [*self.whole.settings(labels=labels), *self.cut()]

    def cut_like(self, image: Tensor, index: int) -> Tensor:
        """Crop `index` of a map (..., H, W) of the whole image."""
        whole, which = divmod(index, COUNT)
        top, left, height, width = self.boxes(whole, *image.shape[-2:])[which]
        if not height or not width:
            raise StegoError(f"Image {self.images[index]} is too small to be cropped. Remove it, or use crop='none'.")
        return image[..., top : top + height, left : left + width]


class FiveCrop(Crops):
    """The four corners and the center: top left, top right, bottom left, bottom right, center."""

    def boxes(self, index: int, height: int, width: int) -> list[Box]:
        return five_boxes(height, width, self.ratio)

    def cut(self) -> list:
        return ["five-crop", self.ratio]


class RandomCrop(Crops):
    """Five crops at random positions, the same for the same seed.

    The authors' code draws its positions from Python's hash of tuples, which changed with Python 3.8, so its positions
    cannot be reproduced; number and size of the crops are the same.
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


# The crops that an experiment can name.
CROPS = {"five": FiveCrop, "random": RandomCrop}


def five_boxes(height: int, width: int, ratio: float = RATIO) -> list[Box]:
    """(top, left, height, width) in pixels of the five crops of an image, in the order of `FiveCrop`."""
    h, w = int(ratio * height), int(ratio * width)
    corners = [(top, left, h, w) for top in (0, height - h) for left in (0, width - w)]
    return [*corners, (round((height - h) / 2), round((width - w) / 2), h, w)]
