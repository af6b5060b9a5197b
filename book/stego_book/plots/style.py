"""Common parts of figures: style, panels, class colors, legends."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from stego_lib.datasets import Classes
from stego_lib.utils.paths import user_path

# Color of ignored pixels.
UNMATCHED = (255, 255, 255)
# Maximal side of an image in a figure, in pixels; larger images are subsampled.
SHOWN = 1024
# Fonts for letters that matplotlib's own font lacks, if they are installed.
FALLBACK_FONTS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans CJK KR", "Noto Sans Arabic", "Noto Sans Devanagari"),
    *("Hiragino Sans", "PingFang SC", "Apple SD Gothic Neo", "Yu Gothic", "Microsoft YaHei", "Malgun Gothic"),
    "Arial Unicode MS",
)


def use_style() -> None:
    """Sets the style of all figures: legible at book width, colorblind-safe colors, names shown as they are."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=0.95)
    plt.rcParams.update({"figure.dpi": 110, "savefig.dpi": 150, "savefig.bbox": "tight", "axes.titleweight": "bold"})
    plt.rcParams["text.parse_math"] = False  # dollar signs in names of classes and files
    installed = {font.name for font in font_manager.fontManager.ttflist}
    plt.rcParams["font.family"] = ["sans-serif", *(name for name in FALLBACK_FONTS if name in installed)]


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


def show_image(axis: plt.Axes, image: np.ndarray | Tensor, title: str = "") -> None:
    """An image, (H, W, 3) or a tensor (3, H, W), without ticks."""
    image = image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else image
    height, width = image.shape[:2]
    step = -(-max(height, width) // SHOWN)
    axis.imshow(image[::step, ::step], interpolation="nearest", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    hide_ticks(axis)
    axis.set_title(title, fontsize=12)


def add_legend(figure: Figure, *classes: Classes, ignored: bool = False) -> None:
    """Legend of classes and colors below the figure, without duplicates.

    ignored: include the color of ignored pixels.
    """
    entries = list(dict.fromkeys(pair for some in classes for pair in zip(some.names, some.colors, strict=True)))
    entries += [("ignored", UNMATCHED)] if ignored else []
    handles = [Patch(facecolor=np.array(color) / 255, edgecolor="0.6") for _, color in entries]
    options = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "frameon": False, "fontsize": 10}
    options |= {"ncol": min(8, len(entries)), "handlelength": 1.2, "columnspacing": 1.2}
    legend = figure.legend(handles, ["x"] * len(entries), **options)  # a legend skips names like "_background_"
    for text, (name, _) in zip(legend.get_texts(), entries, strict=True):
        text.set_text(name)
