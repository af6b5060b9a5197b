"""How much of an image's own mean the features should keep: a study of light, weather and time of day.

A dusk drive moves the features of whole images, so clusters may split by light in place of class. `Lightened` takes a share of
that shift off, and `run_light` trains and scores a method on such features.
"""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from stego_lib.backbone import Backbone, fit_sizes
from stego_lib.baselines import LinearScorer, kmeans_on_features
from stego_lib.batches import find_neighbors, fit_to_data
from stego_lib.datasets import open_split, open_training_set
from stego_lib.evaluation import Views, count_pixels, probe_confusion
from stego_lib.experiment import Experiment
from stego_lib.features import Features, open_features
from stego_lib.loss import upsample
from stego_lib.metrics import confusion, identity, match, scores
from stego_lib.model import Stego, build_model
from stego_lib.predict import Scores
from stego_lib.run import Run
from stego_lib.training import start_run, train_steps, trainer_of
from stego_lib.utils.environment import environment
from stego_lib.utils.files import read_json, without_nan, write_json
from stego_lib.utils.paths import runs_root, user_path
from stego_lib.utils.progress import progress

from .results import mean_and_spread
from .study import current_weights

AMOUNTS = (0.0, 0.25, 0.5, 1.0)
"""Shares of the image's own shift that are taken off; 0 is the features as they are."""
DARK = 1 / 3
"""Share of the training images, the darkest, that are scored by themselves."""


class Lightened(Features):
    """Features f - amount * (m - mean), where m is the mean feature of the image and `mean` that of the training images.

    Neighbors are found by what is left of m.
    """

    def __init__(self, features: Features, amount: float, mean: Tensor | None = None):
        self._features, self.amount, self._mean = features, amount, features.mean if mean is None else mean
        self.name, self.shape, self.image_size = features.name, features.shape, features.image_size
        self.has_labels, self.n_classes = features.has_labels, features.n_classes
        self.fingerprints, self.class_pixels = features.fingerprints, features.class_pixels
        self.kind = features.kind

    def pooled_rows(self, rows: slice | Tensor) -> Tensor:
        own = self._features.pooled_rows(rows)
        return own - self.amount * (own - self._mean)

    def rows(self, index: Tensor, device: torch.device | str = "cpu") -> Tensor:
        maps = self._features.rows(index, device)
        own = maps.mean((2, 3), keepdim=True)
        return maps - self.amount * (own - self._mean.to(maps).view(1, -1, 1, 1))

    def stored_labels(self, index: Tensor) -> Tensor:
        return self._features.stored_labels(index)

    def image_rows(self, index: Tensor) -> Tensor:
        return self._features.image_rows(index)


def dependence(table: Tensor) -> float:
    """How much an image tells about the cluster of its pixels, without labels: I(image; cluster) / H(cluster), in [0, 1].

    table: pixels of each image in each cluster, int64 (N, n). 0 if all images have the same shares of clusters, 1 if each image
    has one cluster.
    """
    joint = table.double() / table.sum()
    of_images, of_clusters = joint.sum(1, keepdim=True), joint.sum(0, keepdim=True)
    entropy = torch.special.entr(of_clusters).sum()
    shared = torch.special.entr(of_images).sum() + entropy - torch.special.entr(joint).sum()
    return float(shared / entropy) if entropy > 0 else 0.0


def run_light(experiment: Experiment, amount: float, runs_dir: str | Path | None = None) -> dict[str, Any]:
    """Trains a method on `Lightened` features and scores it, and k-means on the same features, by the last step, without CRF.

    Returns
    -------
    dict
        A run record, not that of a kept run: "light" is the amount; "scores" are of the validation split, "dark" and "bright"
        those of the darkest `DARK` of the training images and of the others, each by the matching of all training images (the
        methods see these images, never their labels); "dependence" is that of both on the training images, "neighbors" the share
        of nearest neighbors that features with amount 0 have too. Amount 1 leaves nothing to find neighbors by, so it has those.
    """
    root = user_path(runs_dir, runs_root())
    training_set, held_out = open_training_set(experiment), open_split(experiment, "val")
    backbone = Backbone.of(experiment)
    experiment = fit_sizes(fit_to_data(experiment, training_set), backbone.geometry)
    stored = partial(open_features, backbone=backbone, root=root / "features", store=experiment.feature_store)
    raw = stored(training_set, size=experiment.train_size)
    training = Lightened(raw, amount)
    model = build_model(experiment, backbone.dim, len(training_set.classes)).to(backbone.device)
    neighbors, kept = (find_neighbors(one, model, experiment) for one in (training if amount < 1 else raw, raw))
    with tempfile.TemporaryDirectory(dir=root, prefix=".light-") as folder:
        run = Run(Path(folder), experiment, training_set.classes, model, backbone)
        trainer = trainer_of(experiment)(run, training, neighbors)
        start_run(trainer)
        train_steps(trainer)
        seen = run.observed
    model.eval()
    kmeans = kmeans_on_features(training, model.n_clusters, experiment.seed)
    views = [
        Lightened(stored(held_out, size=experiment.eval_size, mirror=mirror), amount, raw.mean)
        for mirror in (False, True)[: 1 + experiment.mirror]
    ]
    scored = Views(views[0], views[1] if experiment.mirror else None)
    tables = {
        "cluster": probe_confusion(model, scored.plain, scored.flipped),
        "linear": probe_confusion(model, scored.plain, scored.flipped, probe="linear"),
    }
    tables |= count_pixels(
        scored,
        lambda rows: {"kmeans_features": Scores(kmeans(scored.unit_features(rows)))},
        {"kmeans_features": model.n_clusters},
    )
    found = {
        name: scores(table, identity(len(table)) if name == "linear" else match(table))
        for name, table in tables.items()
    }
    same = torch.stack([torch.isin(ours, theirs).float().mean() for ours, theirs in zip(neighbors, kept, strict=True)])
    return without_nan({
        "experiment": experiment.to_record(),
        "light": amount,
        "backbone_weights": backbone.weights_id,
        "step": run.step,
        "shifts": list(run.shifts),
        **seen,
        "split": "val",
        "images": len(held_out),
        "classes": list(held_out.classes.names),
        "scores": found,
        **_by_light(model, kmeans, training),
        "neighbors": float(same.mean()),
        "environment": environment(),
    })  # fmt: skip


