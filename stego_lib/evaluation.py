"""Scores a run on held-out pictures, beside baselines on the same features."""

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import crf
from .backbone import upsample
from .baselines import LinearScorer, kmeans_on_colors, kmeans_on_features, linear_on_features
from .datasets import SegmentationDataset, open_split, open_training_set
from .datasets.folder import nameless
from .datasets.transforms import Size
from .errors import StegoError
from .experiment import Experiment
from .features import NO_LABEL, FeatureStore, open_store
from .files import write_json
from .meanfield import refined_labels
from .memory import enough_memory
from .metrics import confusion, identity, match, published_map, scores
from .model import Stego
from .notices import notice
from .parallel import Job, in_processes
from .probe_maps import crf_logits, probe_scores
from .probes import fit_cluster_probe
from .progress import progress
from .run import Run, environment, mean_code

BATCH = 16


@torch.inference_mode()
def evaluate(run: Run, split: str = "val", *, baselines: bool = True) -> dict[str, Any]:
    """Scores the run's last step on `split` and writes the run record `metrics.json`, which it returns.

    Clusters are matched to classes once over the whole split; labels serve this matching, the scores and the linear
    probes, nothing else. With `experiment.published`, pixels in extra clusters are left out of every table and the
    matching is the published one, as `metrics` describes. The record holds under "scores", for each method, accuracy,
    miou and iou in percent: "cluster" and "linear" (STEGO), each also as "..._crf" where pydensecrf is installed, and the
    baselines "kmeans_features", "kmeans_colors" and "linear_features" (with labels). The baselines need the features of the
    train split; `baselines=False` leaves them out (for a released checkpoint, say). "linear" is missing where training had
    no labels. With `experiment.validate_every`, "best_by_label" holds the scores of the cluster probe at the kept step that
    they favour: chosen by the labels that it is scored with, as in the published code, so it is no result.

    A split without labels cannot be scored: "scores" is then empty and "unscored" says why. Raises StegoError for a split
    with another number of classes than the run's.
    """
    experiment, started = run.experiment, time.perf_counter()
    dataset = open_split(experiment, split)
    if len(dataset.classes) != len(run.classes):
        raise StegoError(
            f"{dataset.name} has {len(dataset.classes)} classes, this run was trained for {len(run.classes)}; evaluate it on its own data set"
        )
    if dataset.classes.names != run.classes.names and not nameless(run.classes) and not nameless(dataset.classes):
        raise StegoError(
            f"{dataset.name} has the classes {', '.join(dataset.classes.names[:3])} ..., this run was trained for "
            f"{', '.join(run.classes.names[:3])} ...; evaluate it on its own data set"
        )
    with enough_memory(f"scoring {dataset.name}", "choose a smaller eval_size, baselines=False, or device='cpu'"):
        judged = _scored(run, dataset, baselines) if dataset.has_labels else _unscored(dataset)
    record = {
        "experiment": recorded(experiment),
        "backbone_weights": run.backbone.weights_id,
        "step": run.step,
        "shifts": list(run.shifts),
        "split": split,
        "pictures": len(dataset),
        "classes": list(run.classes.names),
        **judged,
        "environment": environment(),
        "evaluation_seconds": round(time.perf_counter() - started, 1),
    }
    write_json(run.folder / "metrics.json", _without_nan(record))
    return record


def _unscored(dataset: SegmentationDataset) -> dict[str, Any]:
    """The part of the record that says why there are no scores."""
    text = f"{dataset.name} {dataset.split} has no labels, so nothing is scored; run.predict(pictures) segments them"
    notice(text)
    return {"scores": {}, "unscored": text}


def _scored(run: Run, dataset: SegmentationDataset, baselines: bool) -> dict[str, Any]:
    """The part of the record that takes labels: scores, matching, confusion matrix, best step by labels."""
    size, published = run.experiment.eval_size, run.experiment.published
    plain = _store(run, dataset, size)
    if plain.labels.min() == NO_LABEL:
        raise StegoError(
            f"{dataset.name} {dataset.split}: every pixel of {dataset.labels[0]} and the other label maps is ignored, so there is "
            "nothing to score; are they label maps of this data set?"
        )
    mirrored = _store(run, dataset, size, mirror=True) if run.experiment.mirror else None
    tables = _stego_tables(run, dataset, plain, mirrored)
    if baselines:
        tables |= _baseline_tables(run, _training_store(run), plain, mirrored)
    matching = match(tables["cluster"])
    return {
        "scores": {name: _scores(name, table, published) for name, table in tables.items()},
        **_best_by_label(run, plain),
        "matching": (published_map(matching) if published else matching).tolist(),
        "confusion": tables["cluster"].tolist(),
    }


