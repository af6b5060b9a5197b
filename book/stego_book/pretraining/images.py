"""Images for pre-training: synthetic scenes, or CamVid's training frames and photographs, as a tensor."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from stego_lib.datasets import painter
from stego_lib.datasets.base import SegmentationDataset
from stego_lib.datasets.images import read_image
from stego_lib.datasets.layout import list_images
from stego_lib.datasets.transforms import resize_image, resize_label
from stego_lib.utils.errors import StegoError
from stego_lib.utils.notices import notice
from stego_lib.utils.paths import user_path
from stego_lib.utils.progress import progress

from .recipe import PHOTOS_SHARES
from .watching import watcher

# Height and width of resized photographs.
SIZE = (240, 320)
# Frames for fitting the probes, per held-out frame; they are fitted on every n-th token.
FITTED, EVERY = 2.5, 10


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


def read_streets(
    dataset: SegmentationDataset, root: Path, held_out: int, folders: Sequence[str]
) -> tuple[Tensor, Tensor, Callable[[nn.Module, int], dict[str, float]]]:
    """Reads CamVid's training frames, except about `held_out` of them, and the photographs in `folders` below `root`.

    Returns images, uint8 (N, 3, H, W), and their sampling weights for `pretrain`, and a `watcher` of held-out frames.
    Validation and test images are not read. The first folder is required; a notice names other missing folders.
    """
    learned, held = hold_out(dataset, held_out)
    frames = read_photographs(dataset.images[0].parent)[learned]
    present = [folders[0], *(name for name in folders[1:] if (root / name).is_dir())]
    if missing := sorted(set(folders) - set(present)):
        notice(f"{', '.join(missing)} is missing in {root}. The recipe uses more photographs.")
    images, chances = mixture([frames, torch.cat([read_photographs(root / name) for name in present])], PHOTOS_SHARES)
    fitted = learned[:: max(1, len(learned) // round(FITTED * len(held)))]
    drives = [_drive(dataset.images[row]) for row in fitted + held]
    pairs = [dataset[row] for row in fitted + held]
    frames = torch.stack([resize_image(image, SIZE) for image, _ in pairs])
    labels = torch.stack([resize_label(label, SIZE) for _, label in pairs if label is not None])
    n_classes, fit = len(dataset.classes), len(fitted)
    return images, chances, watcher(frames, labels, n_classes, batch=8, every=EVERY, fitted=fit, drives=drives)


def hold_out(dataset: SegmentationDataset, count: int) -> tuple[list[int], list[int]]:
    """Training rows and held-out rows: the last frames of each sequence, about `count` in all, at most a third.

    The part of a file name before the first underscore, such as 0016E5, is the name of the sequence.
    """
    drives: dict[str, list[int]] = {}
    for row, path in enumerate(dataset.images):
        drives.setdefault(_drive(path), []).append(row)
    share = min(count / len(dataset), 1 / 3)
    held = [row for rows in drives.values() for row in rows[len(rows) - round(share * len(rows)) :]]
    held = held or [len(dataset) - 1]
    return [row for row in range(len(dataset)) if row not in held], held


def _drive(path: Path) -> str:
    return path.stem.split("_")[0]
