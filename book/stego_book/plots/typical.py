"""What a cluster shows: its most typical patches, a form for its name, and how many clusters there should be."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from stego_lib.datasets.images import as_tensor
from stego_lib.run import Run
from stego_lib.utils.errors import StegoError
from stego_lib.utils.notices import notice
from stego_lib.utils.progress import progress, unattended

from ..studies.cluster_counts import choices
from .grids import image_grid
from .style import panels

# Sides of a shown part of an image, in patches.
CONTEXT = 9


@dataclass(frozen=True)
class Patch:
    """A grid cell of an image."""

    image: Path
    row: int
    column: int
    grid: tuple[int, int]
    """Height and width of the image's grid."""
    cosine: float
    """Of its code and the center of its cluster."""


@torch.inference_mode()
def typical_patches(run: Run, images: Sequence[Path], count: int = 6) -> tuple[list[list[Patch]], np.ndarray]:
    """The most typical patches of each cluster: those of its grid cells whose codes have the largest cosines with its
    center.

    Parameters
    ----------
    run
        The trained run.
    images
        Image files of one folder.
    count
        Patches a cluster, at most one of an image.

    Returns
    -------
    tuple
        For each cluster its patches, the most typical first (fewer, where the cluster is in fewer images); and each
        cluster's share of all grid cells, float64 (n_clusters,), which sums to 1. Cells in which an image is
        transparent count as others.

    Raises
    ------
    StegoError
        If no image can be read (others are left out with a notice), for a count below 1, and for a run that has no
        clusters yet.
    """
    if not images or count < 1:
        raise StegoError(f"{count} typical patches of {len(images)} images cannot be shown. Take at least 1.")
    run.check_fitted()
    broken: list[StegoError] = []
    candidates: list[list[Patch]] = [[] for _ in range(run.model.n_clusters)]
    cells = np.zeros(run.model.n_clusters)
    for path in progress(images, "typical patches"):
        try:
            image = as_tensor(Path(path), run.classes.rules)[0]
        except StegoError as error:
            broken.append(error)
            continue
        cosines = run.model.cluster_probe(run.scores(image).code)[0].float().cpu()
        best, nearest = cosines.max(0)
        cells += np.bincount(nearest.flatten().numpy(), minlength=len(cells))
        for cluster in nearest.unique().tolist():
            row, column = divmod(int(torch.where(nearest == cluster, best, -2.0).argmax()), best.shape[1])
            patch = Patch(Path(path), row, column, tuple(best.shape), float(best[row, column]))
            candidates[cluster].append(patch)
    if len(broken) == len(images):
        raise broken[0]
    if broken:
        notice(f"{len(broken)} of {len(images)} images cannot be read and are left out. The first: {broken[0]}")
    chosen = [sorted(patches, key=lambda patch: -patch.cosine)[:count] for patches in candidates]
    return chosen, cells / cells.sum()


def patch_grid(run: Run, patches: Sequence[Sequence[Patch]], count: int = 6) -> Figure:
    """One row a cluster: its `count` most typical patches in the part of the image around them, each in a frame.

    patches: as from `typical_patches`. Empty clusters are left out.
    """
    rows: dict[str, list[np.ndarray | None]] = {}
    frames: list[tuple[float, float, float, float] | None] = []
    for cluster, of_cluster in enumerate(patches):
        if of_cluster:
            crops = [_in_context(patch, run) for patch in of_cluster[:count]]
            empty = [None] * (count - len(crops))
            rows[run.unnamed_segments.names[run.unnamed_ids[cluster]]] = [*(crop for crop, _ in crops), *empty]
            frames += [*(frame for _, frame in crops), *empty]
    figure = image_grid(rows, brighten=False)
    for axis, frame in zip(figure.axes, frames, strict=True):
        if frame is not None:
            left, top, width, height = frame
            for color, line in (("black", 3.0), ("white", 1.4)):  # seen on dark and on bright images
                corner = (left - 0.5, top - 0.5)
                axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=color, linewidth=line))
    return figure


def _in_context(patch: Patch, run: Run) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """A square part of the image around a patch, uint8 (s, s, 3), and the patch in it: left, top, width, height."""
    image = as_tensor(patch.image, run.classes.rules)[0].movedim(0, -1).numpy()
    height, width = image.shape[0] / patch.grid[0], image.shape[1] / patch.grid[1]
    side = min(round(CONTEXT * max(height, width)), *image.shape[:2])
    top = round(np.clip((patch.row + 0.5) * height - side / 2, 0, image.shape[0] - side))
    left = round(np.clip((patch.column + 0.5) * width - side / 2, 0, image.shape[1] - side))
    frame = (patch.column * width - left, patch.row * height - top, width, height)
    return image[top : top + side, left : left + side], frame


def name_form(run: Run) -> Any:
    """A form for JupyterLab: a field for the name of each segment, and a button that saves them by `Run.name_segments`.

    Equal names merge; an empty field drops. None where nobody can type: in a notebook that runs unattended, outside of
    notebooks, or without ipywidgets.
    """
    try:
        import ipywidgets as widgets
        from IPython import get_ipython
    except ImportError:
        return None
    if get_ipython() is None or unattended():
        return None
    known = run.unnamed_segments.names
    names = dict(zip(known, known, strict=True)) | {
        known[run.unnamed_ids[cluster]]: name for cluster, name in run.names.items()
    }  # None for a dropped one
    options = {"placeholder": "(dropped)", "style": {"description_width": "8em"}}
    fields = [widgets.Text(value=names[segment] or "", description=segment, **options) for segment in known]
    button, message = widgets.Button(description="Save the names"), widgets.Label()

    def save(_: Any) -> None:
        try:
            run.name_segments({field.description: field.value.strip() or None for field in fields})
            message.value = f"saved: {', '.join(run.segments.names)}"
        except StegoError as error:
            message.value = str(error)

    button.on_click(save)
    return widgets.VBox([*fields, widgets.HBox([button, message])])


def cluster_counts(records: Sequence[dict[str, Any]]) -> Figure:
    """mIoU by the number of clusters, and where each criterion would choose, one panel a dataset."""
    datasets = list(dict.fromkeys(record["experiment"]["dataset"] for record in records))
    figure, axes = panels(len(datasets), size=(5, 4))
    for axis, dataset in zip(axes, datasets, strict=True):
        for record in (record for record in records if record["experiment"]["dataset"] == dataset):
            options = {"color": "black", "alpha": 0.6}
            axis.plot(record["counts"], record["miou"], label="matched one to one", **options)
            named = "each cluster named and merged"
            axis.plot(record["counts"], record["miou_named"], linestyle=":", label=named, **options)
            for number, (name, count) in enumerate(choices(record).items()):
                miou = record["miou"][record["counts"].index(count)]
                options = {"color": f"C{number}", "marker": "osD^v"[number], "s": 70, "zorder": 3}
                axis.scatter(count, miou, label=name, **options)
        axis.axvline(record["classes"], color="0.5", linewidth=1, linestyle="--", label="number of classes")
        axis.set(title=dataset, xlabel="clusters", ylabel="mIoU (%)")
    entries = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))  # each once
    axes[0].legend(entries.values(), entries.keys(), fontsize=8)
    return figure
