"""Grids of images and label maps."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from stego_lib.datasets import Classes, SegmentationDataset

from .style import add_legend, find_fonts, paint, show_image

WIDTH = 10.0
"""Width of a grid in inches, at most."""
GAP = 0.05
"""Inches between two images."""
DARK = 64
"""Mean of an image (of 255) below which it is shown once more, brightened."""
BRIGHTENED = 110
"""Mean that such an image gets."""

Cell: TypeAlias = np.ndarray | Tensor | None
"""An image, a label map, or nothing."""


def image_grid(
    rows: Mapping[str, Sequence[Cell]],
    classes: Sequence[Classes] = (),
    titles: Sequence[str] = (),
    *,
    brighten: bool = True,
) -> Figure:
    """Rows of images and label maps, without gaps whatever their aspect ratio.

    Parameters
    ----------
    rows
        Name of a row -> its cells: an image, uint8 (H, W, 3) or a tensor (3, H, W); a label map (H, W) of ids; None
        for an empty cell.
    classes
        Names and colors of the ids in label maps: those of the longest are painted, all are in the legend. With
        ignored pixels in a label map the legend explains their color.
    titles
        Titles of the columns.
    brighten
        Follow a row called "image" that has images with a mean below `DARK` by a row of these, brightened.
    """
    table = {
        name: [_array(cell) for cell in cells] for name, cells in (_with_brightened(rows) if brighten else rows).items()
    }
    columns = len(next(iter(table.values())))
    width = min(2.4, (WIDTH - 0.3) / columns)
    heights = [
        width * min(1.5, max(cell.shape[0] / cell.shape[1] for cell in cells if cell is not None))
        for cells in table.values()
    ]
    head = 0.24 if titles else 0.02
    size = (width * columns + GAP * (columns - 1) + 0.3, sum(heights) + GAP * (len(heights) - 1) + head)
    figure, axes = plt.subplots(
        len(table), columns, figsize=size, squeeze=False,
        gridspec_kw=dict(
            left=0.3 / size[0], right=1, bottom=0, top=1 - head / size[1], wspace=GAP / width,
            hspace=GAP / (sum(heights) / len(heights)), height_ratios=heights,
        ),
    )  # fmt: skip
    ids = max(classes, key=len) if classes else None
    for line, (name, cells), height in zip(axes, table.items(), heights, strict=True):
        for axis, cell in zip(line, cells, strict=True):
            if cell is None:
                axis.axis("off")
            else:
                show_image(axis, paint(cell, ids) if cell.ndim == 2 and ids else cell)
        font = min(11, max(7, 8.5 * height))
        first = line[0]
        first.axis("on")
        first.set(xticks=[], yticks=[])
        first.set_ylabel(name, fontsize=font, parse_math=False, fontfamily=find_fonts(name))
        if cells[0] is None:
            first.set(facecolor="none")
            for spine in first.spines.values():
                spine.set_visible(False)
    for axis, title in zip(axes[0], titles, strict=len(titles) > 0 and len(titles) == columns):
        axis.set_title(_short(title), fontsize=10, parse_math=False, fontfamily=find_fonts(title))
    maps = [cell for cells in table.values() for cell in cells if cell is not None and cell.ndim == 2]
    if ids and maps:
        add_legend(figure, *classes, ignored=any(((cell < 0) | (cell >= len(ids))).any() for cell in maps))
    return figure


def _array(cell: Cell) -> np.ndarray | None:
    if cell is None:
        return None
    array = np.asarray(cell)
    return np.moveaxis(array, 0, -1) if isinstance(cell, Tensor) and array.ndim == 3 else array


def _with_brightened(rows: Mapping[str, Sequence[Cell]]) -> dict[str, Sequence[Cell]]:
    """The rows, with one of brightened images behind that of images if any of these is dark."""
    found: dict[str, Sequence[Cell]] = {}
    for name, cells in rows.items():
        found[name] = cells
        images = [_array(cell) for cell in cells]
        if name == "image" and any(image is not None and image.mean() < DARK for image in images):
            found["brightened"] = [
                None if image is None or image.mean() >= DARK else brightened(image) for image in images
            ]
    return found


def brightened(image: np.ndarray) -> np.ndarray:
    """A dark image, uint8 (H, W, 3), with gamma so that its mean is about `BRIGHTENED`."""
    gamma = np.log(BRIGHTENED / 255) / np.log(max(image.mean(), 1) / 255)
    return np.round(255 * (image / 255) ** gamma).astype(np.uint8)


def _short(title: str) -> str:
    """A title that fits a column; a long one is cut at its front."""
    return title if len(title) <= 20 else f"…{title[-19:]}"


def examples(dataset: SegmentationDataset, indices: Sequence[int]) -> Figure:
    """Images above their label maps, with the classes as legend; images alone where there are no labels."""
    pairs = [dataset[index] for index in indices]
    rows: dict[str, Sequence[Cell]] = {"image": [image for image, _ in pairs]}
    if dataset.has_labels:
        rows["label"] = [label for _, label in pairs]
    return image_grid(
        rows, [dataset.classes] if dataset.has_labels else [], [dataset.names[index] for index in indices]
    )


def evenly(dataset: SegmentationDataset, count: int = 6) -> range:
    """Numbers of `count` images that lie evenly over a dataset; of all, where there are fewer."""
    return range(0, len(dataset), max(1, len(dataset) // count))[:count]


def nearest_images(dataset: SegmentationDataset, neighbors: Tensor, queries: Sequence[int], count: int = 5) -> Figure:
    """One row an image: itself, then its nearest neighbors, the nearest first. neighbors: int64 (N, k)."""
    count = min(count, neighbors.shape[1])
    rows = {
        dataset.names[query]: [dataset.image(index) for index in (query, *neighbors[query, :count].tolist())]
        for query in queries
    }
    figure = image_grid(rows, titles=["image", *(f"neighbor {i + 1}" for i in range(count))])
    for axis in figure.axes[:: count + 1]:
        for spine in axis.spines.values():
            spine.set(edgecolor="black", linewidth=2.5)
    return figure
