"""The segments of a run, and their names in names.json."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from scipy.cluster.hierarchy import ClusterNode, linkage, to_tree
from torch import Tensor

from ..datasets.classes import Classes, distinct_colors, distinct_names
from ..utils.errors import StegoError, did_you_mean, outdated
from ..utils.files import fingerprint, read_json, write_json

# File name in the run folder.
FILE = "names.json"
# Id in label maps of pixels without a segment: transparent pixels and dropped clusters.
NO_SEGMENT = 255


def merge(ids: np.ndarray, known: Classes, names: Mapping[int, str | None]) -> tuple[np.ndarray, Classes]:
    """Names clusters: returns the id of each cluster, uint8 (n_clusters,), and the segments.

    Clusters with equal names are merged into one segment with the color of the first; the id of dropped clusters is
    `NO_SEGMENT`. ids, known: distinct segment of each cluster, uint8 (n_clusters,), and all segments. names: cluster ->
    name, or None to drop it. Raises StegoError for invalid names and if all segments are dropped.
    """
    new_names: list[str | None] = list(known.names)
    for cluster, name in names.items():
        new_names[ids[cluster]] = name
    kept = list(dict.fromkeys(name for name in new_names if name is not None))
    if not kept:
        raise StegoError("All segments are dropped. Keep at least one.")
    merged = [NO_SEGMENT if (name := new_names[id_]) is None else kept.index(name) for id_ in ids]
    colors = [known.colors[new_names.index(name)] for name in kept]
    return np.array(merged, np.uint8), Classes(tuple(distinct_names(kept)), tuple(colors))


def branches(centers: Tensor) -> dict[str, ClusterNode]:
    """Hierarchical clustering of normalized cluster centers (n, K) by Ward linkage: name -> node of the tree.

    Branches are numbered from the top: "branch 0" is the whole tree, and splitting branches 0 to k - 2 gives k parts.
    `node.pre_order()` returns the clusters of a branch. Empty for a single cluster.
    """
    if len(centers) < 2:
        return {}
    unit = F.normalize(centers.detach().double().cpu(), dim=1)
    nodes = to_tree(linkage(unit.numpy(), "ward"), rd=True)[1]
    return {f"branch {number}": node for number, node in enumerate(reversed(nodes[len(centers) :]))}


class Naming:
    """The segments of a run: clusters matched by metrics.json and named by names.json.

    step, centers: step and cluster centers of the run, for which both files must be valid.
    """

    def __init__(self, folder: Path, classes: Classes, step: int, centers: Tensor):
        self.folder, self.classes, self.step, self.centers = folder, classes, step, centers
        self.count = len(centers)

    @property
    def matching(self) -> list[int] | None:
        """Class of each cluster, -1 for unmatched clusters; None before `evaluate`."""
        path = self.folder / "metrics.json"
        record = read_json(path) if path.exists() else {}
        return record.get("matching") if record.get("step") == self.step else None

    @property
    def unnamed(self) -> tuple[np.ndarray, Classes]:
        """Id of each cluster, uint8 (n_clusters,), and segments: classes, then unmatched clusters.

        Unmatched clusters have names such as "cluster 0" and muted colors.
        """
        matching, own = self.matching, self.classes
        ids = np.arange(self.count) if matching is None else np.array(matching)
        if matching is None and not all(re.fullmatch(r"cluster \d+", name) for name in own.names):
            own = Classes((), ())
        others = ids >= len(own) if matching is None else ids < 0
        ids[others] = len(own) + np.arange(others.sum())
        names = [*own.names, *(f"cluster {cluster}" for cluster in np.flatnonzero(others))]
        muted = [(80 + 3 * r // 8, 80 + 3 * g // 8, 80 + 3 * b // 8) for r, g, b in distinct_colors(int(others.sum()))]
        segments = Classes(tuple(distinct_names(names)), (*own.colors, *muted))
        return ids.astype(np.uint8), segments

    @property
    def branches(self) -> dict[str, list[int]]:
        """Clusters of each branch, see `branches`."""
        return {name: sorted(node.pre_order()) for name, node in branches(self.centers).items()}

    @property
    def names(self) -> dict[int, str | None]:
        """Names of clusters, None if dropped. Raises StegoError for names of other clusters."""
        path = self.folder / FILE
        if not path.exists():
            return {}
        content = read_json(path)
        if content.get("clusters") != fingerprint(self.centers):
            raise outdated(path, "run.name_segments(...)")
        return {int(cluster): name for cluster, name in content["names"].items()}

    @property
    def named(self) -> tuple[np.ndarray, Classes]:
        """`unnamed` with the names in names.json, see `merge`."""
        return merge(*self.unnamed, self.names)

    def write(self, names: Mapping[str, str | None] | None) -> None:
        """Writes names.json, or deletes it. For names see `Run.name_segments`."""
        if names is None:
            return (self.folder / FILE).unlink(missing_ok=True)
        ids, known = self.unnamed
        segments = {name: np.flatnonzero(ids == id_).tolist() for id_, name in enumerate(known.names)}
        clusters = self.branches | segments
        problem = ""
        for name, new in names.items():
            if name not in clusters:
                problem = f"{name!r} is not a segment or branch{did_you_mean(str(name), list(clusters))}"
            elif not isinstance(new, str | None):
                problem = f"The new name of {name!r} is {new!r}, not text or None"
        if problem:
            raise StegoError(f"{problem}. See run.segments and run.branches.")
        by_cluster: dict[int, str | None] = {}
        for name in sorted(names, key=lambda name: (name in segments, -len(clusters[name]))):  # parts last
            by_cluster |= dict.fromkeys(clusters[name], names[name])
        merge(ids, known, by_cluster)
        content = {"step": self.step, "clusters": fingerprint(self.centers), "names": by_cluster}
        write_json(self.folder / FILE, content)
