"""How many clusters? Criteria that need no labels, beside what labels say.

The records in book/records/studies/cluster_counts hold `criteria` on 10,000 codes of the training images of each run,
and the mIoU of k-means with each number of clusters on held-out codes (commit 0a0daad has the code): "miou" after
Hungarian matching, where clusters without a class are errors; "miou_named" with each cluster as its most frequent
class, as a person does who names the clusters and merges equal ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, calinski_harabasz_score, davies_bouldin_score, silhouette_score
from sklearn.mixture import GaussianMixture
from torch import Tensor

from stego_lib.utils.errors import StegoError
from stego_lib.utils.files import read_json
from stego_lib.utils.paths import user_path
from stego_lib.utils.progress import progress

# Numbers of clusters that are tried.
COUNTS = (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20, 24, 28, 32)
# Codes of which all pairs are compared for the silhouette.
PAIRWISE = 3_000
# Principal components that a Gaussian mixture sees, and divisions of the images into halves, for the stability.
MIXED_DIM, SPLITS = 16, 5
# Criterion -> whether its largest or its smallest value chooses the number of clusters.
CRITERIA = {
    "silhouette": "max",
    "Calinski-Harabasz": "max",
    "Davies-Bouldin": "min",
    "BIC of a mixture": "min",
    "stability": "max",
}


def criteria(codes: Tensor, images: Tensor, counts: Sequence[int] = COUNTS, seed: int = 0) -> dict[str, list[float]]:
    """Label-free criteria for each number of clusters: each of `CRITERIA` -> one value a count.

    codes: L2-normalized, (M, K). images: the image of each code, int64 (M,). counts: each 2 to M / 2. Silhouette,
    Calinski-Harabasz and Davies-Bouldin judge the clusters of k-means; "BIC of a mixture" is that of Gaussians with
    full covariances on `MIXED_DIM` principal components; "stability" is the mean adjusted Rand index of k-means on one
    half of the images and on the other, as codes of one image are alike, over `SPLITS` divisions.
    """
    if not all(2 <= count <= len(codes) // 2 for count in counts):
        raise StegoError(f"counts = {list(counts)}: {len(codes)} codes can have 2 to {len(codes) // 2} clusters.")
    values, generator = codes.cpu().numpy(), np.random.default_rng(seed)
    reduced = PCA(min(MIXED_DIM, *values.shape), random_state=seed).fit_transform(values)
    known = torch.unique(images)
    halves = [torch.isin(images, known[generator.permutation(len(known))[: len(known) // 2]]) for _ in range(SPLITS)]
    rows = []
    for count in progress(counts, "numbers of clusters"):
        labels = KMeans(count, n_init=3, random_state=seed).fit_predict(values)
        subset = min(PAIRWISE, len(values))
        mixture = GaussianMixture(count, random_state=seed, reg_covar=1e-4, max_iter=60).fit(reduced)
        row = {
            "silhouette": silhouette_score(values, labels, sample_size=subset, random_state=seed),
            "Calinski-Harabasz": calinski_harabasz_score(values, labels),
            "Davies-Bouldin": davies_bouldin_score(values, labels),
            "BIC of a mixture": mixture.bic(reduced),
            "stability": np.mean([_agreement(values, half.numpy(), count, seed) for half in halves]),
        }
        rows.append({name: float(value) for name, value in row.items()})
    return {name: [row[name] for row in rows] for name in CRITERIA}


def _agreement(codes: np.ndarray, half: np.ndarray, count: int, seed: int) -> float:
    """Adjusted Rand index, on all codes, of k-means on those in `half`, bool (M,), and on the others."""
    labels = []
    for part in (codes[half], codes[~half]):
        centers = KMeans(count, n_init=3, random_state=seed).fit(part).cluster_centers_
        labels.append((codes @ (centers / np.linalg.norm(centers, axis=1, keepdims=True)).T).argmax(1))
    return float(adjusted_rand_score(*labels))


def read_studies(folder: str | Path) -> list[dict[str, Any]]:
    """The records in a folder, by name."""
    return [read_json(path) for path in sorted(user_path(folder).glob("*.json"))]


def choices(record: dict[str, Any]) -> dict[str, int]:
    """The number of clusters that each criterion chooses."""
    best = {"max": np.argmax, "min": np.argmin}
    return {name: record["counts"][int(best[way](record["criteria"][name]))] for name, way in CRITERIA.items()}


def chosen_counts(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The number of clusters that each criterion chooses, one column a record; above them, what labels say."""
    columns = {}
    for record in records:
        best = record["counts"][int(np.argmax(record["miou"]))]
        columns[_title(record)] = {"classes": record["classes"], "best mIoU": best, **choices(record)}
    return pd.DataFrame(columns)


def losses(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """mIoU that a choice of the number of clusters loses against the best number, one column a record, and the mean.

    The last rows need labels: the number of classes, and "always N", the one number that loses least for all records. A
    number that a record did not try has no loss, and its row no mean.
    """
    columns, always = {}, {}
    for record in records:
        miou = pd.Series(record["miou"], index=record["counts"])
        lost = miou.max() - miou
        chosen = {**choices(record), "number of classes": record["classes"]}
        columns[_title(record)] = {name: lost.get(count, np.nan) for name, count in chosen.items()}
        always[_title(record)] = lost
    fixed = pd.DataFrame(always).dropna()
    best = fixed.mean(axis=1).idxmin()
    table = pd.concat([pd.DataFrame(columns), fixed.loc[[best]].rename(index=lambda count: f"always {count}")])
    return table.assign(mean=table.mean(axis=1, skipna=False))


def _title(record: dict[str, Any]) -> str:
    return f"{record['experiment']['dataset']}, seed {record['experiment']['seed']}"
