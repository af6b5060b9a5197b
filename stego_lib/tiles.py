"""Label maps of images for `Run.predict`: of the whole image, or by a sliding window."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .annotations.names import NO_SEGMENT
from .backbone import Backbone
from .datasets.images import as_tensor
from .datasets.transforms import resize_label
from .networks.geometry import MAX_SIDE, Geometry
from .predict import Upsampler, image_scores, label_maps, refined_label_maps, resized, uses_crf
from .utils.errors import StegoError
from .utils.files import fingerprint
from .utils.torch_state import usual_modes

if TYPE_CHECKING:
    from .run import Run

# Minimum overlap of adjacent windows, relative to their size.
OVERLAP = 0.25
# Windows per batch of the backbone.
BATCH = 8
# Side in pixels of the blocks for computing labels (the CRF needs half a gigabyte for one), and of their overlap for
# the CRF.
STRIP_BLOCK, MARGIN = 512, 64

Read = Callable[[int, int, int, int], Tensor]
"""Reads a part of an image: top, left, height, width in pixels -> uint8 (3, height, width)."""


@torch.inference_mode()
def label_strips(
    run: "Run", read: Read, size: tuple[int, int], tile: int, crf: bool, done: int = 0
) -> Iterator[np.ndarray]:
    """Label map of an image of any size in strips from top to bottom, uint8 (rows, W), with ids of `run.ids`.

    Codes of overlapping windows are blended with smooth weights, to avoid seams. Images are padded to multiples of the
    patch by replicating border pixels. The CRF is applied to overlapping blocks. Memory does not depend on the height.

    read, size: the image, and its height and width. tile: side of a window in pixels, rounded to a size that the
    backbone accepts. done: total height of finished strips, which are skipped.
    """
    patch, ids = run.backbone.patch, run.ids
    _, grid = _window_and_grid(run.backbone.geometry, size, tile)
    margin = max(1, MARGIN // patch) if crf else 1  # for interpolation
    step = max(1, STRIP_BLOCK // patch - 2 * margin)
    start = done // patch
    first = max(0, start - margin)
    rows = blended_rows(run.maps, run.backbone.geometry, read, size, tile, first)
    code = next(rows)  # rows of the grid from `first` on
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
                labels = refined_label_maps(image, [scores], ids=ids)[0]
            else:
                labels = label_maps(scores, (height, width), ids)[0]
            y, x = (top - above) * patch, (left - before) * patch
            strip[:, left * patch : right * patch] = labels[y : y + len(strip), x : x + (right - left) * patch]
        yield strip[: size[0] - top * patch, : size[1]]


@usual_modes()
@torch.inference_mode()
def predict(
    run: "Run", images: Any, refine: str | None, size: int | None, tile: int | None, upsampler: Upsampler | None
) -> Any:
    """See `Run.predict`."""
    if isinstance(images, list | tuple):
        return [predict(run, image, refine, size, tile, upsampler) for image in images]
    crf = uses_crf(run, refine)
    for name, value in {"size": size, "tile": tile}.items():
        if value is not None and not (isinstance(value, int) and 8 <= value <= MAX_SIDE):
            raise StegoError(f"{name}={value!r} must be a number of pixels from 8 to {MAX_SIDE}.")
    if tile is not None and upsampler is not None:
        raise StegoError("tile and upsampler cannot be combined. Leave one of them out.")
    run.check_fitted()
    image, transparent = as_tensor(images, run.classes.rules)
    shape = image.shape[1], image.shape[2]
    if tile is not None:
        # Labels of a resized image are resized back by nearest neighbor.
        image = image if size is None else resized(run, image, size)
        strips = label_strips(run, _reader(image), (image.shape[1], image.shape[2]), tile, crf)
        labels = resize_label(torch.from_numpy(np.concatenate(list(strips))), shape).numpy()
    else:
        scores = image_scores(run, image, size, upsampler)
        maps = refined_label_maps(image, [scores], ids=run.ids) if crf else label_maps(scores, shape, run.ids)
        labels = maps[0].numpy()
    if transparent is not None:
        labels[transparent] = NO_SEGMENT
    return labels


def _window_and_grid(geometry: Geometry, size: tuple[int, int], tile: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sizes of a window and of the grid of the image in cells."""
    cells = [math.ceil(side / geometry.patch) for side in size]
    accepted = geometry.nearest(tile)
    sides = accepted if isinstance(accepted, tuple) else (accepted, accepted)
    height, width = (side // geometry.patch for side in sides)
    if geometry.fixed_size is None:
        height, width = min(height, cells[0]), min(width, cells[1])
    return (height, width), (max(cells[0], height), max(cells[1], width))


def blended_rows(
    compute: Callable[[Tensor], Tensor],
    geometry: Geometry,
    read: Read,
    size: tuple[int, int],
    tile: int,
    first: int = 0,
) -> Iterator[Tensor]:
    """Blends the maps of windows: yields (C, rows, grid width) from row `first` on.

    compute: uint8 windows (B, 3, h, w) -> codes or features. geometry: of the backbone. For read, size and tile see
    `label_strips`.
    """
    patch, (window, grid) = geometry.patch, _window_and_grid(geometry, size, tile)
    fades = [torch.sin(torch.pi * (torch.arange(cells) + 0.5) / cells) ** 2 for cells in window]
    fade = fades[0][:, None] * fades[1]
    tops, lefts = (window_starts(cells, length) for cells, length in zip(grid, window, strict=True))
    tops = [top for top in tops if top + window[0] > first]
    total = torch.zeros(0)  # weighted maps and, as the last channel, weights of unfinished rows
    for top, following in zip(tops, [*tops[1:], grid[0]], strict=True):
        for batch in (lefts[i : i + BATCH] for i in range(0, len(lefts), BATCH)):
            height, width = (cells * patch for cells in window)
            images = [_read_padded(read, size, top * patch, left * patch, height, width) for left in batch]
            for left, maps in zip(batch, compute(torch.stack(images)), strict=True):
                if not total.numel():
                    total, fade = maps.new_zeros(len(maps) + 1, window[0], grid[1]), fade.to(maps)
                part = total[:, :, left : left + window[1]]
                part[:-1] += fade * maps
                part[-1] += fade
        done, skipped = following - top, max(0, first - top)  # rows above `first` are incomplete
        if skipped < done:
            yield total[:-1, skipped:done] / total[-1:, skipped:done]
        total = F.pad(total[:, done:], (0, 0, 0, done))


class TiledBackbone(Backbone):
    """A backbone with a sliding window, whose features are blended. It shares the weights of another backbone."""

    def __init__(self, backbone: Backbone, tile: int):
        nn.Module.__init__(self)
        self.__dict__.update(backbone.__dict__)
        self.tile = tile

    def forward(self, images: Tensor) -> Tensor:
        """See `Backbone.forward`."""
        size, whole = (images.shape[2], images.shape[3]), super().forward
        rows = [blended_rows(whole, self.geometry, _reader(image), size, self.tile) for image in images]
        return torch.stack([torch.cat(list(parts), 1) for parts in rows])

    def fingerprint(self) -> str:
        return fingerprint(super().fingerprint(), self.tile)


def window_starts(cells: int, window: int) -> list[int]:
    """First cells of evenly spaced windows along a line of cells."""
    count = 1 + math.ceil((cells - window) / max(1, int((1 - OVERLAP) * window)))
    return [round(i * (cells - window) / max(1, count - 1)) for i in range(count)]


def _reader(image: Tensor) -> Read:
    """A `Read` function for an image in memory, uint8 (3, H, W)."""
    return lambda top, left, height, width: image[:, top : top + height, left : left + width]


def _read_padded(read: Read, size: tuple[int, int], top: int, left: int, height: int, width: int) -> Tensor:
    """Reads a part of an image and replicates pixels beyond the lower and right border."""
    inside = read(top, left, min(height, size[0] - top), min(width, size[1] - left))
    down, across = height - inside.shape[1], width - inside.shape[2]
    if down or across:
        inside = F.pad(inside[None].float(), (0, across, 0, down), mode="replicate")[0].to(torch.uint8)
    return inside
