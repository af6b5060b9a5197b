"""Figures of speed: measured factors and goals, and training cost by number of images."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..studies.speed import CITYSCAPES_CROPS, Costs
from .style import panels


def cost(model: Costs, disk: float = 1e12) -> Figure:
    """Training time of each variant and size of the store by number of images. disk: disk size in bytes."""
    images = np.geomspace(1e3, 1e7, 41)
    ways: dict[str, tuple[str, Callable[[float], float]]] = {
        "published order": ("o", model.published),
        "online": ("s", model.online),
        "store": ("^", model.store),
        "store, 8 machines": ("D", lambda count: model.store(count, 8)),
    }
    figure, (time, room) = panels(2, size=(5.5, 4))
    for (name, (marker, seconds)), color in zip(ways.items(), sns.color_palette(), strict=False):
        hours = [seconds(count) / 3600 for count in images]
        time.loglog(images, hours, color=color, marker=marker, markevery=8, label=name)
    time.axvline(CITYSCAPES_CROPS, color="gray", linestyle=":", linewidth=1)
    options = {"xycoords": ("data", "axes fraction"), "rotation": 90, "ha": "right", "va": "top"}
    time.annotate("Cityscapes", (CITYSCAPES_CROPS, 0.98), fontsize=9, color="dimgray", **options)
    time.set(title="time of a training", xlabel="images", ylabel="hours")
    time.legend(fontsize=9)
    room.loglog(images, images * model.bytes / 1e9, color="black", label="full")
    room.loglog(images, images * model.compact_bytes / 1e9, color="black", linestyle=":", label="compact, at most")
    room.legend(fontsize=9)
    room.axhline(disk / 1e9, color="gray", linestyle="--", linewidth=1)
    room.annotate(f"a disk of {disk / 1e12:g} TB", (1.2e3, disk / 1e9), fontsize=9, va="bottom", color="dimgray")
    room.set(title="size of the store", xlabel="images", ylabel="GB")
    for axis in (time, room):
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    return figure


def factors(table: pd.DataFrame) -> Figure:
    """Measured factors and their goals, from the table of `speed.goals`."""
    shown = table[table["measured"].str.endswith(" x")]
    measured, goal = (pd.to_numeric(shown[name].str.removesuffix(" x")) for name in ("measured", "goal"))
    place = np.arange(len(shown))
    figure, (axis,) = panels(1, size=(9, 0.45 * len(shown) + 1.2))
    axis.barh(place, measured, color=sns.color_palette("pastel")[0], label="measured")
    axis.scatter(goal, place, color="black", marker="|", s=220, linewidth=2, label="goal", zorder=3)
    axis.axvline(1, color="gray", linewidth=1)
    axis.set_yticks(place, shown.index)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="times as fast as the baseline, same run")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure
