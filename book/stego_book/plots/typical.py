"""Typical patches and tree of clusters, and a form for their names."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy.cluster.hierarchy import ClusterNode

from stego_lib.annotations.names import branches
from stego_lib.datasets.images import as_tensor
from stego_lib.run import Run
from stego_lib.utils.errors import StegoError
from stego_lib.utils.notices import notice
from stego_lib.utils.progress import progress, unattended

from .grids import image_grid

# Side of the displayed part of an image, in patches.
CONTEXT = 9
# Width of the tree, in inches.
TREE = 2.2


class Patch(NamedTuple):
    """A grid cell of an image. cosine: cosine similarity of its code and the cluster center."""

    image: Path
    row: int
    column: int
    grid: tuple[int, int]
    cosine: float


@torch.inference_mode()
def typical_patches(run: Run, images: Sequence[Path], count: int = 6) -> tuple[list[list[Patch]], np.ndarray]:
    """The most typical patches of each cluster: the cells with the largest cosine similarity to its center.

    images: image files of one folder. count: patches per cluster, at most one per image. Returns the patches of each
    cluster, most typical first (fewer if the cluster occurs in fewer images), and the fraction of grid cells in each
    cluster, float64 (n_clusters,). Raises StegoError if no image is readable (a notice names unreadable ones), and for
    a run with a classifier of `run.teach`.
    """
    if not images or count < 1:
        raise StegoError(f"{count} typical patches of {len(images)} images cannot be shown. Take at least 1.")
    run.check_fitted()
    if run.taught is not None:
        raise StegoError("The segments have names from run.teach. Call run.teach(None) first.")
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


def tree_rows(run: Run, shares: np.ndarray, count: int = 20, branch: str = "branch 0") -> dict[str, list[int]]:
    """Rows of the figure: the clusters of a run, or, if there are more than `count`, branches of their tree.

    The highest branch is split until there are `count` rows. shares: fraction of each cluster, from `typical_patches`;
    empty clusters are skipped. branch: the branch to show, see `Run.branches`.
    """
    nodes = branches(run.model.cluster_probe.clusters)
    if branch not in nodes:
        raise StegoError(f"There is no {branch!r} in the tree of {run.model.n_clusters} clusters. See run.branches.")
    parts = [nodes[branch]]
    while True:
        parts = [part for part in parts if shares[part.pre_order()].any()]
        highest = max(range(len(parts)), key=lambda i: (not parts[i].is_leaf(), parts[i].dist), default=0)
        if len(parts) >= count or all(part.is_leaf() for part in parts):
            names = {node.id: name for name, node in nodes.items()}
            names |= {cluster: run.unnamed_segments.names[id_] for cluster, id_ in enumerate(run.unnamed_ids)}
            return {names[part.id]: part.pre_order() for part in parts}
        parts[highest : highest + 1] = [parts[highest].left, parts[highest].right]


def patch_tree(
    run: Run, patches: Sequence[Sequence[Patch]], rows: Mapping[str, Sequence[int]], count: int = 6
) -> Figure:
    """The tree of rows and the most typical patches of each row, framed in the surrounding part of the image.

    patches: from `typical_patches`. rows: from `tree_rows`; a branch shows the first patch of each of its
    clusters, then the second. The tree's horizontal axis is the distance of the two parts of a branch.
    """
    table: dict[str, list[np.ndarray | None]] = {}
    frames: list[tuple[float, float, float, float] | None] = []
    for name, clusters in rows.items():
        by_rank = chain.from_iterable(zip_longest(*(patches[cluster] for cluster in clusters)))
        crops = [_in_context(patch, run) for patch in by_rank if patch is not None][:count]
        empty = [None] * (count - len(crops))
        label = name if len(clusters) == 1 else f"{name}\n({len(clusters)})"
        table[label] = [*(crop for crop, _ in crops), *empty]
        frames += [*(frame for _, frame in crops), *empty]
    figure = image_grid(table, brighten=False)
    for axis, frame in zip(figure.axes, frames, strict=True):
        if frame is not None:
            left, top, width, height = frame
            for color, line in (("black", 3.0), ("white", 1.4)):  # visible on dark and bright images
                corner = (left - 0.5, top - 0.5)
                axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=color, linewidth=line))
    boxes = [axis.get_position() for axis in figure.axes[::count]]
    places = {tuple(clusters): (box.y0 + box.y1) / 2 for clusters, box in zip(rows.values(), boxes, strict=True)}
    _draw_tree(run, figure, places)
    return figure


def _draw_tree(run: Run, figure: Figure, places: Mapping[tuple[int, ...], float]) -> None:
    """Draws the tree at the left of a figure. places: clusters of a row -> its height in the figure."""
    width = TREE / figure.get_figwidth()
    axis = figure.add_axes((-width - 0.05, 0, width, 1), ylim=(0, 1))
    nodes, shown = branches(run.model.cluster_probe.clusters), set(chain.from_iterable(places))
    numbers = {node.id: name.removeprefix("branch ") for name, node in nodes.items()}

    def draw(node: ClusterNode) -> tuple[float, float]:
        """Draws the subtree of a node. Returns the node's distance and height in the figure."""
        if (place := places.get(tuple(node.pre_order()))) is not None:
            return node.dist, place
        ends = [draw(part) for part in (node.left, node.right) if shown & set(part.pre_order())]
        if len(ends) == 1:
            return ends[0]
        middle = (ends[0][1] + ends[1][1]) / 2
        xs = [ends[0][0], node.dist, node.dist, ends[1][0]]
        axis.plot(xs, [ends[0][1]] * 2 + [ends[1][1]] * 2, color="black", linewidth=1)
        axis.text(node.dist, middle, f"{numbers[node.id]} ", fontsize=9, ha="right", va="bottom")
        return node.dist, middle

    draw(nodes["branch 0"])
    axis.set(xlabel="distance", yticks=[])
    axis.set_xlim(axis.get_xlim()[1], 0)
    axis.grid(visible=False)
    axis.spines[["left", "top", "right"]].set_visible(False)


