"""Figures of datasets: crops, palettes."""

import textwrap

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from stego_lib.datasets import Classes
from stego_lib.datasets.base import SegmentationDataset
from stego_lib.datasets.crops import FiveCrop

from .style import hide_ticks, panels, show_image


def five_crop(dataset: SegmentationDataset, index: int) -> Figure:
    """An image with its five crop boxes, and the five crops."""
    crops, colors = FiveCrop(dataset), sns.color_palette()
    figure, axes = panels(6, size=(2, 2.5))
    image = dataset.image(index)
    show_image(axes[0], image, "image")
    for number, (axis, color) in enumerate(zip(axes[1:], colors, strict=False)):
        top, left, height, width = crops.boxes(index, *image.shape[1:])[number]
        inset = 0.012 * (number + 1) * width  # boxes share edges, so each is drawn slightly smaller
        corner, sides = (left + inset, top + inset), (width - 2 * inset, height - 2 * inset)
        axes[0].add_patch(Rectangle(corner, *sides, fill=False, edgecolor=color, lw=2))
        show_image(axis, crops.image(5 * index + number), f"crop {number}")
        for spine in axis.spines.values():
            spine.set(edgecolor=color, linewidth=3)
    return figure


def palettes(spaces: dict[str, Classes], columns: int = 9) -> Figure:
    """The classes of every dataset, each name on its color."""
    lines = [-(-len(classes) // columns) for classes in spaces.values()]
    height = 0.42 * sum(lines) / len(lines) + 0.3
    figure, axes = panels(len(spaces), columns=1, size=(11, height), height_ratios=lines)
    for axis, (name, classes), height in zip(axes, spaces.items(), lines, strict=True):
        for i, (class_, color) in enumerate(zip(classes.names, np.array(classes.colors) / 255, strict=True)):
            x, y = i % columns, i // columns
            axis.add_patch(Rectangle((x, y), 0.97, 0.92, facecolor=color, edgecolor="0.7"))
            ink = "black" if color @ [0.299, 0.587, 0.114] > 0.5 else "white"
            options = {"ha": "center", "va": "center", "fontsize": 9, "color": ink}
            axis.text(x + 0.485, y + 0.46, textwrap.fill(class_, 13), **options)
        hide_ticks(axis)
        axis.set(xlim=(0, columns), ylim=(height, 0))
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        sns.despine(ax=axis, left=True, bottom=True)
    return figure
