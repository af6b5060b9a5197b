"""Datasets of crops: five of each image (paper, section 3.4), or tiles. They are cut on demand."""

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor

from .base import Sample, SegmentationDataset
from .images import image_size
from .transforms import Size

# Height and width of a crop relative to the image.
RATIO = 0.5
# Crops per image of `FiveCrop` and `RandomCrop`.
COUNT = 5
# top, left, height, width in pixels.
Box = tuple[int, int, int, int]


class Crops(SegmentationDataset, ABC):
    """Base class of `FiveCrop`, `RandomCrop` and `Tiles`: replaces each image of `dataset` by `counts` crops.

    Item `index` is crop c of image i, where (i, c) = `places[index]`; its name is NAME-KINDc. rules: settings of the
    crops, for fingerprints.
    """

    kind = "crop"
    pieces = COUNT

    def __init__(self, dataset: SegmentationDataset, rules: list, counts: Sequence[int] | None = None):
        self.whole, self.crop_rules = dataset, rules
        self.places = [(i, c) for i, count in enumerate(counts or [COUNT] * len(dataset)) for c in range(count)]
        images, labels = [dataset.images[i] for i, _ in self.places], [dataset.labels[i] for i, _ in self.places]
        super().__init__(dataset.name, dataset.split, dataset.classes, images, labels)
        self.names = [f"{dataset.names[i]}-{self.kind}{c}" for i, c in self.places]
        self._last = threading.local()

    @abstractmethod
    def boxes(self, index: int, height: int, width: int) -> list[Box]:
        """Boxes of the crops of image `index` with this height and width."""

    def settings(self, *, labels: bool) -> list:
        return [*self.whole.settings(labels=labels), *self.crop_rules]

    def sample(self, index: int) -> Sample:
        whole = self._whole("sample", index)
        label = None if whole.label is None else self.cut_like(whole.label, index)
        return replace(whole, image=self.cut_like(whole.image, index), label=label)

    def image(self, index: int) -> Tensor:
        return self.cut_like(self._whole("image", index), index)

    def _whole(self, what: str, index: int) -> Any:
        """The whole sample or image of crop `index`. Each thread keeps the last one for the next crops."""
        key = (what, self.places[index][0])
        if getattr(self._last, "key", None) != key:
            self._last.value, self._last.key = getattr(self.whole, what)(key[1]), key
        return self._last.value

    def cut_like(self, image: Tensor, index: int) -> Tensor:
        """Cuts crop `index` out of a map (..., H, W) of the whole image."""
        number, crop = self.places[index]
        top, left, height, width = self.boxes(number, *image.shape[-2:])[crop]
        return image[..., top : top + height, left : left + width]


class FiveCrop(Crops):
    """Four corners and the center: top left, top right, bottom left, bottom right, center."""

    def __init__(self, dataset: SegmentationDataset):
        super().__init__(dataset, ["five-crop", RATIO])

    def boxes(self, index: int, height: int, width: int) -> list[Box]:
        return five_boxes(height, width)


class RandomCrop(Crops):
    """Five crops at random positions, drawn from the seed.

    The positions of the authors' code cannot be reproduced, because Python's hash of tuples has changed.
    """

    kind = "random"

    def __init__(self, dataset: SegmentationDataset, seed: int = 0):
        super().__init__(dataset, ["random-crop", RATIO, seed])
        self.seed = seed

    def boxes(self, index: int, height: int, width: int) -> list[Box]:
        h, w = int(RATIO * height), int(RATIO * width)
        places = np.random.default_rng([self.seed, index]).integers(0, (height - h + 1, width - w + 1), (COUNT, 2))
        return [(top, left, h, w) for top, left in places.tolist()]


class Tiles(Crops):
    """Evenly spaced tiles of `size` that cover each image at its own resolution; a smaller image is one tile."""

    kind = "tile"
    pieces = 1

    def __init__(self, dataset: SegmentationDataset, size: Size):
        self.size = (size, size) if isinstance(size, int) else size
        sizes = [image_size(path, dataset.rules) for path in dataset.images]
        super().__init__(dataset, ["tiles", self.size], [len(self.boxes(i, *shape)) for i, shape in enumerate(sizes)])

    def boxes(self, index: int, height: int, width: int) -> list[Box]:
        h, w = min(self.size[0], height), min(self.size[1], width)
        tops, lefts = (
            np.linspace(0, side - length, math.ceil(side / length)).round().astype(int).tolist()
            for side, length in ((height, h), (width, w))
        )
        return [(top, left, h, w) for top, left in product(tops, lefts)]


def five_boxes(height: int, width: int, ratio: float = RATIO) -> list[Box]:
    """Boxes of the crops of `FiveCrop`."""
    h, w = int(ratio * height), int(ratio * width)
    corners = [(top, left, h, w) for top in (0, height - h) for left in (0, width - w)]
    return [*corners, (round((height - h) / 2), round((width - w) / 2), h, w)]