def _by_light(model: Stego, kmeans: LinearScorer, training: Lightened) -> dict[str, Any]:
    """Scores of clusters and k-means on the dark and on the other training images, and `dependence` on the image."""
    count, n = len(training), model.n_clusters
    brightness, of_images = (
        torch.empty(count),
        {name: torch.zeros(count, n, dtype=torch.int64) for name in ("cluster", "kmeans_features")},
    )
    each = {name: torch.zeros(count, n, training.n_classes, dtype=torch.int64) for name in of_images}
    scored = Views(training)
    for rows in progress(torch.arange(count).split(16), "scoring the training images"):
        brightness[rows] = training.image_rows(rows).float().mean((1, 2, 3))
        labels = training.label_rows(rows)
        maps = {
            "cluster": model.cluster_probe.similarity(scored.codes(model, rows)),
            "kmeans_features": kmeans(scored.unit_features(rows)),
        }
        for name, found in maps.items():
            predicted = upsample(found, training.image_size).argmax(1).cpu()
            for row, own, label in zip(rows.tolist(), predicted, labels, strict=True):
                of_images[name][row] = own.flatten().bincount(minlength=n)
                each[name][row] = confusion(own[None], label[None], n, training.n_classes)
    dark = brightness <= brightness.quantile(DARK)
    parts = {"dark": dark, "bright": ~dark}
    found = {
        part: {name: scores(tables[chosen].sum(0), match(tables.sum(0))) for name, tables in each.items()}
        for part, chosen in parts.items()
    }
    return found | {"dependence": {name: dependence(table) for name, table in of_images.items()}}


def light_records(
    base: Experiment,
    amounts: Sequence[float],
    seeds: Sequence[int],
    folder: str | Path,
    limit: int | None = 0,
    runs_dir: str | Path | None = None,
) -> list[dict[str, Any]]:
    """The records of `base` with each amount and seed that are in `folder`, after `limit` of the missing ones were made (None: all)."""
    paths = {
        user_path(folder) / f"{base.but(seed=seed).name}-light{amount:g}.json": (amount, seed)
        for seed in seeds
        for amount in amounts
    }
    current = current_weights(base.backbone)

    def known(path: Path) -> bool:  # embedded weights may be replaced under the same name
        return path.exists() and current in (None, read_json(path)["backbone_weights"])

    missing = [path for path in paths if not known(path)]
    for path in progress(missing[:limit], "runs of the study"):
        amount, seed = paths[path]
        write_json(path, run_light(base.but(seed=seed), amount, runs_dir))
    return [read_json(path) for path in paths if known(path)]


def light_table(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per amount, mean ± standard deviation over seeds: mIoU of k-means and of the method on the validation split, mIoU on
    the dark and on the other training images, how much the image tells about the cluster, and neighbors shared with amount 0."""
    rows: dict[str, dict[str, Any]] = {}
    for amount in sorted({record["light"] for record in records}):
        kept = [record for record in records if record["light"] == amount]

        def spread(values: Any) -> str:
            found = pd.Series(list(values))
            return mean_and_spread(found.mean(), found.std())

        rows[f"{amount:g}"] = {
            "seeds": len(kept),
            **{
                f"{title}{where}": spread(record[part][name]["miou"] for record in kept)
                for part, where in (("scores", ""), ("dark", ", dark images"), ("bright", ", others"))
                for name, title in (("kmeans_features", "k-means"), ("cluster", "clusters"))
            },
            "image tells (k-means)": f"{pd.Series([record['dependence']['kmeans_features'] for record in kept]).mean():.2f}",
            "image tells (clusters)": f"{pd.Series([record['dependence']['cluster'] for record in kept]).mean():.2f}",
            "same neighbors": f"{pd.Series([record['neighbors'] for record in kept]).mean():.2f}",
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("taken off")
