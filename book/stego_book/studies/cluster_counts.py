"""How many clusters? Criteria that need no labels, beside what labels say.

`python -m stego_book.studies.cluster_counts DATASET --seeds 0 1 2` trains the runs and writes a record of each.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, calinski_harabasz_score, davies_bouldin_score, silhouette_score
from sklearn.mixture import GaussianMixture
from torch import Tensor

from stego_lib.backbone import preset_here
from stego_lib.datasets import open_split, open_training_set
from stego_lib.evaluation import open_views
from stego_lib.features import open_features
from stego_lib.metrics import confusion, majority, match, scores
from stego_lib.probes import sample_cells, sample_codes
from stego_lib.run import Run
from stego_lib.training import train
from stego_lib.utils.errors import StegoError
from stego_lib.utils.files import read_json, write_json
from stego_lib.utils.paths import user_path
from stego_lib.utils.progress import progress, say

# Numbers of clusters that are tried.
COUNTS = (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20, 24, 28, 32)
# Codes that criteria are computed on, and of which all pairs are compared for the silhouette.
POINTS, PAIRWISE = 10_000, 3_000
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
    """Label-free criteria for each number of clusters.

    Parameters
    ----------
    codes
        L2-normalized codes, (M, K).
    images
        The image of each code, int64 (M,). Halves for the stability are halves of the images, as codes of one image
        are alike.
    counts
        Numbers of clusters, each 2 to M / 2.
    seed
        Seed of everything random.

    Returns
    -------
    dict
        Each of `CRITERIA` -> one value a count. Silhouette, Calinski-Harabasz and Davies-Bouldin judge the clusters of
        k-means; "BIC of a mixture" is that of Gaussians with full covariances on `MIXED_DIM` principal components;
        "stability" is the mean adjusted Rand index of k-means on one half of the images and on the other, over
        `SPLITS` divisions.

    Raises
    ------
    StegoError
        For counts that there are too few codes for.
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
            "stability": np.mean([_agreement_of_halves(codes, half, count, seed) for half in halves]),
        }
        rows.append({name: float(value) for name, value in row.items()})
    return {name: [row[name] for row in rows] for name in CRITERIA}


def _agreement_of_halves(codes: Tensor, half: Tensor, count: int, seed: int) -> float:
    """Adjusted Rand index, on all codes, of k-means on those in `half`, bool (M,), and on the others."""
    labels = [_assign(codes, _centers(part, count, seed)).numpy() for part in (codes[half], codes[~half])]
    return float(adjusted_rand_score(*labels))


def _centers(codes: Tensor, count: int, seed: int) -> Tensor:
    return torch.from_numpy(KMeans(count, n_init=3, random_state=seed).fit(codes.numpy()).cluster_centers_)


def _assign(codes: Tensor, centers: Tensor) -> Tensor:
    """The cluster of each code, int64 (M,): the center with the largest cosine."""
    return (codes @ F.normalize(centers, dim=1).T).argmax(1)


def scored_counts(
    codes: Tensor, held_out: Tensor, labels: Tensor, n_classes: int, counts: Sequence[int] = COUNTS, seed: int = 0
) -> dict[str, list[float]]:
    """mIoU in percent of k-means with each number of clusters.

    codes: L2-normalized, (M, K), that clusters are fitted to. held_out, labels: codes of held-out images (N, K), and
    their labels, int64 (N,), -1 = ignored. "miou" is after Hungarian matching, where clusters without a class are
    errors; "miou_named" gives each cluster its most frequent class, as a person does who names the clusters and merges
    equal ones.
    """
    values: dict[str, list[float]] = {"miou": [], "miou_named": []}
    for count in counts:
        table = confusion(_assign(held_out, _centers(codes, count, seed)), labels, count, n_classes)
        values["miou"].append(float(scores(table, match(table))["miou"]))
        values["miou_named"].append(float(scores(table, majority(table))["miou"]))
    return values