def _in_context(patch: Patch, run: Run) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """A square crop around a patch, uint8 (s, s, 3), and the patch in it: left, top, width, height."""
    image = as_tensor(patch.image, run.classes.rules)[0].movedim(0, -1).numpy()
    height, width = image.shape[0] / patch.grid[0], image.shape[1] / patch.grid[1]
    side = min(round(CONTEXT * max(height, width)), *image.shape[:2])
    top = round(np.clip((patch.row + 0.5) * height - side / 2, 0, image.shape[0] - side))
    left = round(np.clip((patch.column + 0.5) * width - side / 2, 0, image.shape[1] - side))
    frame = (patch.column * width - left, patch.row * height - top, width, height)
    return image[top : top + side, left : left + side], frame


def name_form(run: Run, rows: Mapping[str, Sequence[int]] | None = None) -> Any:
    """A form for JupyterLab: fields for names of segments and branches, and a button for `Run.name_segments`.

    Equal names merge segments; an empty field drops one. rows: from `tree_rows`, all segments by default. Returns None
    in unattended notebooks, outside of notebooks, and without ipywidgets.
    """
    try:
        import ipywidgets as widgets
        from IPython import get_ipython
    except ImportError:
        return None
    if get_ipython() is None or unattended():
        return None
    clusters = {run.unnamed_segments.names[id_]: [cluster] for cluster, id_ in enumerate(run.unnamed_ids)}
    rows = rows or {name: clusters[name] for name in run.unnamed_segments.names if name in clusters}
    values = {row: Counter(run.names.get(c, row) for c in rows[row]).most_common(1)[0][0] for row in rows}
    row_of = {cluster: row for row in rows for cluster in rows[row]}
    for name, (cluster,) in clusters.items():  # names that differ from those of their branches
        if cluster in run.names and run.names[cluster] != values.get(row_of.get(cluster, "")):
            values[name] = run.names[cluster]

    def field(place: str) -> Any:
        options = {"placeholder": "(dropped)", "style": {"description_width": "8em"}}
        return widgets.Text(value=values.get(place, place) or "", description=place, **options)

    def save(_: Any) -> None:
        try:
            run.name_segments({field.description: field.value.strip() or None for field in fields.children})
            message.value = f"saved: {', '.join(run.segments.names)}"
        except StegoError as error:
            message.value = str(error)

    fields = widgets.VBox([field(place) for place in values])
    button, message = widgets.Button(description="Save the names"), widgets.Label()
    button.on_click(save)
    return widgets.VBox([fields, widgets.HBox([button, message])])
