"""Label maps of large images, by a window that slides over them at their own resolution."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .datasets.transforms import resize_image, resize_label
from .predict import label_maps, refined_label_maps, working_size

if TYPE_CHECKING:
    from .run import Run

# Part of a window that lies in the next one, at least.
OVERLAP = 0.25
# Windows that go through the backbone at once.
BATCH = 8
# Pixels per side of the blocks that become labels at once (the CRF needs half a gigabyte for one), and of the margin by
# which they overlap for it.
BLOCK, MARGIN = 512, 64

Read = Callable[[int, int, int, int], Tensor]
"""Reads a part of an image: top, left, height, width in pixels -> uint8 (3, height, width)."""


@torch.inference_mode()
def label_strips(
    run: "Run", read: Read, size: tuple[int, int], tile: int, crf: bool, done: int = 0
) -> Iterator[np.ndarray]:
    """Label map of an image of any size in strips from top to bottom. Memory grows with its width, not its height.

    The codes of overlapping windows are blended on the grid with a smooth weight, so windows leave no seams. An image
    whose sides are no multiples of the patch is continued by its last pixels. The CRF works on overlapping blocks.

    Parameters
    ----------
    run
        The run.
    read
        Reads a part of the image.
    size
        Height and width of the image.
    tile
        Pixels per side of a window, brought to a size that the backbone accepts.
    crf
        Refine the labels with the CRF.
    done
        Height of the first strips together, if they are known already; they are left out.

    Yields
    ------
    numpy.ndarray
        uint8 (rows, W), ids into `run.segments`; 255 for dropped clusters.

    Examples
    --------
    >>> image = torch.zeros(3, 300, 500, dtype=torch.uint8)
    >>> read = lambda top, left, height, width: image[:, top : top + height, left : left + width]
    >>> np.concatenate(list(label_strips(run, read, (300, 500), tile=128, crf=False))).shape
    (300, 500)
    """
    patch = run.backbone.patch
    window, grid = _window_and_grid(run, size, tile)
    margin = max(1, MARGIN // patch) if crf else 1  # labels are interpolated between two cells
    step = max(1, BLOCK // patch - 2 * margin)
    start = done // patch
    first = max(0, start - margin)
    rows = _blended_maps(run, read, size, window, grid, first)
    code = next(rows)  # the rows of the grid that are needed; `first` is the number of the first
    for top in range(start, grid[0], step):
        bottom = min(top + step, grid[0])
        above, below = max(0, top - margin), min(grid[0], bottom + margin)
        code, first = code[:, above - first :], above
        while code.shape[1] < below - above:
            code = torch.cat([code, next(rows)], 1)
        strip = np.empty(((bottom - top) * patch, grid[1] * patch), np.uint8)
        for left in range(0, grid[1], step):
            right = min(left + step, grid[1])
            before, after = max(0, left - margin), min(grid[1], right + margin)
            part = code[None, :, : below - above, before:after]
            scores = run.score_maps(part)
            height, width = (below - above) * patch, (after - before) * patch
            if crf:
                image = _read_padded(read, size, above * patch, before * patch, height, width)
                labels = refined_label_maps(image, [scores], ids=run.ids)[0]
            else:
                labels = label_maps(scores, (height, width), run.ids)[0]
            y, x = (top - above) * patch, (left - before) * patch
            strip[:, left * patch : right * patch] = labels[y : y + len(strip), x : x + (right - left) * patch]
        yield strip[: size[0] - top * patch, : size[1]]


def tiled_label_map(run: "Run", image: Tensor, tile: int, crf: bool, size: int | None = None) -> np.ndarray:
    """Label map of an image, uint8 (3, H, W), by `label_strips`: uint8 (H, W).

    size: the shorter side is scaled to it first, and the labels are scaled back by their nearest pixels.
    """
    own = image.shape[1:]
    if size is not None:
        target = working_size(own[0], own[1], size, run.backbone.patch)
        image = resize_image(image, target, run.experiment.official.published)

    def read(top: int, left: int, height: int, width: int) -> Tensor:
        return image[:, top : top + height, left : left + width]

    labels = np.concatenate(list(label_strips(run, read, (image.shape[1], image.shape[2]), tile, crf)))
    return labels if size is None else resize_label(torch.from_numpy(labels), (own[0], own[1])).numpy()


def _window_and_grid(run: "Run", size: tuple[int, int], tile: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of a window, and of the grid of the image, in cells."""
    geometry = run.backbone.geometry
    cells = [math.ceil(side / geometry.patch) for side in size]
    height, width = (side // geometry.patch for side in geometry.nearest((tile, tile)))
    if geometry.only is None:
        height, width = min(height, cells[0]), min(width, cells[1])
    return (height, width), (max(cells[0], height), max(cells[1], width))


def _blended_maps(
    run: "Run", read: Read, size: tuple[int, int], window: tuple[int, int], grid: tuple[int, int], first: int
) -> Iterator[Tensor]:
    """The blended maps of all windows, (C, rows, grid width), from row `first` of the grid down; see `Run.maps`."""
    patch, device = run.backbone.patch, run.backbone.device
    fades = [torch.sin(torch.pi * (torch.arange(cells) + 0.5) / cells) ** 2 for cells in window]
    fade = (fades[0][:, None] * fades[1]).to(device)
    tops, lefts = (_starts(cells, length) for cells, length in zip(grid, window, strict=True))
    tops = [top for top in tops if top + window[0] > first]
    total = torch.empty(0)
    for top, following in zip(tops, [*tops[1:], grid[0]], strict=True):
        for some in (lefts[i : i + BATCH] for i in range(0, len(lefts), BATCH)):
            height, width = (cells * patch for cells in window)
            images = [_read_padded(read, size, top * patch, left * patch, height, width) for left in some]
            maps = run.maps(torch.stack(images))
            if not len(total):
                total = maps.new_zeros(maps.shape[1] + 1, window[0], grid[1])  # weighted maps, and weights
            for left, values in zip(some, maps, strict=True):
                part = total[:, :, left : left + window[1]]
                part[:-1] += fade * values
                part[-1] += fade
        done, skipped = following - top, max(0, first - top)  # rows that lack a window are skipped
        if skipped < done:
            yield total[:-1, skipped:done] / total[-1:, skipped:done]
        total = F.pad(total[:, done:], (0, 0, 0, done))


def _starts(cells: int, window: int) -> list[int]:
    """First cells of the windows over a line of cells, evenly spread."""
    count = 1 + math.ceil((cells - window) / max(1, int((1 - OVERLAP) * window)))
    return [round(i * (cells - window) / max(1, count - 1)) for i in range(count)]


def _read_padded(read: Read, size: tuple[int, int], top: int, left: int, height: int, width: int) -> Tensor:
    """A part that may reach beyond the lower and right border of the image, where its last pixels are repeated."""
    inside = read(top, left, min(height, size[0] - top), min(width, size[1] - left))
    down, across = height - inside.shape[1], width - inside.shape[2]
    if down or across:
        inside = F.pad(inside[None].float(), (0, across, 0, down), mode="replicate")[0].to(torch.uint8)
    return inside
