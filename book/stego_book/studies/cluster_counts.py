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
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score, silhouette_score
from sklearn.mixture import GaussianMixture
from torch import Tensor

from stego_lib.backbone import preset_here
from stego_lib.datasets import open_dataset, open_training_set
from stego_lib.evaluation import open_views
from stego_lib.features import open_features
from stego_lib.metrics import confusion, majority, match, scores
from stego_lib.probes import sample_cells, sample_codes
from stego_lib.run import Run
from stego_lib.training import train
from stego_lib.utils.environment import environment
from stego_lib.utils.errors import StegoError
from stego_lib.utils.files import read_json, write_json
from stego_lib.utils.paths import user_path
from stego_lib.utils.progress import progress, say

from .clusterers import MIXED_DIM, agreement, assign

COUNTS = (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20, 24, 28, 32)
"""Numbers of clusters that are tried."""
POINTS = 10_000
"""Codes that criteria are computed on."""
PAIRWISE = 3_000
"""Codes of which all pairs are compared, for the silhouette."""
SPLITS = 5
"""Divisions of the images into halves, for the stability."""
CRITERIA = {
    "silhouette": "max",
    "Calinski-Harabasz": "max",
    "Davies-Bouldin": "min",
    "BIC of a mixture": "min",
    "stability": "max",
}
"""Criterion -> whether its largest or its smallest value chooses the number of clusters."""


