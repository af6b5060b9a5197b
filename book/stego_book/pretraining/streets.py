"""Images of `photos_vit_tiny8_d6`: CamVid's training frames, photographs, and held-out frames."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stego_lib.datasets.base import SegmentationDataset
from stego_lib.utils.notices import notice

from .images import labeled_sample, mixture, read_photographs
from .recipe import PHOTOS_SHARES
from .watching import watcher

# Frames for fitting the probes, per held-out frame.
FITTED = 2.5
# The probes are fitted on every n-th token.
EVERY = 10


@dataclass(frozen=True)
class Streets:
    """Images (uint8, (N, 3, H, W)) with sampling weights for `pretrain`, and a `watcher` of held-out frames."""

    images: Tensor
    chances: Tensor
    watch: Callable[[nn.Module, int], dict[str, float]]


def read_streets(dataset: SegmentationDataset, root: Path, held_out: int, folders: Sequence[str]) -> Streets:
    """Reads CamVid's training frames, except about `held_out` of them, and the photographs in `folders` below `root`.

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
    pairs = labeled_sample(dataset, fitted + held)
    watch = watcher(*pairs, len(dataset.classes), batch=8, every=EVERY, fitted=len(fitted), drives=drives)
    return Streets(images, chances, watch)


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
