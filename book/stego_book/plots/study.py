"""Figures of comparisons: ablations, dimensions, how metrics mislead, shifts, the benchmark."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from ..studies.ablations import LADDER
from ..studies.results import METHODS, OVERVIEW, mean_of_best
from ..studies.study import Study
from .figures import KINDS

MEASURES = {"accuracy": "accuracy (%)", "miou": "mean IoU (%)"}


def ingredients(study: Study) -> Figure:
    """The ladder: one dot a seed, the mean as a bar, a panel each for accuracy and mIoU of the cluster probe."""
    names = [variant.name for variant in study.variants if variant.group == LADDER]
    found = _cluster_scores(study, LADDER)
    if found.empty:
        return nothing(study)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3), sharey=True)
    for axis, (score, title) in zip(axes, MEASURES.items(), strict=True):
        options = dict(x=score, y="name", order=names, ax=axis)
        sns.barplot(found, errorbar=None, color=sns.color_palette("pastel")[0], **options)
        sns.stripplot(found, color="black", size=4, jitter=0.1, **options)
        axis.set(title=title, xlabel="", ylabel="", xlim=(0, 100))
    figure.tight_layout()
    return figure


def sweeps(study: Study, groups: Sequence[str], columns: int = 3) -> Figure:
    """A panel for each thing varied: mIoU of the cluster probe, one dot a seed, a line through the means."""
    if study.scores().empty:
        return nothing(study)
    lines = -(-len(groups) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.4 * columns, 2.4 * lines), sharey=True, squeeze=False)
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for axis, group in zip(axes.flat, groups, strict=False):
        names = [variant.name for variant in study.variants if variant.group == group]
        found = _cluster_scores(study, group)
        if len(found):
            options = dict(x="name", y="miou", order=names, ax=axis)
            sns.pointplot(found, errorbar=None, color=sns.color_palette()[0], markersize=5, linewidth=1.5, **options)
            sns.stripplot(found, color="black", size=4, jitter=0.1, alpha=0.7, **options)
        axis.set(title=group, xlabel="", ylabel="mean IoU (%)")
    figure.tight_layout()
    return figure


def dimensions(study: Study) -> Figure:
    """mIoU by number of dimensions for every head; mean over seeds and, as a band, their standard deviation."""
    found = study.scores().query("probe == 'cluster'")
    if found.empty:
        return nothing(study)
    figure, axis = plt.subplots(figsize=(7.5, 4))
    whole, swept = found[found["name"] == "all"], found[found["name"] != "all"]
    for color, (group, rows) in zip(sns.color_palette(), swept.groupby("group", sort=False), strict=False):
        means = rows.groupby(rows["name"].astype(int))["miou"].agg(["mean", "std"]).fillna(0)
        axis.plot(means.index, means["mean"], "o-", color=color, label=group)
        axis.fill_between(
            means.index, means["mean"] - means["std"], means["mean"] + means["std"], color=color, alpha=0.2, linewidth=0
        )
    if len(whole):
        axis.axhline(whole["miou"].mean(), color="black", linestyle="--", label="all features")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set(xlabel="dimensions of the code", ylabel="mean IoU (%)")
    axis.legend()
    figure.tight_layout()
    return figure


def methods(study: Study, group: str) -> Figure:
    """mIoU of the cluster probe of each variant of a group: one dot a seed, the mean as a bar."""
    found = _cluster_scores(study, group)
    if found.empty:
        return nothing(study)
    figure, axis = plt.subplots(figsize=(8, 0.5 * found["name"].nunique() + 1.2))
    options = dict(x="miou", y="name", ax=axis)
    sns.barplot(found, errorbar=None, color=sns.color_palette("pastel")[0], **options)
    sns.stripplot(found, color="black", size=4, jitter=0.12, **options)
    axis.set(xlabel="mean IoU (%)", ylabel="")
    figure.tight_layout()
    return figure


def best_of(values: Sequence[float]) -> Figure:
    """What one reports by picking the best of n runs by its score, beside their mean."""
    figure, axis = plt.subplots(figsize=(6.5, 3))
    counts = range(1, len(values) + 1)
    axis.plot(counts, [mean_of_best(values, n) for n in counts], "o-", label="expected best of n")
    axis.axhline(np.mean(values), color="black", linestyle="--", label="mean")
    axis.plot([0.8] * len(values), values, ".", color="0.5", label="the runs")
    axis.set(xlabel="runs to pick from, n", ylabel="mean IoU (%)", xticks=list(counts))
    axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def extra_clusters(table: pd.DataFrame) -> Figure:
    """Scores by number of clusters; table: one row a number (index), one column a way to count, percent."""
    figure, axis = plt.subplots(figsize=(7, 3.2))
    for marker, color, column in zip("osD^", sns.color_palette(), table, strict=False):
        axis.plot(table.index, table[column], marker=marker, color=color, label=column)
    axis.set(xlabel="clusters", ylabel="accuracy (%)", xticks=list(table.index))
    axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def balance(found: dict[str, dict[str, float]]) -> Figure:
    """Pull to the right, push to the left, and the net force as a diamond, for each kind of pairs (`calibration.balance`)."""
    figure, axis = plt.subplots(figsize=(7.5, 2.4))
    names = [KINDS[kind] for kind in found]
    for sign, key, color in ((1, "pull", 2), (-1, "push", 3)):
        values = [sign * part[key] for part in found.values()]
        axis.barh(names, values, color=sns.color_palette()[color], label=key)
    axis.plot([part["net"] for part in found.values()], names, "D", color="black", label="net")
    axis.axvline(0, color="black", linewidth=1)
    axis.set(xlabel="weight x mean force on the codes")
    axis.invert_yaxis()
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure


def percentile_grid(grids: dict[str, pd.DataFrame]) -> Figure:
    """mIoU by percentiles, a panel a dataset: rows the percentile of self and kNN pairs, columns that of random pairs."""
    if not grids:
        return nothing("make tuning")
    figure, axes = plt.subplots(1, len(grids), figsize=(0.5 + 3.9 * len(grids), 2.6), squeeze=False)
    for axis, (title, table) in zip(axes[0], grids.items(), strict=True):
        sns.heatmap(table, annot=True, fmt=".1f", cmap="viridis", ax=axis, cbar_kws={"label": "mean IoU (%)"})
        axis.set(title=title, xlabel="percentile, random pairs", ylabel="self and kNN pairs")
        axis.tick_params(axis="y", rotation=0)
    figure.tight_layout()
    return figure


def code_curves(logs: dict[str, pd.DataFrame], span: int = 5) -> Figure:
    """Mean code correspondences by step, as exponential moving averages; a panel for each run, its name as title."""
    figure, axes = plt.subplots(1, len(logs), figsize=(3.3 * len(logs), 2.9), sharey=True, squeeze=False)
    for axis, (title, log) in zip(axes[0], logs.items(), strict=True):
        smooth = log.ewm(span=span).mean()
        for color, (kind, name) in zip(sns.color_palette(), KINDS.items(), strict=False):
            axis.plot(smooth[f"code_{kind}"], color=color, label=name)
        axis.set(title=title, xlabel="step", ylim=(-0.1, 1.02))
    axes[0, 0].set_ylabel("mean code correspondence")
    axes[0, -1].legend(fontsize=8)
    figure.tight_layout()
    return figure


def benchmark(tables: dict[str, pd.DataFrame], columns: int = 2) -> Figure:
    """mIoU of each method, a panel a dataset (`benchmark.rows_by_miou`): full bars are verified at their source, open ones not."""
    columns = min(columns, len(tables))
    lines = -(-len(tables) // columns)
    panels = list(tables.items())
    heights = [max(len(table) for _, table in panels[line * columns : (line + 1) * columns]) for line in range(lines)]
    figure, axes = plt.subplots(
        lines, columns, figsize=(6.2 * columns, 0.3 * sum(heights) + 0.8 * lines), squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, table) in zip(axes.flat, panels, strict=False):
        names = [f"{method}, {backbone}" for method, backbone in zip(table["method"], table["backbone"], strict=True)]
        for name, value, verified, method in zip(names, table["miou"], table["verified"], table["method"], strict=True):
            color = sns.color_palette()[0 if method.startswith("STEGO") else 7]
            full = verified == "yes"
            axis.barh(name, value, facecolor=color if full else "white", edgecolor=color, hatch=None if full else "///")
            axis.text(value + 0.4, name, f"{value:.1f}", va="center", fontsize=8)
        axis.set(title=title, xlim=(0, 1.12 * max(tables[key]["miou"].max() for key in tables)), xlabel="mean IoU (%)")
        axis.tick_params(axis="y", labelsize=8)
        axis.grid(axis="y", visible=False)
        axis.invert_yaxis()
    figure.tight_layout()
    return figure


def backbones(scores: pd.DataFrame) -> Figure:
    """mIoU of k-means, STEGO and the linear bound on each data and backbone; mean and, as a line, standard deviation.

    scores: from `results.main_scores`.
    """
    shown = scores[scores["method"].isin(OVERVIEW)]
    group = shown["data"] + "\n" + shown["backbone"]
    colors = dict(
        zip(
            OVERVIEW,
            [*sns.light_palette("0.35", 4)[1:3], *sns.color_palette("Blues", 4)[1:4:2], (0.87, 0.56, 0.02)],
            strict=True,
        )
    )
    figure, axis = plt.subplots(figsize=(10, 3.4))
    sns.barplot(
        shown.assign(group=group, method=shown["method"].map(METHODS)), x="group", y="miou", hue="method", ax=axis,
        hue_order=[METHODS[method] for method in OVERVIEW], palette=[colors[method] for method in OVERVIEW], errorbar="sd",
        err_kws={"linewidth": 1},
    )  # fmt: skip
    axis.set(xlabel="", ylabel="mean IoU (%)")
    axis.tick_params(axis="x", labelsize=9)
    axis.legend(title=None, fontsize=9, loc="upper right")
    figure.tight_layout()
    return figure


def light(records: Mapping[str, Sequence[dict[str, Any]]]) -> Figure:
    """mIoU of k-means and of the method by the amount of `studies.light`, one panel an entry of `records`; mean and deviation."""
    names = {"kmeans_features": "k-means", "cluster": "STEGO"}
    figure, axes = plt.subplots(1, len(records), figsize=(10, 3.2), squeeze=False)
    for axis, (title, kept) in zip(axes[0], records.items(), strict=True):
        rows = [
            {"amount": record["light"], "method": name, "miou": record["scores"][key]["miou"]}
            for record in kept
            for key, name in names.items()
        ]
        if rows:
            sns.lineplot(
                pd.DataFrame(rows),
                x="amount",
                y="miou",
                hue="method",
                style="method",
                markers=True,
                errorbar="sd",
                ax=axis,
            )
            axis.legend(title=None, fontsize=9)
        axis.set(
            xlabel="share taken off",
            ylabel="mean IoU (%)" if axis is axes[0, 0] else "",
            title=title.replace(", ", "\n"),
        )
        axis.title.set_fontsize(10)
    figure.tight_layout()
    return figure


def _cluster_scores(study: Study, group: str) -> pd.DataFrame:
    found = study.scores()
    return found[(found["group"] == group) & (found["probe"] == "cluster")]


def nothing(study: Study | str) -> Figure:
    """What stands in a figure's place while there is no run record to draw it from; `study`: it, or the command that runs it."""
    figure, axis = plt.subplots(figsize=(7, 1))
    command = study if isinstance(study, str) else f"{len(study.missing())} runs to do: make ablations"
    text = f"no run record yet; {command}"
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes)
    axis.axis("off")
    return figure
