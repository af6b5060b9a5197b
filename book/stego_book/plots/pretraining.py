"""Figures of pre-training: training views and learning curves."""

from collections.abc import Mapping

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

from .style import panels, show_image

# Measurement -> its name in figures; older records lack the last.
MEASURES = {
    "kmeans_miou": "k-means, mIoU (%)",
    "linear_miou": "linear probe (labels), mIoU (%)",
    "other_miou": "linear probe of other drives (labels), mIoU (%)",
}


def matched_points(view1: Tensor, view2: Tensor, where1: Tensor, where2: Tensor) -> Figure:
    """Two crops of each image, one above the other, with the matched points; see `two_views`."""
    count, crop = len(view1), view1.shape[-1]
    figure, axes = panels(2 * count, count, size=(2.25, 2.3))
    points = [*where1, *where2]
    for axis, view, where in zip(axes, [*view1, *view2], points, strict=True):
        show_image(axis, view)
        pixels = (where + 1) / 2 * crop - 0.5
        axis.scatter(*pixels.T, s=14, color="white", edgecolor="black")
        for number, (x, y) in enumerate(pixels.tolist(), 1):
            axis.text(x + 1.5, y, str(number), color="white", fontsize=8, weight="bold")
    axes[0].set_ylabel("first crop")
    axes[count].set_ylabel("second crop")
    return figure


def learning_curves(stages: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]]) -> Figure:
    """Loss and measurements over minutes of training. stages: name -> tables of `read_curve`, in order."""
    figure, (left, right) = panels(2, size=(4.75, 3.4))
    begins = 0.0
    for number, (name, (losses, measured)) in enumerate(stages.items()):
        left.plot(begins + losses.index, losses["loss"], color="black")
        for (key, title), color, marker in zip(MEASURES.items(), sns.color_palette(), "os^", strict=False):
            if key not in measured:
                continue
            label = None if number else title.split(",")[0]
            right.plot(begins + measured.index, measured[key], marker=marker, color=color, label=label)
        if number:
            options = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "rotation": "vertical"}
            left.annotate(f"{name} stage", (begins, 0.97), (2, 0), va="top", fontsize=9, color="dimgray", **options)
            for axis in (left, right):
                axis.axvline(begins, color="gray", linestyle=":", linewidth=1)
        begins += losses.index[-1]
    left.set(title="loss", xlabel="minutes of training")
    right.set(title="mIoU (%), images not trained on", xlabel="minutes of training", ylim=(0, None))
    right.legend(fontsize=9, loc="lower left")
    return figure
