"""names.json: names that a person gave to the clusters of a run. Equal names merge clusters, None drops one."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from ..datasets.classes import Classes, distinct_names
from ..utils.errors import StegoError, did_you_mean
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


def write_names(
    path: Path, names: Mapping[str, str | None], known: Classes, ids: np.ndarray, step: int, centers: Tensor
) -> None:
    """Writes names.json.

    Parameters
    ----------
    path
        The file.
    names
        Segment -> its new name; None drops it. Segments that are left out keep their names.
    known, ids
        The segments without names.json, and the segment of each cluster, uint8 (n_clusters,).
    step, centers
        Step of the run and its cluster centers: the names are valid for these alone.

    Raises
    ------
    StegoError
        For an unknown segment, and if no segment is left.
    """
    for name, new in names.items():
        if name not in known.names or not isinstance(new, str | None):
            guess = did_you_mean(str(name), list(known.names))
            raise StegoError(
                f"{name!r}: {new!r} names no segment{guess}. Map names of {', '.join(known.names)} to a name or None."
            )
    by_cluster = {c: names[known.names[id_]] for c, id_ in enumerate(ids.tolist()) if known.names[id_] in names}
    merge(ids, known, by_cluster)
    write_json(path, {"step": step, "clusters": fingerprint(centers), "names": by_cluster})


def read_names(path: Path, step: int, centers: Tensor) -> dict[int, str | None]:
    """Cluster -> its name, None if dropped; empty without the file. StegoError for names of other clusters."""
    if not path.exists():
        return {}
    content = read_json(path)
    if not isinstance(content, dict) or content.get("clusters") != fingerprint(centers):
        raise StegoError(
            f"{path} names other clusters than those of step {step}. Remove it, and call run.name_segments(...) again."
        )
    return {int(cluster): name for cluster, name in content["names"].items()}
