"""names.json: what a person called the clusters of a run. Equal names merge clusters, None drops one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..datasets.classes import Classes, distinct_names
from ..utils.errors import StegoError, did_you_mean
from ..utils.files import fingerprint, read_json, write_json

FILE = "names.json"
"""Name of the file in a run's folder."""
NOTHING = 255
"""Id, in label maps, of pixels that belong to no segment: transparent ones, and those of dropped clusters."""


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
        The segments without names.json, and the one of each cluster, uint8 (n_clusters,).
    step, centers
        Step of the run and its cluster centers: names hold for these alone.

    Raises
    ------
    StegoError
        For an unknown segment, a name that is none, and if nothing would be left.
    """
    unknown = [name for name in names if name not in known.names]
    if unknown:
        raise StegoError(
            f"there is no segment {unknown[0]!r}{did_you_mean(str(unknown[0]), list(known.names))} to name; "
            f"the run has {', '.join(known.names)}"
        )
    if wrong := [name for name in names.values() if name is not None and not isinstance(name, str)]:
        raise StegoError(f"{wrong[0]!r} is no name; a segment's name is a text, or None to drop the segment")
    of_cluster = {
        str(cluster): names[known.names[id_]] for cluster, id_ in enumerate(ids.tolist()) if known.names[id_] in names
    }
    _, merged = merge(ids, known, {int(cluster): name for cluster, name in of_cluster.items()})
    if repeated := set(merged.names) - set(known.names) - set(names.values()):  # made distinct by `distinct_names`
        raise StegoError(
            f"several segments would be called {min(repeated)} but for upper and lower case; write equal names alike"
        )
    write_json(path, {"step": step, "clusters": fingerprint(centers), "names": of_cluster})


def read_names(path: Path, step: int, centers: Tensor) -> dict[int, str | None]:
    """Cluster -> its name, None if it is dropped; empty without the file.

    Raises StegoError for a file of other clusters, such as those before the run was trained on.
    """
    if not path.exists():
        return {}
    content = read_json(path)
    names: Any = content.get("names") if isinstance(content, dict) else None
    if (
        not isinstance(names, dict)
        or not all(key.isdecimal() and int(key) < len(centers) for key in names)
        or not all(value is None or isinstance(value, str) for value in names.values())
    ):
        raise StegoError(f"{path} does not hold the names of {len(centers)} clusters; remove it, and name them again")
    if content.get("clusters") != fingerprint(centers):
        raise StegoError(
            f"{path} names the clusters of another training (step {content.get('step')}; the run is at step {step}), which may be "
            "other things now; name them again with run.name_segments(...), or remove the file"
        )
    return {int(key): value for key, value in names.items()}


def merge(ids: np.ndarray, known: Classes, names: Mapping[int, str | None]) -> tuple[np.ndarray, Classes]:
    """The id of each cluster and the segments, once clusters have names.

    Clusters of one name are one segment, with the color of the first. Ids are consecutive, in the order of `known`.

    Parameters
    ----------
    ids, known
        Segment of each cluster, uint8 (n_clusters,), and what these segments are called without names.
    names
        Cluster -> its name, None to drop it.

    Returns
    -------
    tuple
        uint8 (n_clusters,) with `NOTHING` for dropped clusters, and the segments.

    Raises
    ------
    StegoError
        For a name that is none, and if nothing is left.
    """
    called = {cluster: names.get(cluster, known.names[id_]) for cluster, id_ in enumerate(ids.tolist())}
    renamed = {int(ids[cluster]) for cluster in names}
    # A class that no cluster was matched to keeps its id, as it does without names.
    kept = {id_: name for id_, name in enumerate(known.names) if id_ not in renamed}
    kept |= {int(ids[cluster]): name for cluster, name in called.items() if name is not None}
    order = list(dict.fromkeys(kept[id_] for id_ in sorted(kept)))
    if not order:
        raise StegoError("every segment is dropped; leave one at least")
    colors = [known.colors[min(id_ for id_ in kept if kept[id_] == name)] for name in order]
    segments = Classes(tuple(distinct_names(order)), tuple(colors))
    position = {name: number for number, name in enumerate(order)}
    found = [NOTHING if name is None else position[name] for name in (called[c] for c in range(len(ids)))]
    return np.array(found, np.uint8), segments
