"""Figures of images and labels: crops, neighbors, palettes, label maps from stage to stage."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from ..datasets import Classes, FiveCrop, SegmentationDataset
from ..runtime.errors import StegoError
from .figures import add_legend, find_fonts, paint, show_image


def five_crop(dataset: SegmentationDataset, index: int) -> Figure:
    """An image with the five boxes, and the five images that they make of it."""
    crops, colors = FiveCrop(dataset), sns.color_palette()
    figure, axes = plt.subplots(1, 6, figsize=(12, 2.5))
    image = dataset.image(index)
    show_image(axes[0], image.permute(1, 2, 0).numpy(), "image")
    for number, (axis, color) in enumerate(zip(axes[1:], colors, strict=False)):
        top, left, height, width = crops.boxes(index, *image.shape[1:])[number]
        inset = 0.012 * (number + 1) * width  # boxes share edges, so each is drawn a little further in
        axes[0].add_patch(
            Rectangle(
                (left + inset, top + inset), width - 2 * inset, height - 2 * inset, fill=False, edgecolor=color, lw=2
            )
        )
        show_image(axis, crops.image(5 * index + number).permute(1, 2, 0).numpy(), f"crop {number}")
        for spine in axis.spines.values():
            spine.set(edgecolor=color, linewidth=3)
    figure.tight_layout()
    return figure


def label_files(files: Sequence[Path], classes: Classes, dataset: SegmentationDataset | None = None) -> Figure:
    """One column a label map that `segment_folder` wrote; with their dataset, below each image and its own label map.

    Raises StegoError for a file that is called like no image of the dataset.
    """
    rows = ["image", "label", "segments"] if dataset else ["segments"]
    figure, axes = plt.subplots(len(rows), len(files), figsize=(2.6 * len(files), 2.0 * len(rows)), squeeze=False)
    for column, file in zip(axes.T, files, strict=True):
        if dataset:
            if file.stem not in dataset.names:
                raise StegoError(
                    f"{file} is called like no image of {dataset.name} {dataset.split}; name its dataset"
                )
            image, label = dataset[dataset.names.index(file.stem)]
            show_image(column[0], image.permute(1, 2, 0).numpy())
            if label is not None:
                show_image(column[1], paint(label, classes))
        with Image.open(file) as stored:
            show_image(column[-1], paint(np.asarray(stored).astype(int), classes))
        column[-1].set_xlabel(file.stem, fontsize=9, parse_math=False, fontfamily=find_fonts(file.stem))
    for axis, text in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(text, fontsize=12)
    add_legend(figure, classes)
    return figure


def nearest_images(dataset: SegmentationDataset, neighbors: Tensor, queries: Sequence[int], count: int = 5) -> Figure:
    """One row an image: itself, then its nearest neighbors, the nearest first. neighbors: int64 (N, k)."""
    count = min(count, neighbors.shape[1])
    figure, axes = plt.subplots(
        len(queries), count + 1, figsize=(1.75 * (count + 1), 1.85 * len(queries)), squeeze=False
    )
    for row, query in zip(axes, queries, strict=True):
        for axis, index in zip(row, [query, *neighbors[query, :count].tolist()], strict=True):
            show_image(axis, dataset.image(index).permute(1, 2, 0).numpy())
        for spine in row[0].spines.values():
            spine.set(edgecolor="black", linewidth=2.5)
        name = dataset.names[query]
        row[0].set_ylabel(name, fontsize=11, parse_math=False, fontfamily=find_fonts(name))
    for axis, title in zip(axes[0], ["image", *(f"neighbor {i + 1}" for i in range(count))], strict=True):
        axis.set_title(title, fontsize=11)
    figure.tight_layout()
    return figure


def shared_content(values: dict[str, Tensor]) -> Figure:
    """Histograms of `neighbors.shared_content`, one per kind of partner, each with its mean."""
    figure, axis = plt.subplots(figsize=(7, 3))
    bins = np.linspace(0, 1, 26)
    for color, (name, found) in zip(sns.color_palette(), values.items(), strict=False):
        label = f"{name}: mean {found.mean():.2f}"
        axis.hist(found.flatten().numpy(), bins, density=True, alpha=0.55, color=color, label=label)
        axis.axvline(found.mean(), color=color, linestyle="--")
    axis.set(xlabel="content that image and partner share", ylabel="density", xlim=(0, 1))
    axis.legend()
    figure.tight_layout()
    return figure


def palettes(spaces: dict[str, Classes], columns: int = 9) -> Figure:
    """The classes of every dataset, each name on its color."""
    lines = [-(-len(classes) // columns) for classes in spaces.values()]
    find_fonts(*(name for classes in spaces.values() for name in classes.names))
    figure, axes = plt.subplots(
        len(spaces), figsize=(11, 0.42 * sum(lines) + 0.3 * len(lines)), gridspec_kw={"height_ratios": lines}
    )
    for axis, (name, classes), height in zip(np.atleast_1d(axes), spaces.items(), lines, strict=True):
        for i, (class_, color) in enumerate(zip(classes.names, np.array(classes.colors) / 255, strict=True)):
            x, y = i % columns, i // columns
            axis.add_patch(Rectangle((x, y), 0.97, 0.92, facecolor=color, edgecolor="0.7"))
            ink = "black" if color @ [0.299, 0.587, 0.114] > 0.5 else "white"
            words = textwrap.fill(class_, 13)
            axis.text(x + 0.485, y + 0.46, words, ha="center", va="center", fontsize=9, color=ink, parse_math=False)
        axis.set(xlim=(0, columns), ylim=(height, 0), xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.grid(visible=False)
        sns.despine(ax=axis, left=True, bottom=True)
    figure.tight_layout()
    return figure


def stages(images: Sequence[np.ndarray], maps: dict[str, Sequence[np.ndarray]], classes: Classes) -> Figure:
    """One column an image, uint8 (H, W, 3), and below it its label maps, one row a stage, in the colors of the classes."""
    rows = len(maps) + 1
    figure, axes = plt.subplots(rows, len(images), figsize=(2.1 * len(images), 2.15 * rows), squeeze=False)
    for axis, image in zip(axes[0], images, strict=True):
        show_image(axis, image)
    for line, label_maps in zip(axes[1:], maps.values(), strict=True):
        for axis, label in zip(line, label_maps, strict=True):
            show_image(axis, paint(label, classes))
    for axis, name in zip(axes[:, 0], ["image", *maps], strict=True):
        axis.set_ylabel(name, fontsize=12)
    add_legend(figure, classes)
    return figure
