"""Figures of runs and records. Each function takes data and returns a matplotlib Figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from stego_lib.datasets.classes import distinct_names
from stego_lib.run import Run

from ..studies.results import METHODS, method_names, score_table, scored
from .style import as_they_are, find_fonts

KINDS = {"self": "self", "knn": "nearest neighbor", "rand": "random"}
"""Kinds of pairs, as the loss names them -> as figures name them."""


def correspondences(run: Run) -> Figure:
    """Histograms of the feature correspondences of each kind of pair; those beyond the shift attract, the others repel."""
    found = run.correspondences
    edges = np.array(found["edges"])
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 2.8))
    for axis, color, kind, shift in zip(axes, sns.color_palette(), KINDS, run.shifts, strict=False):
        above = edges[:-1] >= shift
        heights, options = np.array(found[kind]), dict(width=np.diff(edges), align="edge", linewidth=0)
        axis.bar(edges[:-1], np.where(above, 0, heights), color=color, alpha=0.35, **options)
        axis.bar(edges[:-1], np.where(above, heights, 0), color=color, **options)
        axis.axvline(shift, color="black", linestyle="--")
        axis.set(
            title=f"{KINDS[kind]} pairs\nshift {shift:.2f}", xlabel="feature correspondence", xlim=(-1, 1), yticks=[]
        )
        axis.set_ylim(top=1.22 * max(heights.max(), 1e-9))
        for word, side, x in (("repel", "right", -0.04), ("attract", "left", 0.04)):
            axis.text(
                shift + x,
                0.97,
                word,
                ha=side,
                va="top",
                fontsize=9,
                style="italic",
                transform=axis.get_xaxis_transform(),
            )
    axes[0].set_ylabel("density")
    figure.tight_layout()
    return figure


def curves(log: pd.DataFrame, span: int = 20) -> Figure:
    """Losses of the three kinds of pairs, their mean code correspondences, and joint probes' losses, by step.

    Of a successor of STEGO, the parts of its own loss. Faint: every step. Strong: exponential moving average over about `span`
    steps, which has all steps from the first in it.
    """
    if "loss_self" not in log:
        return _own_curves(log, span)
    probes = [name for name in ("cluster", "linear") if f"loss_{name}" in log and log[f"loss_{name}"].notna().any()]
    titles = ["correspondence loss", "mean code correspondence", *["loss of the probes"][: len(probes)]]
    figure, axes = plt.subplots(1, len(titles), figsize=(0.5 + 3.5 * len(titles), 3.1))
    lines = [
        *((axes[0], f"loss_{kind}", name, number) for number, (kind, name) in enumerate(KINDS.items())),
        *((axes[1], f"code_{kind}", name, number) for number, (kind, name) in enumerate(KINDS.items())),
        *((axes[-1], f"loss_{name}", name, number) for number, name in enumerate(probes, start=3)),
    ]
    for axis, column, name, number in lines:
        color = sns.color_palette()[number]
        axis.plot(log[column], color=color, alpha=0.25, linewidth=0.8)
        axis.plot(log[column].ewm(span=span).mean(), color=color, label=name)
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def _own_curves(log: pd.DataFrame, span: int) -> Figure:
    """One axis for each column of the log."""
    figure, axes = plt.subplots(1, len(log.columns), figsize=(0.5 + 3 * len(log.columns), 3.1), squeeze=False)
    for axis, (name, values) in zip(axes[0], log.items(), strict=True):
        axis.plot(values, color=sns.color_palette()[0], alpha=0.25, linewidth=0.8)
        axis.plot(values.ewm(span=span).mean(), color=sns.color_palette()[0])
        axis.set(title=str(name).replace("_", " "), xlabel="step")
    figure.tight_layout()
    return figure


def score_bars(record: dict[str, Any]) -> Figure:
    """Accuracy and mIoU of every method in a run record; StegoError for one without scores."""
    methods = [method for method in METHODS if method in scored(record)["scores"]]
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.42 * len(methods) + 1.2), sharey=True)
    for axis, score, title in zip(axes, ("accuracy", "miou"), ("accuracy (%)", "mean IoU (%)"), strict=True):
        values = [record["scores"][method][score] for method in methods]
        colors = [
            sns.color_palette()[0 if method.startswith(("cluster", "linear")) and method != "linear_features" else 7]
            for method in methods
        ]
        bars = axis.barh([method_names(record)[method] for method in methods], values, color=colors)
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
        axis.set(title=title, xlim=(0, 100))
        axis.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    figure.tight_layout()
    return figure


def spread(records: list[dict[str, Any]]) -> Figure:
    """mIoU of every method: one dot a seed, the mean as a bar."""
    table = score_table(records)
    names = method_names(records[0])
    table["method"] = table["method"].map(names)
    order = [name for name in names.values() if name in set(table["method"])]
    figure, axis = plt.subplots(figsize=(8, 0.45 * len(order) + 1.2))
    options = dict(x="miou", y="method", order=order, ax=axis)
    sns.barplot(table, errorbar=None, color=sns.color_palette("pastel")[0], **options)
    sns.stripplot(table, color="black", size=4, jitter=0.12, **options)
    axis.set(xlabel="mean IoU (%)", ylabel="", xlim=(0, 100))
    figure.tight_layout()
    return figure


def confusion(record: dict[str, Any]) -> Figure:
    """Where the pixels of each class went: rows are clusters (by their class), columns true classes; each column sums to 100.

    StegoError for a record without scores.
    """
    table, matching, names = np.array(scored(record)["confusion"], float), record["matching"], record["classes"]
    find_fonts(*names)
    order = sorted(range(len(matching)), key=lambda cluster: (matching[cluster] < 0, matching[cluster]))
    rows = [names[matching[i]] if matching[i] >= 0 else f"cluster {i}" for i in order]
    percent = 100 * table[order] / np.maximum(table.sum(0), 1)
    side = 0.42 * len(names) + 2.2
    figure, axis = plt.subplots(figsize=(side + 0.8, side))
    sns.heatmap(
        percent, annot=len(names) <= 15, fmt=".0f", cmap="viridis", vmin=0, vmax=100, square=True,
        xticklabels=names, yticklabels=rows, cbar_kws={"label": "% of the true class", "shrink": 0.7}, annot_kws={"fontsize": 8}, ax=axis,
    )  # fmt: skip
    axis.set(xlabel="true class", ylabel="cluster, by the class it is matched to")
    axis.tick_params(axis="x", rotation=60)
    as_they_are([*axis.get_xticklabels(), *axis.get_yticklabels()])
    return figure


def class_iou(*records: dict[str, Any], methods: Sequence[str] = tuple(METHODS)) -> Figure:
    """IoU of each class by method, and their mean; of several seeds' records, the means over the seeds.

    A class that does not occur has an empty cell. StegoError for a record without scores.
    """
    names = distinct_names(records[0]["classes"])
    find_fonts(*names)
    shown = [method for method in methods if all(method in scored(record)["scores"] for record in records)]
    values = {
        method_names(records[0])[method]: np.array([record["scores"][method]["iou"] for record in records], float).mean(
            0
        )
        for method in shown
    }
    return class_table(values, names)


def class_table(values: Mapping[str, Sequence[float] | np.ndarray], names: Sequence[str]) -> Figure:
    """IoU of each class as a table in colors: one row an entry of `values`, one column a class, and their mean in front."""
    table = pd.DataFrame(values, index=names).T
    table.insert(0, "mean", table.mean(axis=1))
    figure, axis = plt.subplots(figsize=(3.2 + 0.62 * len(table.columns), 0.9 + 0.36 * len(table)))
    sns.heatmap(
        table, annot=len(names) <= 20, fmt=".0f", cmap="viridis", vmin=0, vmax=100, ax=axis, linewidths=0.5,
        cbar_kws={"label": "IoU (%)"}, annot_kws={"fontsize": 9},
    )  # fmt: skip
    axis.axvline(1, color="white", linewidth=4)
    axis.tick_params(axis="x", rotation=45)
    axis.tick_params(axis="y", rotation=0)
    as_they_are(axis.get_xticklabels())
    figure.tight_layout()
    return figure
