"""Figures of studies: ablations, dimensions, misleading scores, shifts, benchmark."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from ..studies.ablations import LADDER
from ..studies.results import METHODS, OVERVIEW, mean_of_best
from ..studies.study import Study
from .figures import KINDS
from .style import bars_and_dots, panels


def ingredients(study: Study) -> Figure:
    """The ladder: accuracy and mIoU of the cluster probe, one dot per seed, the mean as a bar."""
    scores = _cluster_scores(study, LADDER)
    if scores.empty:
        return nothing(study)
    names = [variant.name for variant in study.variants if variant.group == LADDER]
    figure, axes = panels(2, size=(5, 3), sharey=True)
    for axis, (score, title) in zip(axes, {"accuracy": "accuracy (%)", "miou": "mean IoU (%)"}.items(), strict=True):
        bars_and_dots(axis, scores, score, "name", names)
        axis.set(title=title, xlabel="", xlim=(0, 100))
    return figure


def sweeps(study: Study, groups: Sequence[str]) -> Figure:
    """One panel per varied setting: mIoU of the cluster probe, one dot per seed, a line through the means."""
    if study.scores().empty:
        return nothing(study)
    figure, axes = panels(len(groups), columns=3, size=(3.4, 2.4), sharey=True)
    for axis, group in zip(axes, groups, strict=True):
        scores = _cluster_scores(study, group)
        if len(scores):
            order = [variant.name for variant in study.variants if variant.group == group]
            options = {"x": "name", "y": "miou", "order": order, "ax": axis}
            sns.pointplot(scores, errorbar=None, color=sns.color_palette()[0], markersize=5, linewidth=1.5, **options)
            sns.stripplot(scores, color="black", size=4, jitter=0.1, alpha=0.7, **options)
        axis.set(title=group, xlabel="", ylabel="mean IoU (%)")
    return figure


def resolution(measured: pd.DataFrame) -> Figure:
    """Rows of `studies.resolution.measure`: scores and seconds over the working size; tiles are crosses."""
    titles = {"accuracy": "accuracy (%)", "miou": "mean IoU (%)", "border_f": "border F (%)", "seconds": "seconds"}
    figure, axes = panels(len(titles), columns=2, size=(4.5, 2.8))
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        for color, (name, some) in zip(sns.color_palette(), measured.groupby("refine", sort=False), strict=False):
            whole, tiled = some[some["tile"].isna()], some[some["tile"].notna()]
            label = "with CRF" if name == "crf" else "without CRF"
            axis.plot(whole["size"], whole[column], "o-", color=color, label=label)
            axis.plot(tiled["size"], tiled[column], "x", color=color, markersize=9, markeredgewidth=2)
        limit = 1.1 * measured[column].max()
        axis.set(title=title, xlabel="working size (pixels)", ylim=(0, limit))
    axes[0].legend(fontsize=8)
    return figure


def few_labels(rows: pd.DataFrame, hue: str) -> Figure:
    """Accuracy and mIoU by the number of labels, mean and standard deviation over draws; a line of panels per dataset.

    rows: of `studies.few_labels.read`. hue: the column that chooses colors. Solid lines: codes, dashed: features.
    """
    titles, numbers = {"accuracy": "accuracy (%)", "miou": "mean IoU (%)"}, rows["count"].unique()
    counts = [str(count) for count in sorted(numbers, key=lambda count: {"none": 0, "all": np.inf}.get(count, count))]
    rows = rows.assign(count=pd.Categorical(rows["count"].astype(str), counts, ordered=True))
    places = [(dataset, score) for dataset in rows["dataset"].unique() for score in titles]
    figure, axes = panels(len(places), columns=2, size=(4.6, 3.1))
    options = dict(hue=hue, style="on", markers=True, errorbar="sd", err_kws={"alpha": 0.12, "linewidth": 0})
    options |= dict(hue_order=list(rows[hue].unique()), style_order=["codes", "features"])
    for axis, (dataset, score) in zip(axes, places, strict=True):
        sns.lineplot(rows[rows["dataset"] == dataset], x="count", y=score, ax=axis, **options)
        unit = "labeled images" if (rows["labels"] == "images").all() else "clicks"
        axis.set(title=dataset, xlabel=unit, ylabel=titles[score])
    handles, names = axes[0].get_legend_handles_labels()
    for axis in axes:
        axis.get_legend().remove()
    figure.legend(handles, names, loc="outside right center", fontsize=8)
    return figure


def dimensions(study: Study) -> Figure:
    """mIoU by number of dimensions for every head: mean over seeds, standard deviation as a band."""
    scores = study.scores().query("probe == 'cluster'")
    if scores.empty:
        return nothing(study)
    figure, (axis,) = panels(1, size=(7.5, 4))
    whole, swept = scores[scores["name"] == "all"], scores[scores["name"] != "all"]
    for color, (group, rows) in zip(sns.color_palette(), swept.groupby("group", sort=False), strict=False):
        means = rows.groupby(rows["name"].astype(int))["miou"].agg(["mean", "std"]).fillna(0)
        mean, std = means["mean"], means["std"]
        axis.plot(means.index, mean, "o-", color=color, label=group)
        axis.fill_between(means.index, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
    if len(whole):
        axis.axhline(whole["miou"].mean(), color="black", linestyle="--", label="all features")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set(xlabel="dimensions of the code", ylabel="mean IoU (%)")
    axis.legend()
    return figure


def methods(study: Study, group: str) -> Figure:
    """mIoU of the cluster probe of each variant of a group: one dot per seed, the mean as a bar."""
    scores = _cluster_scores(study, group)
    if scores.empty:
        return nothing(study)
    figure, (axis,) = panels(1, size=(8, 0.5 * scores["name"].nunique() + 1.2))
    bars_and_dots(axis, scores, "miou", "name")
    axis.set(xlabel="mean IoU (%)")
    return figure


def convergence(curves: pd.DataFrame) -> Figure:
    """mIoU of the clusters by training step, one panel per dataset, one line per method.

    curves: columns dataset, method, step, miou, as in `successors.curve`.
    """
    figure, axes = panels(curves["dataset"].nunique(), size=(4, 3.2))
    order = list(curves["method"].unique())
    options = dict(x="step", y="miou", hue="method", style="method", hue_order=order, style_order=order, dashes=False)
    for axis, (dataset, rows) in zip(axes, curves.groupby("dataset", sort=False), strict=True):
        sns.lineplot(rows, markers=True, ax=axis, **options)
        axis.set(
            title=dataset, xlabel="step", ylabel="mean IoU (%)", xlim=(0, None), ylim=(0, 1.1 * rows["miou"].max())
        )
    handles, names = axes[0].get_legend_handles_labels()
    for axis in axes:
        axis.get_legend().remove()
    figure.legend(handles, names, loc="outside right center", fontsize=8)
    return figure


def best_of(values: Sequence[float]) -> Figure:
    """Expected score of the best of n runs, and the mean of all runs."""
    figure, (axis,) = panels(1, size=(6.5, 3))
    counts = range(1, len(values) + 1)
    axis.plot(counts, [mean_of_best(values, n) for n in counts], "o-", label="expected best of n")
    axis.axhline(np.mean(values), color="black", linestyle="--", label="mean")
    axis.plot([0.8] * len(values), values, ".", color="0.5", label="the runs")
    axis.set(xlabel="runs to pick from, n", ylabel="mean IoU (%)", xticks=list(counts))
    axis.legend(fontsize=8)
    return figure


def extra_clusters(table: pd.DataFrame) -> Figure:
    """Scores by number of clusters. table: index number of clusters, one column per way of scoring, percent."""
    figure, (axis,) = panels(1, size=(7, 3.2))
    for marker, color, column in zip("osD^", sns.color_palette(), table, strict=False):
        axis.plot(table.index, table[column], marker=marker, color=color, label=column)
    axis.set(xlabel="clusters", ylabel="accuracy (%)", xticks=list(table.index))
    axis.legend(fontsize=8)
    return figure


def balance(forces: dict[str, dict[str, float]]) -> Figure:
    """Pull (right), push (left) and net force (diamond) of each pair type."""
    figure, (axis,) = panels(1, size=(7.5, 2.4))
    names = [KINDS[kind] for kind in forces]
    for sign, key, color in ((1, "pull", 2), (-1, "push", 3)):
        values = [sign * part[key] for part in forces.values()]
        axis.barh(names, values, color=sns.color_palette()[color], label=key)
    axis.plot([part["net"] for part in forces.values()], names, "D", color="black", label="net")
    axis.axvline(0, color="black", linewidth=1)
    axis.set(xlabel="weight x mean force on the codes")
    axis.invert_yaxis()
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def percentile_grid(grids: dict[str, pd.DataFrame]) -> Figure:
    """mIoU by percentiles, one panel per dataset: rows for self and kNN pairs, columns for random pairs."""
    if not grids:
        return nothing("make tuning")
    figure, axes = panels(len(grids), size=(4, 2.6))
    for axis, (title, table) in zip(axes, grids.items(), strict=True):
        sns.heatmap(table, annot=True, fmt=".1f", cmap="viridis", ax=axis, cbar_kws={"label": "mean IoU (%)"})
        axis.set(title=title, xlabel="percentile, random pairs", ylabel="self and kNN pairs")
        axis.tick_params(axis="y", rotation=0)
    return figure


def code_curves(logs: dict[str, pd.DataFrame]) -> Figure:
    """Exponential moving averages of the mean code correspondences by step, one panel per run."""
    figure, axes = panels(len(logs), size=(3.3, 2.9), sharey=True)
    for axis, (title, log) in zip(axes, logs.items(), strict=True):
        smooth = log.ewm(span=5).mean()
        for color, (kind, name) in zip(sns.color_palette(), KINDS.items(), strict=False):
            axis.plot(smooth[f"code_{kind}"], color=color, label=name)
        axis.set(title=title, xlabel="step", ylim=(-0.1, 1.02))
    axes[0].set_ylabel("mean code correspondence")
    axes[-1].legend(fontsize=8)
    return figure


def benchmark(tables: dict[str, pd.DataFrame]) -> Figure:
    """mIoU of each method, one panel per dataset (`benchmark.rows_by_miou`): solid bars are verified."""
    heights = [max(map(len, list(tables.values())[line : line + 2])) for line in range(0, len(tables), 2)]
    size = (6.2, 0.3 * sum(heights) / len(heights) + 0.8)
    figure, axes = panels(len(tables), columns=2, size=size, height_ratios=heights)
    limit = 1.12 * max(table["miou"].max() for table in tables.values())
    for axis, (title, table) in zip(axes, tables.items(), strict=True):
        for row in table.itertuples():
            name = f"{row.method}, {row.backbone}"
            color = sns.color_palette()[0 if row.method.startswith("STEGO") else 7]
            options = {"facecolor": color} if row.verified == "yes" else {"facecolor": "white", "hatch": "///"}
            axis.barh(name, row.miou, edgecolor=color, **options)
            axis.text(row.miou + 0.4, name, f"{row.miou:.1f}", va="center", fontsize=8)
        axis.set(title=title, xlim=(0, limit), xlabel="mean IoU (%)")
        axis.tick_params(axis="y", labelsize=8)
        axis.grid(axis="y", visible=False)
        axis.invert_yaxis()
    return figure


def backbones(scores: pd.DataFrame) -> Figure:
    """mIoU of k-means, STEGO and linear probes on each dataset and backbone: mean, standard deviation as a line.

    scores: from `results.main_scores`.
    """
    shown = scores[scores["method"].isin(OVERVIEW)]
    shown = shown.assign(group=shown["data"] + "\n" + shown["backbone"], method=shown["method"].map(METHODS))
    colors = [*sns.light_palette("0.35", 4)[1:3], *sns.color_palette("Blues", 4)[1:4:2]]
    colors += [*sns.color_palette("Greens", 4)[1:4:2], (0.96, 0.76, 0.45), (0.87, 0.56, 0.02)]
    order = [METHODS[method] for method in OVERVIEW]
    figure, (axis,) = panels(1, size=(5 + 1.1 * shown["group"].nunique(), 3.4))
    options = {"hue": "method", "hue_order": order, "palette": colors, "errorbar": "sd", "err_kws": {"linewidth": 1}}
    sns.barplot(shown, x="group", y="miou", ax=axis, **options)
    axis.set(xlabel="", ylabel="mean IoU (%)")
    axis.tick_params(axis="x", labelsize=8)
    axis.legend(title=None, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def negative(rows: pd.DataFrame) -> Figure:
    """mIoU of each way of `studies.negative`, a panel for each kind; error bars are standard deviations over seeds."""
    figure, axes = panels(rows["kind"].nunique(), size=(3.6, 3.2))
    options = dict(hue="dataset", hue_order=rows["dataset"].unique(), errorbar="sd", err_kws={"linewidth": 1})
    for axis, (kind, shown) in zip(axes, rows.groupby("kind", sort=False), strict=True):
        sns.barplot(shown, x="miou", y="way", ax=axis, **options)
        axis.set(xlabel="mean IoU (%)", ylabel="")
        axis.set_title(kind, fontsize=10)
        axis.get_legend().remove()
    axes[-1].legend(*axes[0].get_legend_handles_labels(), fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def light(table: pd.DataFrame) -> Figure:
    """mIoU by the share of the image's own mean that is subtracted, a panel for each data: `studies.negative.light`."""
    groups = list(table.groupby("data", sort=False))
    figure, axes = panels(len(groups), size=(3.4, 3.2))
    for axis, (title, rows) in zip(axes, groups, strict=True):
        sns.lineplot(rows, x="share", y="miou", hue="method", style="method", markers=True, errorbar="sd", ax=axis)
        axis.legend(title=None, fontsize=9)
        axis.set(xlabel="fraction a", ylabel="mean IoU (%)" if axis is axes[0] else "")
        axis.set_title(title.replace(", ", "\n"), fontsize=10)
    return figure


def _cluster_scores(study: Study, group: str) -> pd.DataFrame:
    return study.scores().query("group == @group and probe == 'cluster'")


def nothing(study: Study | str) -> Figure:
    """Placeholder for a figure without run records. study: the study, or the command that runs it."""
    figure, (axis,) = panels(1, size=(7, 1))
    command = study if isinstance(study, str) else f"{len(study.missing())} missing runs: make ablations"
    axis.text(0.5, 0.5, f"no run records; {command}", ha="center", va="center", transform=axis.transAxes)
    axis.axis("off")
    return figure
