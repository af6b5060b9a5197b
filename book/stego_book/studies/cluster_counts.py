"""Choosing the number of clusters and their tree: criteria without labels, and the mIoU.

The records in book/records/studies/cluster_counts contain `criteria` on 10,000 codes of the training images of each run
and the mIoU of k-means on held-out codes for each number of clusters (code: commit 0a0daad). "miou" is after Hungarian
matching, with unmatched clusters as errors; "miou_named" assigns each cluster its most frequent class, like a person
who names the clusters and merges those with equal names. linkages.csv contains `linkages` of three seeds
on CamVid with photos_vit_tiny8_d6 and `probes.sample_codes`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, calinski_harabasz_score, davies_bouldin_score, silhouette_score
from sklearn.mixture import GaussianMixture
from torch import Tensor

from stego_lib.metrics import confusion, majority, scores
from stego_lib.probes import kmeans
from stego_lib.utils.errors import StegoError
from stego_lib.utils.files import read_json
from stego_lib.utils.paths import user_path
from stego_lib.utils.progress import progress

# Tested numbers of clusters.
COUNTS = (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20, 24, 28, 32)
# Number of codes for the silhouette, which compares all pairs.
PAIRWISE = 3_000
# Principal components for the Gaussian mixture; random splits of the images into halves for the stability.
MIXED_DIM, SPLITS = 16, 5
# Criterion -> whether its maximum or minimum chooses the number of clusters.
CRITERIA = {
    "silhouette": "max",
    "Calinski-Harabasz": "max",
    "Davies-Bouldin": "min",
    "BIC of a mixture": "min",
    "stability": "max",
}


def criteria(codes: Tensor, images: Tensor, counts: Sequence[int] = COUNTS, seed: int = 0) -> dict[str, list[float]]:
    """Label-free criteria: each of `CRITERIA` -> one value per number of clusters.

    codes: L2-normalized, (M, K). images: the image of each code, int64 (M,). counts: each 2 to M / 2. Silhouette,
    Calinski-Harabasz and Davies-Bouldin are computed for k-means; "BIC of a mixture" for Gaussians with full
    covariances on `MIXED_DIM` principal components; "stability" is the mean adjusted Rand index of k-means on two
    halves of the images, over `SPLITS` splits.
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
    """Adjusted Rand index on all codes between k-means on `half`, bool (M,), and k-means on the other half."""
    labels = []
    for part in (codes[half], codes[~half]):
        centers = KMeans(count, n_init=3, random_state=seed).fit(part).cluster_centers_
        labels.append((codes @ (centers / np.linalg.norm(centers, axis=1, keepdims=True)).T).argmax(1))
    return float(adjusted_rand_score(*labels))


def linkages(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    n_classes: int,
    seed: int = 0,
    n_clusters: int = 200,
    counts: Sequence[int] = (10, 20, 40, 80),
) -> pd.DataFrame:
    """Scores of the branches of a tree of k-means clusters: one row for each linkage and number of branches.

    train, val: L2-normalized codes (M, K), and their labels, int64 (M,), -1 for none. Clusters and tree see the codes
    of `train` alone; each branch is named by its most frequent class there. `val` is scored.
    """
    centers, rows = F.normalize(kmeans(train[0], n_clusters, seed), dim=1), []
    nearest, val_nearest = ((codes @ centers.T).argmax(1) for codes, _ in (train, val))
    for method in ("average", "complete", "single", "ward"):
        tree = linkage(centers.numpy(), method, "euclidean" if method == "ward" else "cosine")
        for count in counts:
            branch = torch.from_numpy(fcluster(tree, count, "maxclust")).long() - 1
            names = majority(confusion(branch[nearest], train[1], count, n_classes))
            result = scores(confusion(branch[val_nearest], val[1], count, n_classes), names)
            rows.append({"linkage": method, "branches": count, "accuracy": result["accuracy"], "miou": result["miou"]})
    return pd.DataFrame(rows)


def read_studies(folder: str | Path) -> pd.DataFrame:
    """The records in a folder, one row per record and number of clusters: classes, miou, miou_named, `CRITERIA`."""
    parts = {}
    for record in map(read_json, sorted(user_path(folder).glob("*.json"))):
        title = f"{record['experiment']['dataset']}, seed {record['experiment']['seed']}"
        values = {key: record[key] for key in ("classes", "miou", "miou_named")} | record["criteria"]
        parts[title] = pd.DataFrame(values, index=record["counts"])
    return pd.concat(parts, names=["record", "clusters"])


def chosen_counts(studies: pd.DataFrame) -> pd.DataFrame:
    """The number of clusters chosen by each criterion, one column per record; the first rows use labels."""
    best = {"classes": studies["classes"].groupby("record", sort=False).first()}
    for name, way in ({"miou": "max"} | CRITERIA).items():
        values = studies[name].unstack("record")
        best[name] = values.idxmax() if way == "max" else values.idxmin()
    return pd.DataFrame(best).T.rename({"miou": "best mIoU"})


def losses(studies: pd.DataFrame) -> pd.DataFrame:
    """mIoU lost by each choice of the number of clusters compared with the best, one column per record, and the mean.

    The last rows use labels: the number of classes, and "always N", the number with the smallest mean loss. Rows with a
    number that a record does not contain have no mean.
    """
    chosen = chosen_counts(studies)
    miou = studies["miou"].unstack("record")[chosen.columns]
    lost = miou.max() - miou
    fixed = lost.dropna()
    best = fixed.mean(axis=1).idxmin()
    order = [*CRITERIA, "classes"]
    table = pd.DataFrame({record: lost[record].reindex(chosen.loc[order, record]).to_numpy() for record in lost}, order)
    table.loc[f"always {best}"] = fixed.loc[best]
    return table.rename({"classes": "number of classes"}).assign(mean=table.mean(axis=1, skipna=False).to_numpy())
