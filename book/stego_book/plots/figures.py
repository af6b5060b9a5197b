"""Figures of runs and records. Each function takes data and returns a matplotlib Figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from stego_lib.datasets.classes import distinct_names
from stego_lib.run import Run

from ..studies.results import METHODS, method_names, score_table, scored
from .style import as_they_are, bars_and_dots, find_fonts, panels

# Pair type in the loss -> its name in figures.
KINDS = {"self": "self", "knn": "nearest neighbor", "rand": "random"}


def correspondences(run: Run) -> Figure:
    """Histograms of the feature correspondences of each pair type; values above the shift attract."""
    measured = run.correspondences
    edges = np.array(measured["edges"])
    figure, axes = panels(3, size=(3.2, 2.8))
    for axis, color, (kind, name), shift in zip(axes, sns.color_palette(), KINDS.items(), run.shifts, strict=False):
        above, heights = edges[:-1] >= shift, np.array(measured[kind])
        options = {"width": np.diff(edges), "align": "edge", "linewidth": 0, "color": color}
        axis.bar(edges[:-1], np.where(above, 0, heights), alpha=0.35, **options)
        axis.bar(edges[:-1], np.where(above, heights, 0), **options)
        axis.axvline(shift, color="black", linestyle="--")
        title = f"{name} pairs\nshift {shift:.2f}"
        axis.set(title=title, xlabel="feature correspondence", xlim=(-1, 1), yticks=[])
        axis.set_ylim(top=1.22 * max(heights.max(), 1e-9))
        place = {"va": "top", "fontsize": 9, "style": "italic", "transform": axis.get_xaxis_transform()}
        axis.text(shift - 0.04, 0.97, "repel", ha="right", **place)
        axis.text(shift + 0.04, 0.97, "attract", ha="left", **place)
    axes[0].set_ylabel("density")
    return figure


def curves(log: pd.DataFrame, span: int = 20) -> Figure:
    """Loss and mean code correspondence of each pair type, and losses of joint probes, by step.

    For a successor of STEGO, the terms of its loss. Faint: every step. Strong: exponential moving average over about
    `span` steps.
    """
    if "loss_self" in log:
        probes = [name for name in ("cluster", "linear") if f"loss_{name}" in log and log[f"loss_{name}"].notna().any()]
        lines = {
            "correspondence loss": {f"loss_{kind}": name for kind, name in KINDS.items()},
            "mean code correspondence": {f"code_{kind}": name for kind, name in KINDS.items()},
            "loss of the probes": {f"loss_{name}": name for name in probes},
        }
        lines = {title: columns for title, columns in lines.items() if columns}
    else:
        lines = {str(name).replace("_", " "): {name: ""} for name in log}
    colors = dict(zip([*KINDS.values(), "cluster", "linear"], sns.color_palette(), strict=False))
    figure, axes = panels(len(lines), size=(3.5, 3.1))
    for axis, (title, columns) in zip(axes, lines.items(), strict=True):
        for column, name in columns.items():
            color = colors.get(name, sns.color_palette()[0])
            axis.plot(log[column], color=color, alpha=0.25, linewidth=0.8)
            axis.plot(log[column].ewm(span=span).mean(), color=color, label=name)
        axis.set(title=title, xlabel="step")
        if all(columns.values()):
            axis.legend(fontsize=8)
    return figure


def score_bars(record: dict[str, Any]) -> Figure:
    """Accuracy and mIoU of every method in a run record; StegoError for one without scores."""
    names, scores = method_names(record), scored(record)["scores"]
    methods = [method for method in METHODS if method in scores]
    colors = [sns.color_palette()[0 if METHODS[method].startswith("STEGO") else 7] for method in methods]
    figure, axes = panels(2, size=(5, 0.42 * len(methods) + 1.2), sharey=True)
    for axis, (score, title) in zip(axes, {"accuracy": "accuracy (%)", "miou": "mean IoU (%)"}.items(), strict=True):
        values = [scores[method][score] for method in methods]
        bars = axis.barh([names[method] for method in methods], values, color=colors)
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
        axis.set(title=title, xlim=(0, 100))
        axis.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    return figure


def spread(records: list[dict[str, Any]]) -> Figure:
    """mIoU of every method: one dot per seed, the mean as a bar."""
    names = method_names(records[0])
    table = score_table(records)
    table["method"] = table["method"].map(names)
    order = [name for name in names.values() if name in set(table["method"])]
    figure, (axis,) = panels(1, size=(8, 0.45 * len(order) + 1.2))
    bars_and_dots(axis, table, "miou", "method", order)
    axis.set(xlabel="mean IoU (%)", xlim=(0, 100))
    return figure


def confusion(record: dict[str, Any]) -> Figure:
    """Confusion matrix in percent: rows are clusters, columns true classes; each column sums to 100."""
    table, matching, names = np.array(scored(record)["confusion"], float), record["matching"], record["classes"]
    find_fonts(*names)
    order = sorted(range(len(matching)), key=lambda cluster: (matching[cluster] < 0, matching[cluster]))
    rows = [names[matching[i]] if matching[i] >= 0 else f"cluster {i}" for i in order]
    side = 0.42 * len(names) + 2.2
    figure, (axis,) = panels(1, size=(side + 0.8, side))
    options = {"xticklabels": names, "yticklabels": rows, "cbar_kws": {"label": "% of the true class", "shrink": 0.7}}
    options |= {"annot": len(names) <= 15, "fmt": ".0f", "annot_kws": {"fontsize": 8}}
    share = 100 * table[order] / np.maximum(table.sum(0), 1)
    sns.heatmap(share, cmap="viridis", vmin=0, vmax=100, square=True, ax=axis, **options)
    axis.set(xlabel="true class", ylabel="cluster, by the class it is matched to")
    axis.tick_params(axis="x", rotation=60)
    as_they_are([*axis.get_xticklabels(), *axis.get_yticklabels()])
    return figure


def class_iou(*records: dict[str, Any], methods: Sequence[str] = tuple(METHODS)) -> Figure:
    """IoU of each class and mIoU, by method; for several seeds, the means over seeds.

    A class that does not occur has an empty cell. StegoError for a record without scores.
    """
    names = method_names(records[0])
    shown = [method for method in methods if all(method in scored(record)["scores"] for record in records)]
    ious = {m: np.array([record["scores"][m]["iou"] for record in records], float).mean(0) for m in shown}
    return class_table({names[m]: values for m, values in ious.items()}, distinct_names(records[0]["classes"]))


def class_table(values: Mapping[str, Sequence[float] | np.ndarray], names: Sequence[str]) -> Figure:
    """IoU of each class as a colored table: one row per entry of `values`, one column per class, the mean first."""
    find_fonts(*names)
    table = pd.DataFrame(values, index=names).T
    table.insert(0, "mean", table.mean(axis=1))
    figure, (axis,) = panels(1, size=(3.2 + 0.62 * len(table.columns), 1.4 + 0.36 * len(table)))
    options = {"annot": len(names) <= 20, "fmt": ".0f", "annot_kws": {"fontsize": 9}, "cbar_kws": {"label": "IoU (%)"}}
    sns.heatmap(table, cmap="viridis", vmin=0, vmax=100, ax=axis, linewidths=0.5, **options)
    axis.axvline(1, color="white", linewidth=4)
    axis.tick_params(axis="x", rotation=45)
    axis.tick_params(axis="y", rotation=0)
    as_they_are(axis.get_xticklabels())
    return figure
