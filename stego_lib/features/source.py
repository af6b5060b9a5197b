"""Source of one row of features: an image of a dataset at one size, and the backbone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..backbone import Backbone
from ..datasets import SegmentationDataset
from ..datasets.transforms import Size, resize_image, resize_label
from ..utils.errors import StegoError
from ..utils.files import fingerprint, read_json, write_json
from ..utils.memory import enough_memory

Shapes = dict[str, tuple[type, tuple[int, ...]]]
"""Name -> type and shape of an array."""
VERSION = 5
"""Version of the stored content; a store of another version is not used."""
NO_LABEL = 255
"""Value of ignored pixels in a store."""


@dataclass(frozen=True, eq=False)
class Source:
    """Images of a dataset at one size, and the backbone that extracts their features.

    mirror: extract features of the horizontally flipped images; images and labels stay as they are. published: resize images
    as the published code does, see `resize_image`.
    """

    dataset: SegmentationDataset
    backbone: Backbone
    size: Size
    mirror: bool = False
    published: bool = False

    def __str__(self) -> str:
        return f"{self.dataset.name} {self.dataset.split}{' (mirrored)' if self.mirror else ''}"

    def fingerprint(self, root: str | Path, *more: object) -> str:
        """Changes with the content of the files, size, resampling, weights and precision, and `more`; for `root` see `content_id`."""
        own = (content_id(self.dataset, root), self.size, self.mirror, self.published, self.backbone.fingerprint())
        return fingerprint(VERSION, *own, *more)

    @property
    def shapes(self) -> Shapes:
        """Type and shape of each array of a store: features, images, pooled and, with labels, labels."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        count = len(self.dataset)
        shapes: Shapes = {
            "features": (np.float16, (count, self.backbone.dim, *self.backbone.grid(height, width))),
            "images": (np.uint8, (count, 3, height, width)),
            "pooled": (np.float32, (count, self.backbone.dim)),
        }
        return shapes | {"labels": (np.uint8, (count, height, width))} if self.dataset.has_labels else shapes

    def stored(self, features: Tensor) -> dict[str, Tensor]:
        """What a store keeps of features (B, C, h, w), by name of its array."""
        return {"features": features.half()}

    def image(self, row: int) -> Tensor:
        """Image `row` at its size, uint8 (3, H, W)."""
        return resize_image(self.dataset.image(row), self.size, self.published)

    def label(self, row: int) -> Tensor:
        """Label map `row` at its size, uint8 (H, W), ignored pixels at `NO_LABEL`."""
        label = self.dataset.label(row)
        assert label is not None
        return self._stored(label)

    def sample(self, row: int) -> tuple[Tensor, Tensor]:
        """Image and label map `row`."""
        image, label = self.dataset[row]
        assert label is not None
        return resize_image(image, self.size, self.published), self._stored(label)

    def _stored(self, label: Tensor) -> Tensor:
        resized = resize_label(label, self.size)
        return resized.masked_fill(resized < 0, NO_LABEL).to(torch.uint8)

    def features(self, images: Tensor, rows: Sequence[int]) -> Tensor:
        """Features of uint8 images (B, 3, H, W): float32 (B, C, h, w), on the backbone's device.

        Raises StegoError for a lack of memory, and for features that float16 cannot hold; `rows` name the image.
        """
        options = "choose a smaller train_size or eval_size, precision='bfloat16' or device='cpu'"
        with enough_memory(f"features of {self}", options):
            found = self.backbone(images.flip(-1) if self.mirror else images)
        bad = ~found.half().isfinite().flatten(1).all(1)
        if bad.any():
            first = self.dataset.images[rows[int(bad.nonzero()[0])]]
            raise StegoError(
                f"backbone {self.backbone.name!r} gives {first} features that are not finite numbers, or too large to be stored; "
                "are its weights damaged? try precision='float32' or another backbone"
            )
        return found


def content_id(dataset: SegmentationDataset, root: str | Path, *, labels: bool = True) -> str:
    """Fingerprint of the content of a split's files, wherever they lie; without `labels`, of its images alone.

    The files are read once; root/.contents caches the result by their paths, sizes and times of change.
    """
    known = Path(root) / ".contents" / f"{fingerprint(dataset.state(labels=labels))}.json"
    if known.exists():
        return read_json(known)
    found = fingerprint(dataset.identity(labels=labels))
    write_json(known, found)
    return found
