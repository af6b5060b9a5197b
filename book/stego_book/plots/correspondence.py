"""Figures of correspondences: heat maps of query points, correspondence tensors, precision and recall."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor

from stego_lib.loss import correspondence

from ..studies.cooccurrence import Curve
from .grids import image_grid

HEAT = "inferno"
"""Colors of heat maps; brightness rises all the way."""
MARKERS = "os^DPXv*"


def heat_maps(images: Tensor, maps: Tensor, queries: Sequence[tuple[int, int, int]], names: Sequence[str]) -> Figure:
    """One row a query: its image with the point, then every image's correspondence with it.

    images: uint8 (N, 3, H, W); maps: (N, C, h, w); queries: (image, grid row, grid column). One color scale for
    all, from the 5th percentile of what is shown to 1.
    """
    found = [
        correspondence(maps[p : p + 1, :, y : y + 1, x : x + 1].expand(len(maps), -1, -1, -1), maps)[:, 0, 0]
        for p, y, x in queries
    ]
    low = min(float(np.percentile(heat, 5)) for heat in found)
    shown = [image.permute(1, 2, 0).numpy() for image in images]
    height, width = images.shape[2:]
    figure, axes = plt.subplots(
        len(queries), 1 + len(images), figsize=(1.75 * (1 + len(images)), 1.5 * len(queries) * height / width + 0.4),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for line, marker, (p, y, x), heat in zip(axes, MARKERS, queries, found, strict=False):
        at = ((x + 0.5) * width / maps.shape[3] - 0.5, (y + 0.5) * height / maps.shape[2] - 0.5)
        line[0].imshow(shown[p])
        for axis, number in zip(line[1:], range(len(images)), strict=True):
            drawn = axis.imshow(
                heat[number], cmap=HEAT, vmin=low, vmax=1, extent=(-0.5, width - 0.5, height - 0.5, -0.5)
            )
            if number == p:
                axis.plot(*at, marker=marker, color="white", markeredgecolor="black", markersize=8)
        line[0].plot(*at, marker=marker, color="white", markeredgecolor="black", markersize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
    for axis, title in zip(axes[0], ["query", *names], strict=True):
        axis.set_title(title, fontsize=10)
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="correspondence", aspect=30)
    return figure


def step_points(rows: dict[str, Tensor], coords: dict[str, Tensor]) -> Figure:
    """Images of one training step with the points that are sampled in them.

    rows: name of a kind -> images, uint8 (N, 3, H, W); coords: the same names -> points in [-1, 1], (N, S, S, 2), as
    `loss.sample` takes them.
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
    """One panel a kind of pairs, one curve a predictor; the dotted line is what guessing gives, `chance` of each
    panel.
    """
    figure, axes = plt.subplots(1, len(curves), figsize=(4.9 * len(curves), 4), sharey=True, squeeze=False)
    styles = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)))
    for axis, (title, found) in zip(axes[0], curves.items(), strict=True):
        for color, style, (name, curve) in zip(sns.color_palette(), styles, found.items(), strict=False):
            axis.plot(
                curve.recall, curve.precision, color=color, linestyle=style, linewidth=2,
                label=f"{name}, AP {curve.average_precision:.2f}", drawstyle="steps-post",
            )  # fmt: skip
        axis.axhline(chance[title], color="0.5", linestyle=":", label=f"guessing, {chance[title]:.2f}")
        axis.set(title=title, xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
        axis.legend(fontsize=9, loc="best")
    axes[0, 0].set_ylabel("precision")
    figure.tight_layout()
    return figure


def tensors(panels: dict[str, Tensor], groups: Sequence[tuple[str, Tensor, Tensor]] = ()) -> Figure:
    """Correspondence tensors as matrices (P, Q), one panel each, blue below zero and red above, one scale for all.

    groups: (name, rows, columns), the rows and columns that belong together, in the order of the axes; lines part them.
    """
    limit = max(float(panel.abs().max()) for panel in panels.values())
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.3 * len(panels) + 0.8, 3.6), squeeze=False, layout="constrained"
    )
    for axis, (title, panel) in zip(axes[0], panels.items(), strict=True):
        drawn = axis.imshow(panel, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest", aspect="auto")
        axis.set_title(title, fontsize=11)
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
        for place, number in ((axis.axhline, 1), (axis.axvline, 2)):
            ends = np.cumsum([len(group[number]) for group in groups])
            for end in ends[:-1]:
                place(end - 0.5, color="black", linewidth=0.8)
    if groups:
        _name_groups(axes[0, 0], groups)
    figure.colorbar(drawn, ax=axes, shrink=0.85, aspect=25)
    return figure


def _name_groups(axis: plt.Axes, groups: Sequence[tuple[str, Tensor, Tensor]]) -> None:
    sizes = np.array([len(rows) for _, rows, _ in groups])
    kept = sizes > 0.04 * sizes.sum()  # a name needs room
    middles = np.cumsum(sizes) - sizes / 2 - 0.5
    axis.set_yticks(middles[kept], [name for (name, _, _), keep in zip(groups, kept, strict=True) if keep], fontsize=9)
    axis.tick_params(length=0)


def pull(feature: Sequence[float], shift: float) -> Figure:
    """The loss of one pair of points over its code correspondence S, with and without the zero clamp.

    feature: feature correspondences F, one color each; shift: b.
    """
    codes = np.linspace(-1, 1, 201)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for axis, title, values in zip(axes, ("-(F - b) S", "-(F - b) max(S, 0)"), (codes, codes.clip(0)), strict=True):
        for color, style, value in zip(sns.color_palette(), ("-", "--", "-."), feature, strict=False):
            axis.plot(
                codes, -(value - shift) * values, color=color, linestyle=style, linewidth=2, label=f"F = {value:.2f}"
            )
        axis.set(title=title, xlabel="code correspondence S")
        axis.axvline(0, color="0.5", linewidth=0.8)
    axes[0].set_ylabel("loss of the pair")
    axes[1].legend(title=f"b = {shift:.2f}", fontsize=9, loc="lower left")
    figure.tight_layout()
    return figure


def row_means(before: Tensor, after: Tensor, image: Tensor) -> Figure:
    """Mean correspondence of each position with all of the partner, before and after centering, beside the image.

    before, after: (h, w, i, j); image: uint8 (3, H, W).
    """
    means = [values.mean((2, 3)) for values in (before, after)]
    low, high = min(mean.min() for mean in means), max(mean.max() for mean in means)
    figure, axes = plt.subplots(1, 3, figsize=(8.6, 2.9), layout="constrained")
    axes[0].imshow(image.permute(1, 2, 0).numpy())
    axes[0].set_title("image", fontsize=11)
    for axis, mean, title in zip(axes[1:], means, ("row means of F", "row means of centered F"), strict=True):
        drawn = axis.imshow(mean, cmap=HEAT, vmin=low, vmax=high)
        axis.set_title(title, fontsize=11)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
    figure.colorbar(drawn, ax=axes, shrink=0.85)
    return figure