@torch.inference_mode()
def study(run: Run, counts: Sequence[int] = COUNTS) -> dict[str, Any]:
    """The record of one run: criteria on training codes, mIoU on held-out codes, and the number of classes."""
    experiment, model = run.experiment, run.model.eval()
    training, held_out = open_training_set(experiment), open_split(experiment, "val")
    if not held_out.has_labels:
        raise StegoError(f"{held_out.name} {held_out.split} has no labels, so no number of clusters can be scored.")
    root = run.folder.parent / "features"
    store = open_features(training, run.backbone, experiment.train_size, root, experiment.feature_store)
    codes, _ = sample_codes(model, store, experiment.seed)
    images = torch.arange(len(codes)) // (len(codes) // len(store))
    chosen = torch.randperm(len(codes), generator=torch.Generator().manual_seed(experiment.seed))[:POINTS]
    codes, images = F.normalize(codes[chosen], dim=1), images[chosen]
    scored = open_views(run, held_out)
    val_codes, val_labels = sample_cells(
        scored.plain, experiment.seed, lambda rows: scored.codes(model, rows), model.head.code_dim, 4 * POINTS
    )
    miou = scored_counts(codes, F.normalize(val_codes, dim=1), val_labels, len(run.classes), counts, experiment.seed)
    about = {"experiment": experiment.to_record(), "provenance": run.provenance.to_dict(), "step": run.step}
    about |= {"classes": len(run.classes), "counts": list(counts), "points": len(codes)}
    return about | miou | {"criteria": criteria(codes, images, counts, experiment.seed)}


def read_studies(folder: str | Path) -> list[dict[str, Any]]:
    """The records in a folder, by name."""
    return [read_json(path) for path in sorted(user_path(folder).glob("*.json"))]


def choices(record: dict[str, Any]) -> dict[str, int]:
    """The number of clusters that each criterion chooses."""
    best = {"max": np.argmax, "min": np.argmin}
    return {name: record["counts"][int(best[way](record["criteria"][name]))] for name, way in CRITERIA.items()}


def chosen_counts(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The number of clusters that each criterion chooses, one column a record ("scenes, seed 0").

    Above them stand the number of classes and the count with the best mIoU, which need labels.
    """
    columns = {}
    for record in records:
        best = record["counts"][int(np.argmax(record["miou"]))]
        columns[_title(record)] = {"classes": record["classes"], "best mIoU": best, **choices(record)}
    return pd.DataFrame(columns)


def losses(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """mIoU that a choice of the number of clusters loses against the best number, one column a record, and the mean.

    Rows: each criterion; the number of classes; and "always N", the same N for all records: of all N the one that
    loses least. The last two need labels. A criterion is worth something if it loses less than they do.
    """
    columns, always = {}, {}
    for record in records:
        miou = pd.Series(record["miou"], index=record["counts"])
        lost = miou.max() - miou
        chosen = {**choices(record), "number of classes": record["classes"]}
        columns[_title(record)] = {name: lost[count] for name, count in chosen.items()}
        always[_title(record)] = lost
    fixed = pd.DataFrame(always).dropna()
    best = fixed.mean(axis=1).idxmin()
    table = pd.concat([pd.DataFrame(columns), fixed.loc[[best]].rename(index=lambda count: f"always {count}")])
    return table.assign(mean=table.mean(axis=1))


def _title(record: dict[str, Any]) -> str:
    return f"{record['experiment']['dataset']}, seed {record['experiment']['seed']}"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m stego_book.studies.cluster_counts", description=__doc__)
    parser.add_argument("dataset", help="a recipe: scenes, camvid")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data-root", help="folder of the datasets")
    parser.add_argument("--backbone", help="another backbone than the recipe's")
    parser.add_argument("--runs", help="folder for runs")
    parser.add_argument("--output", default="book/records/studies/cluster_counts", help="folder for the records")
    given = parser.parse_args(arguments)
    changes = {key: value for key in ("data_root", "backbone") if (value := getattr(given, key))}
    for seed in given.seeds:
        run = train(preset_here(given.dataset, seed=seed, **changes), runs_dir=given.runs, resume=True)
        path = user_path(given.output) / f"{given.dataset}-seed{seed}.json"
        write_json(path, study(run))
        say(f"wrote {path}")


if __name__ == "__main__":
    main()
