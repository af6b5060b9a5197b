"""Subtracting the image mean from features: a study of illumination and weather.

Dusk shifts all features of an image, so clusters can follow the illumination instead of the class. `Lightened`
subtracts a fraction of this shift. The records in book/records/studies/light contain scores of STEGO and k-means
on such features (code: commit 00045c4), on the validation split, the darkest third of the training images, and the
others.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from stego_lib.experiment import Experiment
from stego_lib.features import Features

from .results import mean_and_spread
from .study import Study, Variant

# Subtracted fractions of the image's shift; 0 leaves the features unchanged.
AMOUNTS = (0.0, 0.25, 0.5, 1.0)
METHODS = {"kmeans_features": "k-means", "cluster": "clusters"}


class Lightened(Features):
    """Features f - amount * (m - mean), with m the mean feature of the image and `mean` that of the training images."""

    def __init__(self, features: Features, amount: float, mean: Tensor | None = None):
        self._features, self.amount, self._mean = features, amount, features.mean if mean is None else mean
        self.name, self.shape, self.image_size = features.name, features.shape, features.image_size
        self.has_labels, self.n_classes = features.has_labels, features.n_classes
        self.fingerprints, self.class_pixels = features.fingerprints, features.class_pixels
        self.kind = features.kind

    @property
    def pooled(self) -> Tensor:  # type: ignore[override]
        own = self._features.pooled
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
    """Normalized mutual information of image and cluster, I(image; cluster) / H(cluster).

    table: pixels of each image in each cluster, int64 (N, n). 0: equal cluster frequencies in all images; 1: one
    cluster per image.
    """
    joint = table.double() / table.sum()
    of_images, of_clusters = joint.sum(1, keepdim=True), joint.sum(0, keepdim=True)
    entropy = torch.special.entr(of_clusters).sum()
    shared = torch.special.entr(of_images).sum() + entropy - torch.special.entr(joint).sum()
    return float(shared / entropy) if entropy > 0 else 0.0


def light_records(base: Experiment, seeds: Sequence[int], folder: str | Path) -> list[dict[str, Any]]:
    """The records of `base` in a folder, for all `AMOUNTS` and `seeds`."""
    variants = [Variant("a", f"{amount:g}", base, light=amount) for amount in AMOUNTS]
    study = Study(variants, seeds, folder)
    return [record for variant in variants for record in study.records(variant).values()]


def light_table(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per fraction a: mIoU of k-means and STEGO on the validation split, the darkest third of the training
    images and the others, mean ± deviation; dependence on the image; fraction of neighbors equal to those with a = 0.
    """
    rows = []
    for record in records:
        row: dict[str, Any] = {"a": record["light"]}
        for part, where in (("scores", ""), ("dark", ", dark images"), ("bright", ", others")):
            row |= {f"{title}{where}": record[part][method]["miou"] for method, title in METHODS.items()}
        row |= {f"dependence ({title})": record["dependence"][method] for method, title in METHODS.items()}
        rows.append(row | {"same neighbors": record["neighbors"]})
    if not rows:
        return pd.DataFrame(columns=["seeds", *METHODS.values()])
    groups = pd.DataFrame(rows).groupby("a")
    table = groups.agg(mean_and_spread)
    for title in [name for name in table if name.startswith(("dependence", "same"))]:
        table[title] = groups[title].mean().map("{:.2f}".format)
    table.insert(0, "seeds", groups.size())
    return table.rename(index="{:g}".format)