def _store(run: Run, dataset: SegmentationDataset, size: Size, mirror: bool = False) -> FeatureStore:
    root, published = run.folder.parent / "features", run.experiment.published
    return open_store(dataset, run.backbone, size, root, mirror=mirror, published=published)


def _training_store(run: Run) -> FeatureStore:
    return _store(run, open_training_set(run.experiment), run.experiment.train_size)


def _best_by_label(run: Run, plain: FeatureStore) -> dict[str, Any]:
    """Scores of the cluster probe at the kept step with the highest mIoU, and the mIoU of every kept step.

    As the published code validates: neither mirror image nor CRF, and the matching made anew at each step.
    """
    kept = list(run.kept_weights())
    if not kept:
        return {}
    model, published, found = copy.deepcopy(run.model), run.experiment.published, {}
    for step, state in progress(kept, "evaluating kept steps"):
        model.load_state_dict(state)
        if run.experiment.probes == "after":
            fit_cluster_probe(model, _training_store(run), run.experiment.seed)
        found[step] = _scores("cluster", cluster_confusion(model, plain, published=published), published)
    best = max(found, key=lambda step: found[step]["miou"])
    curve = {"steps": list(found), "miou_by_step": [scored["miou"] for scored in found.values()]}
    return {"best_by_label": {"step": best, **found[best], **curve}}


def recorded(experiment: Experiment) -> dict[str, Any]:
    """The experiment as a run record holds it: without the folders of one machine, so that records can be shared."""
    values = experiment.to_dict()
    del values["data_root"]
    if Path(experiment.backbone).suffix:
        values["backbone"] = Path(experiment.backbone).name
    if experiment.start_from is not None:
        values["start_from"] = Path(experiment.start_from).name
    return values


@torch.inference_mode()
def cluster_confusion(
    model: Stego, plain: FeatureStore, mirrored: FeatureStore | None = None, *, published: bool = False
) -> Tensor:
    """Confusion matrix of the cluster probe over a store with labels, int64 (n_clusters, n_classes), extra clusters included.

    mirrored: the store of the mirrored pictures, whose codes are averaged in. published: see `metrics.confusion`. It is the
    table that `evaluate` makes under "cluster".
    """
    model.eval()
    n_clusters, n_classes = len(model.cluster_probe.clusters), int(plain.about["n_classes"])

    def maps(rows: Tensor) -> Tensor:
        code = _codes(model, plain, mirrored, rows)
        return upsample(model.cluster_probe.similarity(code), plain.labels.shape[1:]).cpu()

    return _count(plain, maps, n_clusters, n_classes, published)


def _stego_tables(
    run: Run, dataset: SegmentationDataset, plain: FeatureStore, mirrored: FeatureStore | None
) -> dict[str, Tensor]:
    """Confusion matrices of both probes, with and without CRF."""
    model, n_classes, published = run.model.eval(), len(run.classes), run.experiment.published
    sizes = {"cluster": len(model.cluster_probe.clusters)}
    if model.linear_probe.trained:
        sizes["linear"] = n_classes
    refine = run.experiment.crf and _can_refine()
    names = [*sizes, *(f"{name}_crf" for name in sizes if refine)]
    tables = {name: torch.zeros(sizes[name.removesuffix("_crf")], n_classes, dtype=torch.int64) for name in names}

    def add(name: str, found: Tensor, label: Tensor) -> None:
        tables[name] += confusion(found, label, len(tables[name]), n_classes, published=published)

    def scored() -> Iterator[Job]:
        """Counts what the probes say, and yields what the CRF takes of each picture, if it is wanted."""
        for rows in progress(torch.arange(len(plain)).split(BATCH), "evaluating"):
            label, codes = plain.label_rows(rows), _codes(model, plain, mirrored, rows)
            found = probe_scores(model, codes, label.shape[1:])
            for name in sizes:
                add(name, found[name].argmax(1).cpu(), label)
            if refine:
                paths = [dataset.pictures[row] for row in rows.tolist()]
                yield from _crf_jobs(model, codes, plain.picture_rows(rows), paths, list(sizes))

    for row, refined in enumerate(in_processes(refined_labels, scored(), len(plain), "the dense CRF")):
        for name, labels in zip(sizes, refined, strict=True):
            add(f"{name}_crf", torch.from_numpy(labels), plain.label_rows(torch.tensor([row]))[0])
    return tables


