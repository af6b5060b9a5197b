"""Common parts of figures: style, panels, class colors, legends, fonts."""

import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from torch import Tensor

from stego_lib.datasets import Classes
from stego_lib.utils.notices import notice
from stego_lib.utils.paths import user_path

# Color of ignored pixels.
UNMATCHED = (255, 255, 255)
# Maximal side of an image in a figure, in pixels; larger images are subsampled.
SHOWN = 1024


def use_style() -> None:
    """Sets the style of all figures: legible at book width, colorblind-safe colors."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=0.95)
    plt.rcParams.update({"figure.dpi": 110, "savefig.dpi": 150, "savefig.bbox": "tight", "axes.titleweight": "bold"})


def panels(
    count: int, columns: int | None = None, *, size: tuple[float, float], sharey: bool = False, **options: object
) -> tuple[Figure, list[plt.Axes]]:
    """A figure with `count` axes, `columns` per row (None: all), each of `size` (width, height) in inches."""
    columns = min(count, columns or count)
    lines = -(-count // columns)
    options |= {"figsize": (size[0] * columns, size[1] * lines), "layout": "constrained"}
    figure, axes = plt.subplots(lines, columns, sharey=sharey, squeeze=False, **options)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, list(axes.flat[:count])


def bars_and_dots(axis: plt.Axes, table: pd.DataFrame, x: str, y: str, order: Sequence[str] | None = None) -> None:
    """Bars for means, dots for single values."""
    options = {"x": x, "y": y, "order": order, "ax": axis}
    sns.barplot(table, errorbar=None, color=sns.color_palette("pastel")[0], **options)
    sns.stripplot(table, color="black", size=4, jitter=0.12, **options)
    axis.set(ylabel="")


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


def hide_ticks(axis: plt.Axes) -> None:
    """Removes ticks and grid lines."""
    axis.set(xticks=[], yticks=[])
    axis.grid(visible=False)


def show_image(axis: plt.Axes, image: np.ndarray | Tensor, title: str | None = None) -> None:
    """An image, (H, W, 3) or a tensor (3, H, W), without ticks."""
    image = image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else image
    height, width = image.shape[:2]
    step = -(-max(height, width) // SHOWN)
    axis.imshow(image[::step, ::step], interpolation="nearest", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    hide_ticks(axis)
    if title:
        axis.set_title(title, fontsize=12, parse_math=False, fontfamily=find_fonts(title))


def add_legend(figure: Figure, *classes: Classes, ignored: bool = False) -> None:
    """Legend of classes and colors below the figure, without duplicates.

    ignored: include the color of ignored pixels.
    """
    entries = list(dict.fromkeys(pair for some in classes for pair in zip(some.names, some.colors, strict=True)))
    entries += [("ignored", UNMATCHED)] if ignored else []
    names = [name for name, _ in entries]
    find_fonts(*names)
    handles = [Patch(facecolor=np.array(color) / 255, edgecolor="0.6") for _, color in entries]
    options = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "frameon": False, "fontsize": 10}
    options |= {"ncol": min(8, len(entries)), "handlelength": 1.2, "columnspacing": 1.2}
    legend = figure.legend(handles, ["x"] * len(names), **options)  # a legend skips names like "_background_"
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)
    as_they_are(legend.get_texts())


def as_they_are(texts: Iterable[Text]) -> None:
    """Keeps dollar signs in names from being read as formulas."""
    for text in texts:
        text.set_parse_math(False)


def find_fonts(*texts: str) -> list[str]:
    """Font families for these texts: the default ones, and installed ones with missing letters.

    Later figures use them as fallback; existing titles and axis labels need them as `fontfamily`. A notice names
    letters that no font has, once.
    """
    families = list(plt.rcParams["font.family"])
    usual = [font_manager.findfont(font_manager.FontProperties(family=[family])) for family in families]
    missing = {letter for text in texts for letter in text if letter.isprintable()}.difference(*map(_letters, usual))
    for font in font_manager.fontManager.ttflist if missing else []:
        if missing & _letters(font.fname) and not font.name.startswith("Last Resort"):
            families.append(font.name)
            missing -= _letters(font.fname)
    plt.rcParams["font.family"] = families
    if new := missing - _WITHOUT_FONT:
        _WITHOUT_FONT.update(new)
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # one per letter
        letters = "".join(sorted(new)[:10])
        notice(f"no installed font has the letters {letters}. Install one, such as Noto Sans CJK.")
    return families


# Letters already named in a notice.
_WITHOUT_FONT: set[str] = set()


@cache
def _letters(path: str) -> frozenset[str]:
    """The letters of a font file."""
    try:
        return frozenset(map(chr, font_manager.get_font(path).get_charmap()))
    except (OSError, RuntimeError):  # moved or broken font file
        return frozenset()
