"""Grids of images and label maps."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from stego_lib.datasets import Classes
from stego_lib.datasets.base import SegmentationDataset
from stego_lib.datasets.classes import DEFAULT, Rules
from stego_lib.datasets.images import as_tensor
from stego_lib.utils.errors import StegoError

from .style import add_legend, hide_ticks, paint, show_image

# Inches: maximal width of a grid; gap between images; left margin.
WIDTH, GAP, LEFT = 10.0, 0.05, 0.3
# Images with a mean below the first value (of 255) are also shown brightened to the second.
DARK, BRIGHTENED = 64, 110
# An image, a label map, or nothing.
Cell: TypeAlias = np.ndarray | Tensor | None


def image_grid(
    rows: Mapping[str, Sequence[Cell]],
    classes: Sequence[Classes] = (),
    titles: Sequence[str] = (),
    *,
    brighten: bool = True,
) -> Figure:
    """Rows of images and label maps, without gaps for any aspect ratio.

    Parameters
    ----------
    rows
        Row name -> cells: an image, uint8 (H, W, 3) or a tensor (3, H, W); a label map (H, W) of ids; None for an
        empty cell.
    classes
        Names and colors of the ids in label maps: the longest colors the maps, all are in the legend. If a label
        map has ignored pixels, the legend explains their color.
    titles
        Titles of the columns.
    brighten
        Add a row of brightened images below the row "image" if at least a third of its images have a mean below `DARK`.
    """
    table = {name: [_array(cell) for cell in cells] for name, cells in rows.items()}
    if brighten and "image" in table:
        bright = [None if cell is None or cell.mean() >= DARK else brightened(cell) for cell in table["image"]]
        if 3 * sum(cell is not None for cell in bright) >= len(bright):
            table = {"image": table.pop("image"), "brightened": bright} | table
    columns = len(next(iter(table.values())))
    width = min(2.4, (WIDTH - LEFT) / columns)
    ratios = [max(cell.shape[0] / cell.shape[1] for cell in cells if cell is not None) for cells in table.values()]
    heights = [width * min(1.5, ratio) for ratio in ratios]
    head = 0.24 if titles else 0.02
    size = (width * columns + GAP * (columns - 1) + LEFT, sum(heights) + GAP * (len(heights) - 1) + head)
    layout = {"left": LEFT / size[0], "right": 1, "bottom": 0, "top": 1 - head / size[1], "wspace": GAP / width}
    layout |= {"hspace": GAP * len(heights) / sum(heights), "height_ratios": heights}
    figure, axes = plt.subplots(len(table), columns, figsize=size, squeeze=False, gridspec_kw=layout)
    ids = max(classes, key=len) if classes else None
    for line, (name, cells), height in zip(axes, table.items(), heights, strict=True):
        for axis, cell in zip(line, cells, strict=True):
            hide_ticks(axis)
            if cell is None:
                axis.set(facecolor="none")
                axis.spines[:].set_visible(False)
            else:
                show_image(axis, paint(cell, ids) if cell.ndim == 2 and ids else cell)
        line[0].set_ylabel(name, fontsize=min(11, max(7, 8.5 * height)))
    for axis, title in zip(axes[0], titles, strict=bool(titles)):
        short = title if len(title) <= 20 else f"…{title[-19:]}"
        axis.set_title(short, fontsize=10)
    maps = [cell for cells in table.values() for cell in cells if cell is not None and cell.ndim == 2]
    if ids and maps:
        add_legend(figure, *classes, ignored=any(((cell < 0) | (cell >= len(ids))).any() for cell in maps))
    return figure


def first_images(paths: Sequence[Path], count: int = 6, rules: Rules = DEFAULT) -> dict[Path, np.ndarray]:
    """Path -> image, uint8 (H, W, 3), for the first `count` readable images; see `as_tensor`.

    Raises StegoError if no image is readable.
    """
    images: dict[Path, np.ndarray] = {}
    for path in paths:
        with suppress(StegoError):
            images[path] = as_tensor(path, rules)[0].movedim(0, -1).numpy()
        if len(images) == count:
            break
    if not images:
        as_tensor(paths[0], rules)  # raises the error with the reason
    return images


def _array(cell: Cell) -> np.ndarray | None:
    if cell is None:
        return None
    array = np.asarray(cell)
    return np.moveaxis(array, 0, -1) if isinstance(cell, Tensor) and array.ndim == 3 else array


def brightened(image: np.ndarray) -> np.ndarray:
    """A dark image, uint8 (H, W, 3), gamma-corrected to a mean of about `BRIGHTENED`."""
    gamma = np.log(BRIGHTENED / 255) / np.log(max(image.mean(), 1) / 255)
    return np.round(255 * (image / 255) ** gamma).astype(np.uint8)


def examples(dataset: SegmentationDataset, indices: Sequence[int]) -> Figure:
    """Images above their label maps, with a legend of the classes; only images if there are no labels."""
    images, labels = zip(*(dataset[index] for index in indices), strict=True)
    rows: dict[str, Sequence[Cell]] = {"image": images} | ({"label": labels} if dataset.has_labels else {})
    return image_grid(rows, [dataset.classes], [dataset.names[index] for index in indices])


def evenly(dataset: SegmentationDataset, count: int = 6) -> range:
    """Indices of `count` evenly spaced images of a dataset (all if there are fewer)."""
    return range(0, len(dataset), max(1, len(dataset) // count))[:count]


def nearest_images(dataset: SegmentationDataset, neighbors: Tensor, queries: Sequence[int], count: int = 5) -> Figure:
    """One row per image: the image, then its nearest neighbors, nearest first. neighbors: int64 (N, k)."""
    count = min(count, neighbors.shape[1])
    rows = {
        dataset.names[query]: [dataset.image(index) for index in (query, *neighbors[query, :count].tolist())]
        for query in queries
    }
    figure = image_grid(rows, titles=["image", *(f"neighbor {i + 1}" for i in range(count))])
    for axis in figure.axes[:: count + 1]:
        axis.spines[:].set(edgecolor="black", linewidth=2.5)
    return figure
