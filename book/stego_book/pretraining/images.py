"""Images for pre-training: synthetic scenes, or photographs resized to one size, as a tensor."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from stego_lib.datasets import painter
from stego_lib.datasets.base import SegmentationDataset
from stego_lib.datasets.images import read_image
from stego_lib.datasets.layout import list_images
from stego_lib.datasets.transforms import resize_image, resize_label
from stego_lib.utils.errors import StegoError
from stego_lib.utils.paths import user_path
from stego_lib.utils.progress import progress

SIZE = (240, 320)
"""Height and width of resized photographs."""


def draw_scenes(series: int, count: int, *, weather: bool) -> tuple[Tensor, Tensor]:
    """The first scenes of a series: uint8 (count, 3, H, W) and their label maps, int64 (count, H, W)."""
    drawn = [painter.paint_scene(series, index, weather=weather) for index in progress(range(count), "drawing scenes")]
    images, labels = (torch.from_numpy(np.stack(parts)) for parts in zip(*drawn, strict=True))
    return images.permute(0, 3, 1, 2).contiguous(), labels.long()


def read_photographs(folder: str | Path, size: tuple[int, int] = SIZE) -> Tensor:
    """All images directly in `folder`, sorted by name, uint8 (N, 3, H, W) of `size` = (H, W).

    Each is resized (Lanczos) to cover this size, then center-cropped. Raises StegoError for an unreadable folder or
    image, and for a folder without images.
    """
    paths = list_images(user_path(folder))
    if not paths:
        raise StegoError(f"{folder} contains no images. Name a folder of photographs.")
    images = torch.empty(len(paths), 3, *size, dtype=torch.uint8)
    for row, path in enumerate(progress(paths, f"reading {Path(folder).name}")):
        fitted = ImageOps.fit(read_image(path).rgb, (size[1], size[0]), Image.Resampling.LANCZOS)
        images[row] = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)
    return images


def mixture(parts: Sequence[Tensor], shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Concatenates sets of images, with sampling probabilities such that set i makes up `shares[i]` of the samples.

    parts: uint8 (N_i, 3, H, W). Returns uint8 (N, 3, H, W) and float64 (N,), which sums to 1.
    """
    total = sum(shares)
    chances = [
        torch.full((len(part),), share / total / len(part), dtype=torch.float64)
        for part, share in zip(parts, shares, strict=True)
    ]
    return torch.cat(list(parts)), torch.cat(chances)


def labeled_sample(
    dataset: SegmentationDataset, rows: Sequence[int], size: tuple[int, int] = SIZE
) -> tuple[Tensor, Tensor]:
    """The images `rows` of a dataset and their label maps, for `watcher`.

    Returns uint8 (B, 3, H, W) and int64 (B, H, W), whole images scaled to `size`.
    """
    pairs = [dataset[row] for row in rows]
    return (
        torch.stack([resize_image(image, size) for image, _ in pairs]),
        torch.stack([resize_label(label, size) for _, label in pairs if label is not None]),
    )
