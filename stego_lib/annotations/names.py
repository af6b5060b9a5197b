"""The segments of a run, and names.json, which names them. Equal names merge clusters, None drops one."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from scipy.cluster.hierarchy import ClusterNode, linkage, to_tree
from torch import Tensor

from ..datasets.classes import Classes, distinct_names, muted_colors
from ..utils.errors import StegoError, did_you_mean, outdated
from ..utils.files import fingerprint, read_json, write_json

# Name of the file in a run's folder.
FILE = "names.json"
# Id, in label maps, of pixels that belong to no segment: transparent ones, and those of dropped clusters.
NOTHING = 255


def merge(ids: np.ndarray, known: Classes, names: Mapping[int, str | None]) -> tuple[np.ndarray, Classes]:
    """The id of each cluster and the segments, once clusters have names.

    Clusters of one name are one segment, with the color of the first. Ids are consecutive, in the order of `known`.

    Parameters
    ----------
    ids, known
        Segment of each cluster, uint8 (n_clusters,), each at most once, and the names of these segments.
    names
        Cluster -> its name, None to drop it.

    Returns
    -------
    tuple
        uint8 (n_clusters,) with `NOTHING` for dropped clusters, and the segments.

    Raises
    ------
    StegoError
        If every segment is dropped, and for an empty name.

    Examples
    --------
    >>> known = Classes(("a", "b"), ((255, 0, 0), (0, 255, 0)))
    >>> merge(np.array([1, 0], np.uint8), known, {0: "a"})[0].tolist()
    [0, 0]
    """
    name_of: dict[int, str | None] = dict(enumerate(known.names))
    name_of |= {int(ids[cluster]): name for cluster, name in names.items()}
    colors: dict[str, tuple[int, int, int]] = {}
    for id_, name in name_of.items():
        if name is not None:
            colors.setdefault(name, known.colors[id_])
    if not colors:
        raise StegoError("Every segment is dropped. Keep at least one.")
    position = {name: number for number, name in enumerate(colors)}
    merged = [NOTHING if (name := name_of[int(id_)]) is None else position[name] for id_ in ids]
    return np.array(merged, np.uint8), Classes(tuple(distinct_names(list(colors))), tuple(colors.values()))


def branches(centers: Tensor) -> dict[str, ClusterNode]:
    """The branches of the tree of cluster centers, by name.

    Ward linkage of the normalized centers: it joins the two branches whose union has the smallest increase in the sum
    of squared distances from the mean, which is what k-means minimizes. Branches are numbered from the top: "branch 0"
    is the whole tree, and splitting branches 0 to k - 2 gives k parts.

    Parameters
    ----------
    centers
        Cluster centers (n, K).

    Returns
    -------
    dict
        Name -> node; `dist` is the root of twice the increase, and for two clusters their Euclidean distance;
        `pre_order()` gives its clusters. Empty for one cluster.

    Examples
    --------
    >>> branches(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]))["branch 1"].pre_order()
    [1, 2]
    """
    if len(centers) < 2:
        return {}
    unit = F.normalize(centers.detach().double().cpu(), dim=1)
    nodes = to_tree(linkage(unit.numpy(), "ward"), rd=True)[1]
    return {f"branch {number}": node for number, node in enumerate(reversed(nodes[len(centers) :]))}


class Naming:
    """The segments of a run: its clusters, matched by metrics.json and named by names.json in its folder.

    step, centers: the run's step and cluster centers; both files are valid for these alone.
    """

    def __init__(self, folder: Path, classes: Classes, step: int, centers: Tensor):
        self.folder, self.classes, self.step, self.centers = folder, classes, step, centers
        self.count = len(centers)

    @property
    def matching(self) -> list[int] | None:
        """Class of each cluster, -1 for one without; None before this step was evaluated."""
        path = self.folder / "metrics.json"
        record = read_json(path) if path.exists() else {}
        matching = record.get("matching") if record.get("step") == self.step else None
        classes = range(-1, len(self.classes))
        if matching is not None and (len(matching) != self.count or any(c not in classes for c in matching)):
            raise outdated(path, "evaluate(run)")
        return matching

    @property
    def unnamed(self) -> tuple[np.ndarray, Classes]:
        """Id of each cluster, uint8 (n_clusters,), and the segments: matched classes, then clusters without a class.

        Clusters are called "cluster 0" and so on, in muted colors, so that nobody takes them for classes.
        """
        matching, own = self.matching, self.classes
        ids = np.arange(self.count) if matching is None else np.array(matching)
        if matching is None and not all(re.fullmatch(r"cluster \d+", name) for name in own.names):
            own = Classes((), ())
        others = ids >= len(own) if matching is None else ids < 0
        ids[others] = len(own) + np.arange(others.sum())
        names = [*own.names, *(f"cluster {cluster}" for cluster in np.flatnonzero(others))]
        segments = Classes(tuple(distinct_names(names)), (*own.colors, *muted_colors(int(others.sum()))))
        return ids.astype(np.uint8), segments

    @property
    def branches(self) -> dict[str, list[int]]:
        """Clusters of each of the `branches` of the tree of centers."""
        return {name: sorted(node.pre_order()) for name, node in branches(self.centers).items()}

    @property
    def names(self) -> dict[int, str | None]:
        """Cluster -> its name, None if dropped; empty without names.json. StegoError for names of other clusters."""
        path = self.folder / FILE
        if not path.exists():
            return {}
        content = read_json(path)
        if not isinstance(content, dict) or content.get("clusters") != fingerprint(self.centers):
            raise outdated(path, "run.name_segments(...)")
        return {int(cluster): name for cluster, name in content["names"].items()}

    @property
    def named(self) -> tuple[np.ndarray, Classes]:
        """`unnamed` with the names of names.json; `NOTHING` is the id of dropped clusters."""
        return merge(*self.unnamed, self.names)

    def write(self, names: Mapping[str, str | None]) -> None:
        """Writes names.json. names: segment or branch -> its new name, None to drop it. As in `Run.name_segments`."""
        ids, known = self.unnamed
        segments = {name: np.flatnonzero(ids == id_).tolist() for id_, name in enumerate(known.names)}
        clusters = self.branches | segments
        for name, new in names.items() if isinstance(names, Mapping) else [(str(names), "")]:
            if name not in clusters or not isinstance(new, str | None):
                guess = did_you_mean(str(name), list(clusters))
                raise StegoError(
                    f"{name!r}: {new!r} names no segment or branch{guess}. "
                    f"Map {', '.join(known.names[:3])}, ... or a name in run.branches to a name or None."
                )
        by_cluster: dict[int, str | None] = {}
        for name in sorted(names, key=lambda name: (name in segments, -len(clusters[name]))):  # a part overrides
            by_cluster |= dict.fromkeys(clusters[name], names[name])
        merge(ids, known, by_cluster)
        content = {"step": self.step, "clusters": fingerprint(self.centers), "names": by_cluster}
        write_json(self.folder / FILE, content)
