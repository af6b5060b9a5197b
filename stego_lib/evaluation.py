"""Scores a run on held-out pictures, beside baselines on the same features."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import crf
from .backbone import upsample
from .baselines import LinearScorer, kmeans_on_colors, kmeans_on_features, linear_on_features
from .datasets import open_dataset
from .errors import StegoError
from .experiment import Experiment
from .features import FeatureStore, open_store
from .files import write_json
from .metrics import confusion, identity, match, scores
from .notices import notice
from .progress import progress
from .run import Run, environment, mean_code
from .training import open_training_set

BATCH = 16


@torch.inference_mode()
def evaluate(run: Run, split: str = "val") -> dict[str, Any]:
    """Scores the run's last step on `split` and writes the run record `metrics.json`, which it returns.

    Clusters are matched to classes once over the whole split; labels serve this matching, the scores and the linear
    probes, nothing else. The record holds under "scores", for each method, accuracy, miou and iou in percent:
    "cluster" and "linear" (STEGO), each also as "..._crf" where pydensecrf is installed, and the baselines
    "kmeans_features", "kmeans_colors" and "linear_features" (with labels). Raises StegoError for a split without labels.
    """
    experiment, started = run.experiment, time.perf_counter()
    features_root = run.folder.parent / "features"
    dataset = open_dataset(experiment.dataset, experiment.data_root, split)
    if not dataset.has_labels:
        raise StegoError(
            f"{dataset.name} {split} has no labels, so there is nothing to score; use run.predict(pictures)"
        )
    plain = open_store(dataset, run.backbone, experiment.eval_size, features_root)
    mirrored = (
        open_store(dataset, run.backbone, experiment.eval_size, features_root, mirror=True)
        if experiment.mirror
        else None
    )
    training = open_store(open_training_set(experiment), run.backbone, experiment.train_size, features_root)
    n_classes, n_clusters = len(run.classes), len(run.model.cluster_probe.clusters)

    tables = _stego_tables(run, plain, mirrored)
    baselines = {
        "kmeans_features": _table(
            plain, mirrored, kmeans_on_features(training, n_clusters, experiment.seed), n_classes
        ),
        "kmeans_colors": _color_table(plain, kmeans_on_colors(training, n_clusters, experiment.seed), n_classes),
    }
    if training.labels is not None:
        baselines["linear_features"] = _table(plain, mirrored, linear_on_features(training, experiment.seed), n_classes)
    tables |= baselines
    matching = match(tables["cluster"])
    record = {
        "experiment": _recorded(experiment),
        "step": run.step,
        "shifts": list(run.shifts),
        "split": split,
        "pictures": len(dataset),
        "classes": list(run.classes.names),
        "scores": {name: _scores(name, table) for name, table in tables.items()},
        "matching": matching.tolist(),
        "confusion": tables["cluster"].tolist(),
        "environment": environment(),
        "evaluation_seconds": round(time.perf_counter() - started, 1),
    }
    write_json(run.folder / "metrics.json", _without_nan(record))
    return record


def _recorded(experiment: Experiment) -> dict[str, Any]:
    """The experiment without the folders of one machine, so that records can be shared."""
    values = experiment.to_dict()
    del values["data_root"]
    if Path(experiment.backbone).suffix:
        values["backbone"] = Path(experiment.backbone).name
    return values


def _stego_tables(run: Run, plain: FeatureStore, mirrored: FeatureStore | None) -> dict[str, Tensor]:
    """Confusion matrices of both probes, with and without CRF."""
    refine = run.experiment.crf
    if refine and not crf.available():
        notice(
            "pydensecrf is not installed: scores are reported without the CRF (to have it: pip install 'stego_lib[crf]')"
        )
        refine = False
    n_classes = len(run.classes)
    sizes = {"cluster": len(run.model.cluster_probe.clusters), "linear": n_classes}
    tables = {name: torch.zeros(n, n_classes, dtype=torch.int64) for name, n in sizes.items()}
    if refine:
        tables |= {f"{name}_crf": table.clone() for name, table in tables.items()}
    run.model.eval()
    for rows in progress(torch.arange(len(plain)).split(BATCH), "evaluating"):
        label = plain.label_rows(rows)
        code = mean_code(run.model, plain.rows(rows), None if mirrored is None else mirrored.rows(rows))
        maps = probe_maps(run, code, label.shape[1:])
        for name, values in maps.items():
            tables[name] += confusion(values.argmax(1).cpu(), label, sizes[name], n_classes)
        if refine:
            for i, picture in enumerate(plain.picture_rows(rows)):
                image = np.ascontiguousarray(picture.permute(1, 2, 0).numpy())
                for name, values in maps.items():
                    refined = crf.dense_crf(image, values[i]).argmax(0)
                    tables[f"{name}_crf"] += confusion(refined, label[i], sizes[name], n_classes)
    return tables


def probe_maps(run: Run, code: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """Log-probabilities of both probes at (H, W): codes (B, K, h, w) are upsampled first, then probed, as published."""
    code = upsample(code, size)
    return {
        "cluster": run.model.cluster_probe.log_probabilities(code),
        "linear": run.model.linear_probe(code).log_softmax(1),
    }


def _table(plain: FeatureStore, mirrored: FeatureStore | None, scorer: LinearScorer, n_classes: int) -> Tensor:
    """Confusion matrix of a baseline on L2-normalised features, averaged with the mirror image's as STEGO's codes are."""

    def maps(rows: Tensor) -> Tensor:
        features = F.normalize(plain.rows(rows), dim=1)
        if mirrored is not None:
            features = 0.5 * (features + F.normalize(mirrored.rows(rows), dim=1).flip(-1))
        return upsample(scorer(features), plain.labels.shape[1:])

    return _count(plain, maps, len(scorer.bias), n_classes)


def _color_table(plain: FeatureStore, scorer: LinearScorer, n_classes: int) -> Tensor:
    return _count(plain, lambda rows: scorer(plain.picture_rows(rows).float() / 255), len(scorer.bias), n_classes)


def _count(plain: FeatureStore, maps: Callable[[Tensor], Tensor], n_pred: int, n_classes: int) -> Tensor:
    table = torch.zeros(n_pred, n_classes, dtype=torch.int64)
    for rows in torch.arange(len(plain)).split(BATCH):
        table += confusion(maps(rows).argmax(1), plain.label_rows(rows), n_pred, n_classes)
    return table


def _scores(method: str, table: Tensor) -> dict[str, Any]:
    with_labels = method.startswith("linear")
    return scores(table, identity(table.shape[1]) if with_labels else match(table))


def _without_nan(value: Any) -> Any:
    """Not-a-number (a class that does not occur) becomes null, which JSON has."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value