def criteria(codes: Tensor, images: Tensor, counts: Sequence[int] = COUNTS, seed: int = 0) -> dict[str, list[float]]:
    """Label-free criteria for each number of clusters.

    Parameters
    ----------
    codes
        L2-normalized codes, (M, K).
    images
        The image of each code, int64 (M,): halves for the stability are halves of the images, for codes of one image are alike.
    counts
        Numbers of clusters, each 2 to M / 2.
    seed
        Seed of everything random.

    Returns
    -------
    dict
        Each of `CRITERIA` -> one value a count. Silhouette, Calinski-Harabasz and Davies-Bouldin judge the clusters of k-means;
        "BIC of a mixture" is that of Gaussians with full covariances on `MIXED_DIM` principal components; "stability" is the mean
        adjusted Rand index of k-means on one half of the images and on the other, over `SPLITS` divisions.

    Raises
    ------
    StegoError
        For counts that there are too few codes for.
    """
    if not all(2 <= count <= len(codes) // 2 for count in counts):
        raise StegoError(f"counts = {list(counts)}: of {len(codes)} codes there can be 2 to {len(codes) // 2} clusters")
    values, generator = codes.cpu().numpy(), np.random.default_rng(seed)
    reduced = PCA(min(MIXED_DIM, *values.shape), random_state=seed).fit_transform(values)
    known = torch.unique(images)
    halves = [torch.isin(images, known[generator.permutation(len(known))[: len(known) // 2]]) for _ in range(SPLITS)]
    found: dict[str, list[float]] = {name: [] for name in CRITERIA}
    for count in progress(counts, "numbers of clusters"):
        labels = KMeans(count, n_init=3, random_state=seed).fit_predict(values)
        subset = min(PAIRWISE, len(values))
        found["silhouette"].append(float(silhouette_score(values, labels, sample_size=subset, random_state=seed)))
        found["Calinski-Harabasz"].append(float(calinski_harabasz_score(values, labels)))
        found["Davies-Bouldin"].append(float(davies_bouldin_score(values, labels)))
        mixture = GaussianMixture(count, random_state=seed, reg_covar=1e-4, max_iter=60).fit(reduced)
        found["BIC of a mixture"].append(float(mixture.bic(reduced)))
        found["stability"].append(float(np.mean([_agreement_of_halves(codes, half, count, seed) for half in halves])))
    return found


def _agreement_of_halves(codes: Tensor, half: Tensor, count: int, seed: int) -> float:
    """Adjusted Rand index, on all codes, of k-means on those in `half`, bool (M,), and on the others."""
    one, other = (
        torch.from_numpy(KMeans(count, n_init=3, random_state=seed).fit(part.numpy()).cluster_centers_)
        for part in (codes[half], codes[~half])
    )
    return agreement(codes, one, other)


def scored_counts(
    codes: Tensor, held_out: Tensor, labels: Tensor, n_classes: int, counts: Sequence[int] = COUNTS, seed: int = 0
) -> dict[str, list[float]]:
    """mIoU in percent of k-means with each number of clusters.

    codes: L2-normalized, (M, K), that clusters are fitted to. held_out, labels: codes of held-out images (N, K), and their
    labels, int64 (N,), -1 = ignored. "miou" is that after Hungarian matching, in which clusters without a class are errors;
    "miou_named" gives each cluster its most frequent class, as a person does who names the clusters and merges equal ones.
    """
    found: dict[str, list[float]] = {"miou": [], "miou_named": []}
    for count in counts:
        centers = torch.from_numpy(KMeans(count, n_init=3, random_state=seed).fit(codes.numpy()).cluster_centers_)
        table = confusion(assign(held_out, centers), labels, count, n_classes)
        found["miou"].append(float(scores(table, match(table))["miou"]))
        found["miou_named"].append(float(scores(table, majority(table))["miou"]))
    return found


@torch.inference_mode()
def study(run: Run, counts: Sequence[int] = COUNTS) -> dict[str, Any]:
    """The record of one run: criteria on training codes, mIoU on held-out codes, and the number of classes."""
    experiment, model = run.experiment, run.model.eval()
    training, held_out = open_training_set(experiment), open_dataset(experiment.dataset, experiment.data_root, "val")
    root = run.folder.parent / "features"
    store = open_features(training, run.backbone, experiment.train_size, root, run.provenance.store)
    codes, _ = sample_codes(model, store, experiment.seed)
    images = torch.arange(len(codes)) // (len(codes) // len(store))
    chosen = torch.randperm(len(codes), generator=torch.Generator().manual_seed(experiment.seed))[:POINTS]
    codes, images = F.normalize(codes[chosen], dim=1), images[chosen]
    scored = open_views(run, held_out)
    val_codes, val_labels = sample_cells(
        scored.plain, experiment.seed, lambda rows: scored.codes(model, rows), model.head.code_dim, 4 * POINTS
    )
    if val_labels is None:
        raise StegoError(f"{held_out.name} {held_out.split} has no labels, so no number of clusters can be scored")
    miou = scored_counts(codes, F.normalize(val_codes, dim=1), val_labels, len(run.classes), counts, experiment.seed)
    return {
        "experiment": experiment.to_record(), "backbone_weights": run.backbone.weights_id, "step": run.step,
        "classes": len(run.classes), "counts": list(counts), "criteria": criteria(codes, images, counts, experiment.seed),
        **miou, "points": len(codes), "environment": environment(),
    }  # fmt: skip


def read_studies(folder: str | Path) -> list[dict[str, Any]]:
    """The records in a folder, by name."""
    return [read_json(path) for path in sorted(user_path(folder).glob("*.json"))]


def chosen_counts(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The number of clusters that each criterion chooses, one column a record ("scenes, seed 0").

    Above them stand the number of classes and the count with the best mIoU, which need labels.
    """
    columns = {}
    for record in records:
        counts, column = record["counts"], {"classes": record["classes"]}
        column["best mIoU"] = counts[int(np.argmax(record["miou"]))]
        column |= {name: counts[at] for name, at in _choices(record).items()}
        columns[f"{record['experiment']['dataset']}, seed {record['experiment']['seed']}"] = column
    return pd.DataFrame(columns)


def losses(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """mIoU that a choice of the number of clusters loses against the best number, one column a record, and the mean.

    Rows: each criterion; the number of classes; and "always N", the same N for all records: of all N the one that loses least.
    The last two need labels. A criterion is worth something if it loses less than they do.
    """
    counts = [count for count in records[0]["counts"] if all(count in record["counts"] for record in records)]
    columns = {}
    for record in records:
        lost = {count: max(record["miou"]) - miou for count, miou in zip(record["counts"], record["miou"], strict=True)}
        column = {name: lost[record["counts"][at]] for name, at in _choices(record).items()}
        column["number of classes"] = lost[record["classes"]]
        column |= {f"always {count}": lost[count] for count in counts}
        columns[f"{record['experiment']['dataset']}, seed {record['experiment']['seed']}"] = column
    table = pd.DataFrame(columns)
    table["mean"] = table.mean(axis=1)
    fixed = table.loc[[f"always {count}" for count in counts], "mean"]
    return table.drop(index=[name for name in fixed.index if name != fixed.idxmin()])


def _choices(record: dict[str, Any]) -> dict[str, int]:
    """Position of the count that each criterion chooses."""
    found = record["criteria"]
    return {name: int((np.argmax if way == "max" else np.argmin)(found[name])) for name, way in CRITERIA.items()}


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
    changes = {"data_root": given.data_root, "backbone": given.backbone}
    for seed in given.seeds:
        experiment = preset_here(given.dataset, seed=seed, **{key: value for key, value in changes.items() if value})
        record = study(train(experiment, runs_dir=given.runs, resume=True))
        options = "".join(
            f" --{key} {value}"
            for key, value in (("data-root", given.data_root and "FOLDER"), ("backbone", given.backbone))
            if value
        )
        record["command"] = f"python -m stego_book.studies.cluster_counts {given.dataset} --seeds {seed}{options}"
        path = user_path(given.output) / f"{given.dataset}-seed{seed}.json"
        write_json(path, record)
        say(f"wrote {path}")


if __name__ == "__main__":
    main()
