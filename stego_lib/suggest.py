"""Suggests places to label, see `Run.suggest`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor

from .teach import MAPS, paths_by_name, read_maps
from .utils.errors import StegoError, check_choice
from .utils.progress import progress, stage
from .utils.torch_state import usual_modes

if TYPE_CHECKING:
    from .run import Run

# Approximate number of sampled grid cells of all images; at least one per image.
CELLS = 20_000


@usual_modes()
def suggest(run: "Run", images: str | Path | Sequence[Any], count: int, on: str, seed: int) -> pd.DataFrame:
    """Typical places of `count` clusters, see `Run.suggest`."""
    run.check_fitted()
    check_choice("on", on, MAPS)
    places, points = sample_places(run, images, on, seed)
    different = len(F.normalize(points, dim=1).unique(dim=0))
    if not 1 <= count <= different:
        raise StegoError(f"count={count} is not between 1 and {different}, the number of different grid cells.")
    return places.iloc[typical(points, count, seed)].reset_index(drop=True)


@torch.inference_mode()
def sample_places(
    run: "Run", images: str | Path | Sequence[Any], on: str = "codes", seed: int = 0
) -> tuple[pd.DataFrame, Tensor]:
    """Samples grid cells of each image: a table of their central pixels (image, x, y), and their codes (M, C)."""
    paths, generator = paths_by_name(images), torch.Generator().manual_seed(seed)
    tables, points = [], []
    for name, path in progress(paths.items(), "reading images"):
        pixels, maps = read_maps(run, path, on)
        (height, width), (rows, columns) = pixels.shape[1:], maps.shape[2:]
        cells = torch.randperm(rows * columns, generator=generator)[: max(1, CELLS // len(paths))]
        points.append(maps[0].flatten(1).T.cpu()[cells].float())
        row, column = np.divmod(cells.numpy(), columns)
        x, y = (2 * column + 1) * width // (2 * columns), (2 * row + 1) * height // (2 * rows)
        tables.append(pd.DataFrame({"image": name, "x": x, "y": y}))
    return pd.concat(tables, ignore_index=True), torch.cat(points)


def typical(points: Tensor, clusters: int, seed: int) -> np.ndarray:
    """Index of the point nearest to the center of each k-means cluster of unit vectors (M, C), int64 (clusters,).

    Clusters are sorted by decreasing size.
    """
    unit = F.normalize(points, dim=1).numpy()
    with stage(f"finding {clusters} kinds of places (k-means)"):
        fitted = KMeans(clusters, n_init=1, random_state=seed).fit(unit)
    distances = np.linalg.norm(unit - fitted.cluster_centers_[fitted.labels_], axis=1)
    order = np.lexsort((distances, fitted.labels_))
    _, first, sizes = np.unique(fitted.labels_[order], return_index=True, return_counts=True)
    return order[first][np.argsort(-sizes, kind="stable")]
