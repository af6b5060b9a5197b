"""Five-crop: four corners and the centre of each picture become pictures of their own (paper, section 3.4)."""

from torch import Tensor

from .base import SegmentationDataset

RATIO = 0.5
"""Height and width of a crop, as a part of the picture's."""


class FiveCrop(SegmentationDataset):
    """`dataset` with each picture replaced by five crops: top left, top right, bottom left, bottom right, centre."""

    def __init__(self, dataset: SegmentationDataset, ratio: float = RATIO):
        self.whole, self.ratio = dataset, ratio
        pictures, labels = ([path for path in paths for _ in range(5)] for paths in (dataset.pictures, dataset.labels))
        super().__init__(dataset.name, dataset.split, dataset.classes, pictures, labels)
        self.names = [f"{name}-crop{i}" for name in dataset.names for i in range(5)]

    def picture(self, index: int) -> Tensor:
        return self._cut(self.whole.picture(index // 5), index % 5)

    def label(self, index: int) -> Tensor | None:
        label = self.whole.label(index // 5)
        return None if label is None else self._cut(label, index % 5)

    def identity(self) -> list:
        return [*self.whole.identity(), "five-crop", self.ratio]

    def _cut(self, image: Tensor, which: int) -> Tensor:
        top, left, height, width = five_boxes(*image.shape[-2:], self.ratio)[which]
        return image[..., top : top + height, left : left + width]


def five_boxes(height: int, width: int, ratio: float = RATIO) -> list[tuple[int, int, int, int]]:
    """(top, left, height, width) in pixels of the five crops of a picture, in the order of `FiveCrop`."""
    h, w = int(ratio * height), int(ratio * width)
    corners = [(top, left, h, w) for top in (0, height - h) for left in (0, width - w)]
    return [*corners, (round((height - h) / 2), round((width - w) / 2), h, w)]
