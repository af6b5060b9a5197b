"""Figures of runs and records, and what all figures share. Each function takes data and returns a matplotlib Figure."""

import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

from ..datasets import Classes, SegmentationDataset
from ..datasets.folder import distinct_names
from ..datasets.layout import list_images
from ..run import Run
from ..runtime.notices import notice
from ..runtime.paths import user_path
from ..studies.results import METHODS, score_table, scored

KINDS = {"self": "self", "knn": "nearest neighbor", "rand": "random"}
"""Kinds of pairs, as the loss names them -> as figures name them."""
UNMATCHED = (255, 255, 255)
"""Color of ignored pixels."""
SHOWN = 1024
"""Pixels per side of the largest image in a figure; of a larger one every second pixel is shown, or every third ..."""


def use_style() -> None:
    """One look for all figures: legible at book width, colors that the color-blind tell apart."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=0.95)
    plt.rcParams.update({"figure.dpi": 110, "savefig.dpi": 150, "savefig.bbox": "tight", "axes.titleweight": "bold"})


def save(figure: Figure, folder: str | Path, name: str) -> Path:
    """Writes `folder`/figures/`name`.png and returns its path."""
    path = user_path(folder) / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def paint(label: Tensor | np.ndarray, classes: Classes) -> np.ndarray:
    """Label map (H, W) -> uint8 (H, W, 3) in the colors of the classes; other ids are `UNMATCHED`."""
    label = np.asarray(label)
    palette = np.array([*classes.colors, UNMATCHED], np.uint8)
    return palette[np.where((label >= 0) & (label < len(classes)), label, len(classes))]


def examples(dataset: SegmentationDataset, indices: Sequence[int]) -> Figure:
    """Images above their label maps, with the classes as legend; images alone where there are no labels."""
    return _image_rows(dataset, indices, ("image", "label"))


def correspondences(run: Run) -> Figure:
    """Histograms of the feature correspondences of each kind of pair, with the shift that parts them."""
    found = run.correspondences
    edges = np.array(found["edges"])
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 2.8))
    for axis, color, kind, shift in zip(axes, sns.color_palette(), KINDS, run.shifts, strict=False):
        axis.bar(edges[:-1], found[kind], width=np.diff(edges), align="edge", color=color, linewidth=0)
        axis.axvline(shift, color="black", linestyle="--")
        axis.set(title=f"{KINDS[kind]} pairs\nshift {shift:.2f}", xlabel="correspondence", xlim=(-1, 1), yticks=[])
    axes[0].set_ylabel("density")
    figure.tight_layout()
    return figure


def curves(log: pd.DataFrame, window: int = 20) -> Figure:
    """Losses of the three kinds of pairs, their mean code correspondences, and joint probes' losses, by step."""
    probes = [name for name in ("cluster", "linear") if f"loss_{name}" in log and log[f"loss_{name}"].notna().any()]
    titles = ["correspondence loss", "mean code correspondence", *["loss of the probes"][: len(probes)]]
    figure, axes = plt.subplots(1, len(titles), figsize=(0.5 + 3.5 * len(titles), 3.1))
    smooth = log.rolling(window, min_periods=1).mean()
    for color, (kind, name) in zip(sns.color_palette(), KINDS.items(), strict=False):
        axes[0].plot(smooth[f"loss_{kind}"], color=color, label=name)
        axes[1].plot(smooth[f"code_{kind}"], color=color, label=name)
    for color, name in enumerate(probes, start=3):
        axes[2].plot(smooth[f"loss_{name}"], color=sns.color_palette()[color], label=name)
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize=8)
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
        bars = axis.barh([METHODS[method] for method in methods], values, color=colors)
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
        axis.set(title=title, xlim=(0, 100))
        axis.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    figure.tight_layout()
    return figure


def spread(records: list[dict[str, Any]]) -> Figure:
    """mIoU of every method: one dot a seed, the mean as a bar."""
    table = score_table(records)
    table["method"] = table["method"].map(METHODS)
    order = [name for name in METHODS.values() if name in set(table["method"])]
    figure, axis = plt.subplots(figsize=(8, 0.45 * len(order) + 1.2))
    options = dict(x="miou", y="method", order=order, ax=axis)
    sns.barplot(table, errorbar=None, color=sns.color_palette("pastel")[0], **options)
    sns.stripplot(table, color="black", size=4, jitter=0.12, **options)
    axis.set(xlabel="mean IoU (%)", ylabel="", xlim=(0, 100))
    figure.tight_layout()
    return figure


def predictions(run: Run, dataset: SegmentationDataset, indices: Sequence[int]) -> Figure:
    """Image, label and STEGO's segments below each other, in the colors of `Run.segments`: those of the classes once matched."""
    return _image_rows(dataset, indices, ("image", "label", "STEGO"), run)


def overlays(folder: str | Path, classes: Classes, count: int = 8) -> Figure:
    """The first images of a folder of overlays, with the names of what is in them (`Run.segments`) as legend."""
    paths = list_images(user_path(folder))[:count]
    columns = min(4, len(paths))
    lines = -(-len(paths) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(2.6 * columns, 2.4 * lines), squeeze=False)
    for axis in axes.flat[len(paths) :]:
        axis.axis("off")
    for axis, path in zip(axes.flat, paths, strict=False):
        with Image.open(path) as image:
            image.draft("RGB", (SHOWN, SHOWN))  # a JPEG is read at a half, a quarter or an eighth of its size
            show_image(axis, np.asarray(image.convert("RGB")), path.stem)
    add_legend(figure, classes)
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


