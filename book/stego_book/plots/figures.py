"""Figures of runs and records. Each function takes data and returns a matplotlib Figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from stego_lib.datasets.classes import distinct_names
from stego_lib.run import Run

from ..studies.results import METHODS, OVERVIEW, method_names, score_table, scored
from .style import panels

# Pair type in the loss -> its name in figures.
KINDS = {"self": "self", "knn": "nearest neighbor", "rand": "random"}
# Score in a run record -> axis label.
SCORES = {"accuracy": "accuracy (%)", "miou": "mean IoU (%)"}


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
    log = log.dropna(axis="columns", how="all")
    names = KINDS | {"cluster": "cluster", "linear": "linear"}
    parts = {
        "correspondence loss": [f"loss_{kind}" for kind in KINDS],
        "mean code correspondence": [f"code_{kind}" for kind in KINDS],
        "loss of the probes": ["loss_cluster", "loss_linear"],
    }
    if "loss_self" not in log:
        parts = {name.replace("_", " "): [name] for name in log}
    parts = {title: [name for name in columns if name in log] for title, columns in parts.items()}
    parts = {title: columns for title, columns in parts.items() if columns}
    figure, axes = panels(len(parts), size=(3.5, 3.1))
    for axis, (title, columns) in zip(axes, parts.items(), strict=True):
        lines = log[columns].rename(columns=lambda column: names.get(column.partition("_")[2], column))
        lines.plot(ax=axis, alpha=0.25, linewidth=0.8, legend=False)
        axis.set_prop_cycle(None)
        lines.ewm(span=span).mean().plot(ax=axis, title=title, xlabel="step", legend=False)
        if len(columns) > 1:
            axis.legend(axis.lines[len(columns) :], lines.columns, fontsize=8)
    return figure


def score_bars(record: dict[str, Any]) -> Figure:
    """Accuracy and mIoU of every method in a run record; StegoError for one without scores."""
    names, scores = method_names(record), scored(record)["scores"]
    methods = [method for method in METHODS if method in scores]
    colors = [sns.color_palette()[0 if METHODS[method].startswith("STEGO") else 7] for method in methods]
    figure, axes = panels(2, size=(5, 0.42 * len(methods) + 1.2), sharey=True)
    for axis, (score, title) in zip(axes, SCORES.items(), strict=True):
        values = [scores[method][score] for method in methods]
        bars = axis.barh([names[method] for method in methods], values, color=colors)
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
        axis.set(title=title, xlim=(0, 100))
        axis.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    return figure


def bars_and_dots(table: pd.DataFrame, y: str, scores: Sequence[str] = ("miou",)) -> Figure:
    """One panel per score: a bar for the mean and dots for the values of each value of the column `y`."""
    figure, axes = panels(len(scores), size=(10 / (1 + len(scores)) + 2, 0.45 * table[y].nunique() + 1.2), sharey=True)
    for axis, score in zip(axes, scores, strict=True):
        sns.barplot(table, x=score, y=y, errorbar=None, color=sns.color_palette("pastel")[0], ax=axis)
        sns.stripplot(table, x=score, y=y, color="black", size=4, jitter=0.12, ax=axis)
        axis.set(xlabel=SCORES[score], ylabel="")
    return figure


def spread(records: list[dict[str, Any]]) -> Figure:
    """mIoU of every method: one dot per seed, the mean as a bar."""
    table = score_table(records)
    return bars_and_dots(table.assign(method=table["method"].map(method_names(records[0]))), "method")


def confusion(record: dict[str, Any]) -> Figure:
    """Confusion matrix in percent: rows are clusters, columns true classes; each column sums to 100."""
    table, matching, names = np.array(scored(record)["confusion"], float), record["matching"], record["classes"]
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
    axis.tick_params(axis="y", rotation=0)
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
    table = pd.DataFrame(values, index=names).T
    table.insert(0, "mean", table.mean(axis=1))
    figure, (axis,) = panels(1, size=(3.2 + 0.62 * len(table.columns), 1.4 + 0.36 * len(table)))
    options = {"annot": len(names) <= 20, "fmt": ".0f", "annot_kws": {"fontsize": 9}, "cbar_kws": {"label": "IoU (%)"}}
    sns.heatmap(table, cmap="viridis", vmin=0, vmax=100, ax=axis, linewidths=0.5, **options)
    axis.axvline(1, color="white", linewidth=4)
    axis.tick_params(axis="x", rotation=45)
    axis.tick_params(axis="y", rotation=0)
    return figure


def backbones(scores: pd.DataFrame) -> Figure:
    """mIoU of k-means, STEGO and linear probes on each dataset and backbone: mean, standard deviation as a line.

    scores: from `results.main_scores`.
    """
    shown = scores[scores["method"].isin(OVERVIEW)]
    shown = shown.assign(group=shown["data"] + "\n" + shown["backbone"], method=shown["method"].map(METHODS))
    colors = [*sns.light_palette("0.35", 4)[1:3], *sns.color_palette("Blues", 4)[1:4:2]]
    colors += [*sns.color_palette("Greens", 4)[1:4:2], (0.96, 0.76, 0.45), (0.87, 0.56, 0.02)]
    figure, (axis,) = panels(1, size=(5 + 1.1 * shown["group"].nunique(), 3.4))
    options = {"hue_order": [METHODS[method] for method in OVERVIEW], "palette": colors, "err_kws": {"linewidth": 1}}
    sns.barplot(shown, x="group", y="miou", hue="method", errorbar="sd", ax=axis, **options)
    axis.set(xlabel="", ylabel="mean IoU (%)")
    axis.tick_params(axis="x", labelsize=8)
    axis.legend(title=None, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def benchmark(tables: dict[str, pd.DataFrame]) -> Figure:
    """mIoU of each method, one panel per dataset (rows of `results.published_results`): solid bars are verified."""
    heights = [max(map(len, list(tables.values())[line : line + 2])) for line in range(0, len(tables), 2)]
    size = (6.2, 0.3 * sum(heights) / len(heights) + 0.8)
    figure, axes = panels(len(tables), columns=2, size=size, height_ratios=heights, sharex=True)
    for axis, (title, table) in zip(axes, tables.items(), strict=True):
        table = table.sort_values("miou", ascending=False)
        colors = [sns.color_palette()[0 if method.startswith("STEGO") else 7] for method in table["method"]]
        bars = axis.barh(table["method"] + ", " + table["backbone"], table["miou"], color=colors, edgecolor=colors)
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        for bar, verified in zip(bars, table["verified"], strict=True):
            if verified != "yes":
                bar.set(facecolor="white", hatch="///")
        axis.set(title=title, xlabel="mean IoU (%)")
        axis.tick_params(axis="y", labelsize=8)
        axis.tick_params(axis="x", labelbottom=True)
        axis.grid(axis="y", visible=False)
        axis.invert_yaxis()
    axes[0].margins(x=0.12)
    return figure
