"""Figures of correspondences: heat maps of query points, correspondence tensors, precision and recall."""

from collections.abc import Sequence

import numpy as np
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor

from stego_lib.loss import correspondence

from ..studies.cooccurrence import Curve
from .grids import image_grid
from .style import hide_ticks, panels, show_image

# Colormap of heat maps, with monotonic brightness.
HEAT = "inferno"
MARKERS = "os^DPXv*"
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)))


def heat_maps(images: Tensor, maps: Tensor, queries: Sequence[tuple[int, int, int]], names: Sequence[str]) -> Figure:
    """One row per query: its image with the query point, then the correspondence of every image with it.

    images: uint8 (N, 3, H, W); maps: (N, C, h, w); queries: (image, grid row, grid column). All heat maps share one
    color scale, from the 5th percentile of their values to 1.
    """
    heats = []
    for number, y, x in queries:
        query = maps[number : number + 1, :, y : y + 1, x : x + 1].expand(len(maps), -1, -1, -1)
        heats.append(correspondence(query, maps)[:, 0, 0])
    low = min(float(np.percentile(heat, 5)) for heat in heats)
    height, width = images.shape[2:]
    columns = 1 + len(images)
    size = (1.75, 1.5 * height / width + 0.4 / len(queries))
    figure, axes = panels(len(queries) * columns, columns, size=size)
    for row, (number, y, x) in enumerate(queries):
        first, *others = axes[row * columns : (row + 1) * columns]
        show_image(first, images[number])
        for axis, heat in zip(others, heats[row], strict=True):
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            drawn = axis.imshow(heat, cmap=HEAT, vmin=low, vmax=1, extent=extent)
            hide_ticks(axis)
        at = ((x + 0.5) * width / maps.shape[3] - 0.5, (y + 0.5) * height / maps.shape[2] - 0.5)
        for axis in (first, others[number]):
            axis.plot(*at, marker=MARKERS[row], color="white", markeredgecolor="black", markersize=8)
    for axis, title in zip(axes, ["query", *names], strict=False):
        axis.set_title(title, fontsize=10)
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="correspondence", aspect=30)
    return figure


def step_points(rows: dict[str, Tensor], coords: dict[str, Tensor]) -> Figure:
    """Images of one training step with their sampled points.

    rows: row name -> images, uint8 (N, 3, H, W); coords: row name -> points in [-1, 1], (N, S, S, 2), as for
    `loss.sample`.
    """
    figure = image_grid({name: list(images) for name, images in rows.items()}, brighten=False)
    axes = iter(figure.axes)
    for color, (name, images) in zip(sns.color_palette(), rows.items(), strict=False):
        height, width = images.shape[2:]
        for axis, points in zip(axes, coords[name], strict=False):
            x, y = ((points.flatten(0, 1) + 1) / 2 * torch.tensor([width - 1, height - 1])).T
            axis.scatter(x, y, s=14, color=color, edgecolor="white", linewidth=0.5)
    return figure


def precision_recall(curves: dict[str, dict[str, Curve]], chance: dict[str, float]) -> Figure:
    """One panel per kind of pairs, one curve per predictor; the dotted line is guessing, `chance`."""
    figure, axes = panels(len(curves), size=(4.9, 4), sharey=True)
    for axis, (title, predictors) in zip(axes, curves.items(), strict=True):
        for color, line, (name, curve) in zip(sns.color_palette(), LINES, predictors.items(), strict=False):
            options = {"color": color, "linestyle": line, "linewidth": 2, "drawstyle": "steps-post"}
            axis.plot(curve.recall, curve.precision, label=f"{name}, AP {curve.average_precision:.2f}", **options)
        axis.axhline(chance[title], color="0.5", linestyle=":", label=f"guessing, {chance[title]:.2f}")
        axis.set(title=title, xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
        axis.legend(fontsize=9, loc="best")
    axes[0].set_ylabel("precision")
    return figure


def tensors(matrices: dict[str, Tensor], groups: Sequence[tuple[str, Tensor, Tensor]] = ()) -> Figure:
    """Correspondence tensors as matrices (P, Q), one panel each, blue below zero and red above, with a common scale.

    groups: (name, rows, columns) of each group, in the order of the axes; lines separate them.
    """
    limit = max(float(matrix.abs().max()) for matrix in matrices.values())
    figure, axes = panels(len(matrices), size=(3.3 + 0.8 / len(matrices), 3.6))
    row_ends, column_ends = (np.cumsum([len(group[part]) for group in groups]) for part in (1, 2))
    for axis, (title, matrix) in zip(axes, matrices.items(), strict=True):
        drawn = axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest", aspect="auto")
        axis.set_title(title, fontsize=11)
        hide_ticks(axis)
        for end in row_ends[:-1]:
            axis.axhline(end - 0.5, color="black", linewidth=0.8)
        for end in column_ends[:-1]:
            axis.axvline(end - 0.5, color="black", linewidth=0.8)
    named = [
        (end - len(rows) / 2 - 0.5, name)
        for end, (name, rows, _) in zip(row_ends, groups, strict=True)
        if len(rows) > 0.04 * row_ends[-1]
    ]  # only groups with space for their name
    axes[0].set_yticks([middle for middle, _ in named], [name for _, name in named], fontsize=9)
    axes[0].tick_params(length=0)
    figure.colorbar(drawn, ax=axes, shrink=0.85, aspect=25)
    return figure