def class_iou(*records: dict[str, Any], methods: Sequence[str] = ("cluster", "kmeans_features", "linear")) -> Figure:
    """IoU of each class for some methods; of several seeds' records the mean, and as a line the standard deviation.

    A class that does not occur has no bar. StegoError for a record without scores.
    """
    find_fonts(*records[0]["classes"])
    rows = [
        {"class": name, "method": METHODS[method], "IoU (%)": value}
        for record in records
        for method in methods
        if method in scored(record)["scores"]
        for name, value in zip(distinct_names(record["classes"]), record["scores"][method]["iou"], strict=True)
    ]
    figure, axis = plt.subplots(figsize=(max(6.5, 0.75 * len(records[0]["classes"])), 3.4))
    errors = dict(errorbar="sd", err_kws={"linewidth": 1}) if len(records) > 1 else dict(errorbar=None)
    table = pd.DataFrame(rows).astype({"IoU (%)": float})  # null, as a record says of a class that does not occur, is no number
    sns.barplot(table, x="class", y="IoU (%)", hue="method", ax=axis, **errors)
    axis.set(xlabel="", ylim=(0, 100))
    axis.tick_params(axis="x", rotation=45)
    as_they_are(axis.get_xticklabels())
    axis.legend(title=None, fontsize=8)
    figure.tight_layout()
    return figure


def _image_rows(
    dataset: SegmentationDataset, indices: Sequence[int], rows: Sequence[str], run: Run | None = None
) -> Figure:
    """One column an image: the image, its label map (if there are any) and, with a run, what it makes of the image."""
    rows = [row for row in rows if row != "label" or dataset.has_labels]
    figure, axes = plt.subplots(len(rows), len(indices), figsize=(2.1 * len(indices), 2.3 * len(rows)), squeeze=False)
    for column, index in zip(axes.T, indices, strict=True):
        image, label = dataset[index]
        shown = image.permute(1, 2, 0).numpy()
        show_image(column[0], shown, dataset.names[index])
        if dataset.has_labels:
            show_image(column[1], paint(label, dataset.classes))
        if run is not None:
            show_image(column[-1], paint(run.predict(image), run.segments))
    for axis, text in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(text, fontsize=12)
    if len(rows) > 1:
        add_legend(figure, *([dataset.classes] if dataset.has_labels else []), *([run.segments] if run else []))
    else:
        figure.tight_layout()
    return figure


def show_image(axis: plt.Axes, image: np.ndarray, title: str | None = None) -> None:
    """An image without ticks; a long title is cut at its front."""
    height, width = image.shape[:2]
    step = -(-max(height, width) // SHOWN)
    axis.imshow(image[::step, ::step], interpolation="nearest", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    axis.set(xticks=[], yticks=[])
    axis.grid(visible=False)
    if title:
        short = title if len(title) <= 16 else f"…{title[-15:]}"
        axis.set_title(short, fontsize=12, parse_math=False, fontfamily=find_fonts(title))


def add_legend(figure: Figure, *classes: Classes) -> None:
    """The classes and their colors, below the figure; what is in several of `classes` once."""
    entries = list(dict.fromkeys(pair for some in classes for pair in zip(some.names, some.colors, strict=True)))
    find_fonts(*(name for name, _ in entries))
    figure.tight_layout()
    legend = figure.legend(
        handles=[Patch(facecolor=np.array(color) / 255, edgecolor="0.6") for _, color in entries],
        labels=["x"] * len(entries),  # a legend leaves out what is called "_background_"
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncol=min(8, len(entries)),
        fontsize=11,
        frameon=False,
    )
    for text, (name, _) in zip(legend.get_texts(), entries, strict=True):
        text.set_text(name)
    as_they_are(legend.get_texts())


def as_they_are(texts: Iterable[Text]) -> None:
    """Keeps dollar signs in names from being read as formulas."""
    for text in texts:
        text.set_parse_math(False)


def find_fonts(*texts: str) -> list[str]:
    """Font families for these texts: the usual ones, and installed ones that have the letters which those lack.

    What is drawn from now on falls back on them too; text that an axis already has (titles, labels of axes) must be given
    them. A notice tells of each script that no font has.
    """
    families = list(plt.rcParams["font.family"])
    missing = {letter for text in texts for letter in text if letter.isprintable()} - _letters(families)
    for font in font_manager.fontManager.ttflist if missing else []:
        if font.name not in families and not font.name.startswith("Last Resort") and missing & _letters_of(font.fname):
            families.append(font.name)
            missing -= _letters_of(font.fname)
    plt.rcParams["font.family"] = families
    scripts = {unicodedata.name(letter, "other").partition(" ")[0]: letter for letter in sorted(missing)}
    if new := set(scripts) - _BOXES:
        _BOXES.update(new)
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # matplotlib says it of each letter
        told = ", ".join(f"{script} (such as {scripts[script]})" for script in sorted(new))
        notice(
            f"no font on this machine has letters of some names, {told}: figures show boxes in their place; install a font that "
            "has them (Noto Sans CJK, Noto Sans ...), and restart Python"
        )
    return families


_BOXES: set[str] = set()
"""Scripts of which it was said that no font has them."""


def _letters(families: Iterable[str]) -> set[str]:
    """What matplotlib can draw with these families."""
    paths = [font_manager.findfont(font_manager.FontProperties(family=[family])) for family in families]
    return set().union(*map(_letters_of, paths))


@cache
def _letters_of(path: str) -> frozenset[str]:
    """The letters that a font file has."""
    try:
        return frozenset(map(chr, font_manager.get_font(path).get_charmap()))
    except (OSError, RuntimeError):  # moved or broken since the list of fonts was made
        return frozenset()
