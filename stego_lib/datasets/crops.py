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
        self.whole, self.ratio = dataset, ratio
        images = [path for path in dataset.images for _ in range(COUNT)]
        labels = [path for path in dataset.labels for _ in range(COUNT)]
        super().__init__(dataset.name, dataset.split, dataset.classes, images, labels)
        self.names = [f"{name}-{self.kind}{i}" for name in dataset.names for i in range(COUNT)]
        self._last = threading.local()

    @property
    def has_labels(self) -> bool:
        return self.whole.has_labels

    def sample(self, index: int) -> Sample:
        whole = self._whole("sample", index)
        label = None if whole.label is None else self.cut_like(whole.label, index)
        return replace(whole, image=self.cut_like(whole.image, index), label=label)

    def image(self, index: int) -> Tensor:
        return self.cut_like(self._whole("image", index), index)

    def label(self, index: int) -> Tensor | None:
        label = self._whole("label", index)
        return None if label is None else self.cut_like(label, index)

    def _whole(self, what: str, index: int) -> Any:
        """The sample, image or label that crop `index` is cut from; each thread keeps the last for the other crops."""
        key = (what, index // COUNT)
        if getattr(self._last, "key", None) != key:
            self._last.value, self._last.key = getattr(self.whole, what)(index // COUNT), key
        return self._last.value

    @abstractmethod
    def boxes(self, index: int, height: int, width: int) -> list[Box]:
        """Where image `index` of this height and width is cut."""

    def cut_like(self, image: Tensor, index: int) -> Tensor:
        """Crop `index` of a map (..., H, W) of the whole image."""
        if self.ratio > 1 or int(self.ratio * min(image.shape[-2:])) < 1:
            raise StegoError(f"{self.images[index]} is too small to be cropped, or the ratio {self.ratio} is above 1.")
        top, left, height, width = self.boxes(index // COUNT, *image.shape[-2:])[index % COUNT]
        return image[..., top : top + height, left : left + width]


class FiveCrop(Crops):
    """The four corners and the center: top left, top right, bottom left, bottom right, center."""

    def boxes(self, index: int, height: int, width: int) -> list[Box]:
        return five_boxes(height, width, self.ratio)

    def settings(self, *, labels: bool) -> list:
        return [*self.whole.settings(labels=labels), "five-crop", self.ratio]


class RandomCrop(Crops):
    """Five crops at random positions, the same for the same seed.

    The positions of the authors' code cannot be reproduced: they came from Python's hash of tuples, which has changed.
    """

    kind = "random"

    def __init__(self, dataset: SegmentationDataset, ratio: float = RATIO, seed: int = 0):
        super().__init__(dataset, ratio)
        self.seed = seed

    def boxes(self, index: int, height: int, width: int) -> list[Box]:
        h, w = int(self.ratio * height), int(self.ratio * width)
        places = np.random.default_rng([self.seed, index]).integers(0, (height - h + 1, width - w + 1), (COUNT, 2))
        return [(top, left, h, w) for top, left in places.tolist()]

    def settings(self, *, labels: bool) -> list:
        return [*self.whole.settings(labels=labels), "random-crop", self.ratio, self.seed]


# The crops that an experiment can name.
CROPS = {"five": FiveCrop, "random": RandomCrop}


def five_boxes(height: int, width: int, ratio: float = RATIO) -> list[Box]:
    """(top, left, height, width) in pixels of the five crops of an image, in the order of `FiveCrop`."""
    h, w = int(ratio * height), int(ratio * width)
    corners = [(top, left, h, w) for top in (0, height - h) for left in (0, width - w)]
    return [*corners, (round((height - h) / 2), round((width - w) / 2), h, w)]