def _can_refine() -> bool:
    if not crf.available():
        notice(
            "pydensecrf is not installed: scores are reported without the CRF (to have it: pip install 'stego_lib[crf]')"
        )
    return crf.available()


def _crf_jobs(model: Stego, codes: Tensor, pictures: Tensor, paths: list[Path], names: list[str]) -> Iterator[Job]:
    """What `refined_labels` takes of each picture: the picture, and the probabilities of the probes `names`."""
    for path, picture, code in zip(paths, pictures, codes, strict=True):
        logits = crf_logits(model, code[None], picture.shape[1:])
        probabilities = [logits[name][0].softmax(0).cpu().numpy() for name in names]
        yield str(path), (picture.permute(1, 2, 0).contiguous().numpy(), probabilities)


def _codes(model: Stego, plain: FeatureStore, mirrored: FeatureStore | None, rows: Tensor) -> Tensor:
    return mean_code(model, plain.rows(rows), None if mirrored is None else mirrored.rows(rows))


def _baseline_tables(
    run: Run, training: FeatureStore, plain: FeatureStore, mirrored: FeatureStore | None
) -> dict[str, Tensor]:
    """Confusion matrices of the baselines, fitted on the training pictures."""
    n_classes, n_clusters = len(run.classes), len(run.model.cluster_probe.clusters)
    seed, published = run.experiment.seed, run.experiment.published
    features, colors = kmeans_on_features(training, n_clusters, seed), kmeans_on_colors(training, n_clusters, seed)
    tables = {
        "kmeans_features": _table(plain, mirrored, features, n_classes, published),
        "kmeans_colors": _color_table(plain, colors, n_classes, published),
    }
    if training.labels is not None:
        scorer = linear_on_features(training, seed)
        tables["linear_features"] = _table(plain, mirrored, scorer, n_classes, published)
    return tables


def _table(
    plain: FeatureStore, mirrored: FeatureStore | None, scorer: LinearScorer, n_classes: int, published: bool
) -> Tensor:
    """Confusion matrix of a baseline on L2-normalised features, averaged with the mirror image's as STEGO's codes are."""

    def maps(rows: Tensor) -> Tensor:
        features = F.normalize(plain.rows(rows), dim=1)
        if mirrored is not None:
            features = 0.5 * (features + F.normalize(mirrored.rows(rows), dim=1).flip(-1))
        return upsample(scorer(features), plain.labels.shape[1:])

    return _count(plain, maps, len(scorer.bias), n_classes, published)


def _color_table(plain: FeatureStore, scorer: LinearScorer, n_classes: int, published: bool) -> Tensor:
    def maps(rows: Tensor) -> Tensor:
        return scorer(plain.picture_rows(rows).float() / 255)

    return _count(plain, maps, len(scorer.bias), n_classes, published)


def _count(
    plain: FeatureStore, maps: Callable[[Tensor], Tensor], n_pred: int, n_classes: int, published: bool
) -> Tensor:
    table = torch.zeros(n_pred, n_classes, dtype=torch.int64)
    for rows in torch.arange(len(plain)).split(BATCH):
        table += confusion(maps(rows).argmax(1), plain.label_rows(rows), n_pred, n_classes, published=published)
    return table


def _scores(method: str, table: Tensor, published: bool) -> dict[str, Any]:
    with_labels = method.startswith("linear")
    return scores(table, identity(table.shape[1]) if with_labels else match(table), published=published)


def _without_nan(value: Any) -> Any:
    """Not-a-number (a class that does not occur) becomes null, which JSON has."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value
