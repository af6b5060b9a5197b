"""What a cluster shows: its most typical patches, a form for its name, and how many clusters there should be."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from stego_lib.datasets.classes import read_classes
from stego_lib.datasets.images import as_tensor, read_image
from stego_lib.run import Run
from stego_lib.utils.errors import StegoError
from stego_lib.utils.progress import progress, unattended

from ..studies.cluster_counts import CRITERIA
from .grids import image_grid

CONTEXT = 9
"""Sides of a shown part of an image, in patches."""


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
        Without images, for one that cannot be read, and for a run that has no clusters yet.
    """
    if not images:
        raise StegoError("there are no images to find typical patches in")
    run.check_fitted()
    rules = read_classes(Path(images[0]).parent / "classes.json", run.classes).rules
    found: list[list[Patch]] = [[] for _ in range(run.model.n_clusters)]
    cells = np.zeros(run.model.n_clusters)
    for path in progress(images, "typical patches"):
        cosines = run.model.cluster_probe(run.scores(as_tensor(Path(path), rules)[0]).code)[0].float().cpu()
        best, nearest = cosines.max(0)
        height, width = best.shape
        cells += np.bincount(nearest.flatten().numpy(), minlength=len(cells))
        for cluster in nearest.unique().tolist():
            at = int(torch.where(nearest == cluster, best, -2.0).argmax())
            found[cluster].append(
                Patch(Path(path), at // width, at % width, (height, width), float(best.flatten()[at]))
            )
    chosen = [sorted(patches, key=lambda patch: -patch.cosine)[:count] for patches in found]
    return chosen, cells / cells.sum()


def patch_grid(run: Run, patches: Sequence[Sequence[Patch]], count: int = 6) -> Figure:
    """One row a cluster: its patches in the part of the image around them, each in a frame. Empty clusters are left
    out.

    patches: as from `typical_patches`. count: columns.
    """
    names, of_cluster = run.unnamed_segments.names, run.unnamed_ids
    rows: dict[str, list[np.ndarray | None]] = {}
    frames: list[tuple[float, float, float, float] | None] = []
    for cluster, some in enumerate(patches):
        if not some:
            continue
        crops = [*(_in_context(patch, run) for patch in some[:count]), *[None] * (count - len(some[:count]))]
        rows[names[of_cluster[cluster]]] = [crop and crop[0] for crop in crops]
        frames += [crop and crop[1] for crop in crops]
    figure = image_grid(rows, brighten=False)
    for axis, frame in zip(figure.axes, frames, strict=True):
        if frame is not None:
            left, top, width, height = frame
            for color, line in (("black", 3.0), ("white", 1.4)):  # seen on dark and on bright images
                axis.add_patch(
                    Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=color, linewidth=line)
                )
    return figure


def _in_context(patch: Patch, run: Run) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """A square part of the image around a patch, uint8 (s, s, 3), and the patch in it: left, top, width, height."""
    image = np.asarray(
        read_image(patch.image, read_classes(patch.image.parent / "classes.json", run.classes).rules).rgb
    )
    height, width = image.shape[0] / patch.grid[0], image.shape[1] / patch.grid[1]
    side = min(round(CONTEXT * max(height, width)), *image.shape[:2])
    top, left = (
        round(min(max((cell + 0.5) * length - side / 2, 0), whole - side))
        for cell, length, whole in zip((patch.row, patch.column), (height, width), image.shape[:2], strict=True)
    )
    return image[top : top + side, left : left + side], (
        patch.column * width - left,
        patch.row * height - top,
        width,
        height,
    )


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
    known, called = run.unnamed_segments, _present_names(run)
    fields = [
        widgets.Text(
            value=called[name] or "", description=name, placeholder="(dropped)", style={"description_width": "8em"}
        )
        for name in known.names
    ]
    button, told = widgets.Button(description="Save the names"), widgets.Label()

    def save(_: Any) -> None:
        try:
            run.name_segments({field.description: field.value.strip() or None for field in fields})
            told.value = f"saved: {', '.join(run.segments.names)}"
        except StegoError as error:
            told.value = str(error)

    button.on_click(save)
    return widgets.VBox([*fields, widgets.HBox([button, told])])


def _present_names(run: Run) -> dict[str, str | None]:
    """Name of each unnamed segment now, None for a dropped one."""
    known = run.unnamed_segments.names
    names: dict[str, str | None] = {name: name for name in known}
    return names | {known[run.unnamed_ids[cluster]]: name for cluster, name in run.names.items()}


def cluster_counts(records: Sequence[dict[str, Any]]) -> Figure:
    """mIoU by the number of clusters, and where each criterion would choose, one panel a dataset, from
    `studies.cluster_counts`.
    """
    datasets = list(dict.fromkeys(record["experiment"]["dataset"] for record in records))
    figure, axes = plt.subplots(1, len(datasets), figsize=(5 * len(datasets), 4), squeeze=False, layout="constrained")
    for axis, dataset in zip(axes[0], datasets, strict=True):
        own = [record for record in records if record["experiment"]["dataset"] == dataset]
        for number, record in enumerate(own):
            first = number == 0
            axis.plot(
                record["counts"],
                record["miou"],
                color="black",
                alpha=0.6,
                label="matched one to one" if first else None,
            )
            axis.plot(
                record["counts"], record["miou_named"], color="black", alpha=0.6, linestyle=":",
                label="each cluster named and merged" if first else None,
            )  # fmt: skip
            for index, (name, way) in enumerate(CRITERIA.items()):
                at = int((np.argmax if way == "max" else np.argmin)(record["criteria"][name]))
                axis.scatter(
                    record["counts"][at], record["miou"][at], color=f"C{index}", marker="osD^v"[index], s=70, zorder=3,
                    label=name if first else None,
                )  # fmt: skip
        axis.axvline(own[0]["classes"], color="0.5", linewidth=1, linestyle="--", label="number of classes")
        axis.set(title=dataset, xlabel="clusters", ylabel="mIoU (%)")
    axes[0, 0].legend(fontsize=8)
    return figure
