"""Scores a run on held-out images, beside baselines on the same features."""

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
from .baselines import LinearScorer, kmeans_on_colors, kmeans_on_components, kmeans_on_features, linear_on_features
from .crf import refined_labels
from .datasets import SegmentationDataset, open_split, open_training_set
from .datasets.findings import tell
from .datasets.folder import nameless
from .datasets.transforms import Size
from .experiment import MACHINE, Experiment, split_backbone
from .features.extraction import content_id
from .features.online import open_features
from .features.store import Features, Share
from .loss import upsample
from .metrics import confusion, identity, match, published_map, scores
from .model import Stego, mean_code
from .probes import crf_logits, fit_cluster_probe, probe_scores
from .run import EVALUATION_KEYS, Run, load_run
from .runtime.devices import Processes, join, spawn, started
from .runtime.environment import environment
from .runtime.errors import StegoError
from .runtime.files import fingerprint, read_json, write_json
from .runtime.memory import enough_memory
from .runtime.notices import notice
from .runtime.paths import shown_path, user_path
from .runtime.pool import Job, in_processes
from .runtime.progress import progress, say

BATCH = 16


def evaluate(run: Run, split: str = "val", *, baselines: bool = True) -> dict[str, Any]:
    """Scores the run's last step on `split` and writes the run record, which it returns as the file holds it.

    The record of the validation split of the run's own data, scored as the run says, is metrics.json, whose matching
    `Run.predict` uses. Another split, other data or other settings (see `load_run`) get a record of their own beside it,
    metrics-SPLIT....json, and leave that one alone.

    Clusters are matched to classes once over the whole split; labels serve this matching, the scores and the linear
    probes, nothing else. With `experiment.published`, pixels in extra clusters are left out of every table and the
    matching is the published one, as `metrics` describes. The record holds under "scores", for each method, accuracy,
    miou and iou in percent: "cluster" and "linear" (STEGO), each also as "..._crf" where pydensecrf is installed, and the
    baselines "kmeans_features", "kmeans_pca", "kmeans_colors" and "linear_features" (with labels). The baselines need the features of the
    train split; `baselines=False` leaves them out (for a released checkpoint, say). "linear" is missing where training had
    no labels. With `experiment.validate_every`, "best_by_label" holds the scores of the cluster probe at the kept step that
    they favor: chosen by the labels that it is scored with, as in the published code, so it is no result.

    A split without labels, or whose labels are all of one class, cannot be scored: "scores" is then empty and "unscored"
    says why. Raises StegoError for a split with another number of classes than the run's, and for a run that stopped before
    its probes were fitted.

    With `experiment.devices` above 1 as many processes are started, each of which opens the run's folder and scores a part of
    the images; a script must call this below `if __name__ == "__main__":`. In a program that torchrun or SLURM has started
    several times, each calls this. The tables are those of one process.
    """
    experiment = run.experiment
    if experiment.devices > 1 and started() == (1, 1) and (run.folder / "checkpoint.pt").exists():
        values = {key: getattr(experiment, key) for key in EVALUATION_KEYS}
        return spawn(_evaluate_spawned, experiment.devices, experiment.device, run.folder, values, split, baselines)
    if started() != (1, 1) and run.processes.count == 1:
        run.processes = join(experiment.devices, experiment.device)
    return evaluate_among(run, split, baselines)


def _evaluate_spawned(
    processes: Processes, folder: Path, values: dict[str, Any], split: str, baselines: bool
) -> dict[str, Any]:
    run = load_run(folder, **values)
    run.processes = processes
    run.model.to(run.backbone.device)
    return evaluate_among(run, split, baselines)


@torch.inference_mode()
def evaluate_among(run: Run, split: str, baselines: bool) -> dict[str, Any]:
    """`evaluate` in each of `run.processes`; the first one alone writes the record, all return it."""
    experiment, began = run.experiment, time.perf_counter()
    run.refuse_unfitted()
    dataset = open_split(experiment, split)
    if len(dataset.classes) != len(run.classes):
        raise StegoError(
            f"{dataset.name} has {len(dataset.classes)} classes, this run was trained for {len(run.classes)}; evaluate it on its own dataset"
        )
    if dataset.classes.names != run.classes.names and not nameless(run.classes) and not nameless(dataset.classes):
        raise StegoError(
            f"{dataset.name} has the classes {', '.join(dataset.classes.names[:3])} ..., this run was trained for "
            f"{', '.join(run.classes.names[:3])} ...; evaluate it on its own dataset"
        )
    root = run.folder.parent / "features"
    if run.processes.first:
        tell(dataset, root)
    with enough_memory(f"scoring {dataset.name}", "choose a smaller eval_size, baselines=False, or device='cpu'"):
        judged = _scored(run, dataset, baselines) if dataset.has_labels else _unscored(dataset)
    data = run.processes.broadcast(content_id(dataset, root, labels=False) if run.processes.first else "")
    record = {
        "experiment": recorded(experiment),
        "backbone_weights": run.backbone.weights_id,
        "step": run.step,
        "shifts": list(run.shifts),
        **run.observed,
        "split": split,
        "data": data,
        "images": len(dataset),
        "classes": list(run.classes.names),
        **judged,
        "environment": environment(),
        "evaluation_seconds": round(time.perf_counter() - began, 1),
    }
    record = _without_nan(record)
    if run.processes.first:
        path = run.folder / _record_name(run, split, data)
        write_json(path, record)
        if path.name != "metrics.json":
            say(f"run record: {shown_path(path)}")
    run.processes.wait()
    return record


def _record_name(run: Run, split: str, data: str) -> str:
    """Name of the record of this evaluation, see `evaluate`. `data`: fingerprint of the split's images."""
    experiment, asked = run.experiment, run.folder / "experiment.json"
    others: list[Any] = []
    if asked.exists():
        trained = Experiment.from_dict(read_json(asked))
        others = [(key, getattr(experiment, key)) for key in experiment.differing(trained, (*MACHINE, "data_root", "backbone"))]
        if not _own_data(run, trained):
            others.append(data)
    elif (run.folder / "metrics.json").exists() and run.metrics.get("data", data) != data:
        others.append(data)  # a released checkpoint knows no data of its own: those that it was scored on first
    if split == "val" and not others:
        return "metrics.json"
    return f"metrics-{split}{f'-{fingerprint(others)[:8]}' if others else ''}.json"


def _own_data(run: Run, trained: Experiment) -> bool:
    """Whether the run was trained on the training split that its experiment names now, wherever that lies."""
    if run.experiment.dataset != trained.dataset:
        return False
    same_place = user_path(run.experiment.data_root).resolve() == user_path(trained.data_root).resolve()
    if run.data is None:  # a checkpoint of version 0.1.0 does not tell
        return same_place
    try:
        training = open_training_set(run.experiment)
    except StegoError:  # the validation split may be all that is left, or all that was moved
        return same_place
    return content_id(training, run.folder.parent / "features", labels=False) == run.data["images"]


def _unscored(dataset: SegmentationDataset, why: str = "has no labels") -> dict[str, Any]:
    """The part of the record that says why there are no scores."""
    text = f"{dataset.name} {dataset.split} {why}, so nothing is scored; run.predict(images) segments them"
    notice(text)
    return {"scores": {}, "unscored": text}


def _scored(run: Run, dataset: SegmentationDataset, baselines: bool) -> dict[str, Any]:
    """The part of the record that takes labels: scores, matching, confusion matrix, best step by labels."""
    size, published = run.experiment.eval_size, run.experiment.published
    plain = _store(run, dataset, size)
    there = plain.labels_there()
    if not there:
        raise StegoError(
            f"{dataset.name} {dataset.split}: every pixel of {dataset.labels[0]} and the other label maps is ignored, so there is "
            "nothing to score; are they label maps of this dataset?"
        )
    if len(there) == 1:  # any segmentation could score 100
        return _unscored(dataset, f"has no label but {dataset.classes.names[there[0]]!r} (id {there[0]})")
    mirrored = _store(run, dataset, size, mirror=True) if run.experiment.mirror else None
    if 1 < run.processes.count <= -(-len(plain) // BATCH):  # whole batches: the same numbers as in one process
        plain = Share(plain, run.processes, BATCH)
        mirrored = None if mirrored is None else Share(mirrored, run.processes, BATCH)
    tables = _stego_tables(run, dataset, plain, mirrored)
    if baselines:
        tables |= _baseline_tables(run, _training_store(run), plain, mirrored)
    tables = {name: plain.shared_by.sum(table) for name, table in tables.items()}
    matching = match(tables["cluster"])
    return {
        "scores": {name: _scores(name, table, published) for name, table in tables.items()},
        **_best_by_label(run, plain),
        "matching": (published_map(matching) if published else matching).tolist(),
        "confusion": tables["cluster"].tolist(),
    }


def _store(run: Run, dataset: SegmentationDataset, size: Size, mirror: bool = False, way: str = "") -> Features:
    root, experiment = run.folder.parent / "features", run.experiment
    way = way or experiment.feature_store
    return open_features(
        dataset, run.backbone, size, root, way,
        mirror=mirror, published=experiment.published, processes=run.processes,
    )  # fmt: skip


def _training_store(run: Run) -> Features:
    return _store(run, open_training_set(run.experiment), run.experiment.train_size, way=run.feature_store)


def _best_by_label(run: Run, plain: Features) -> dict[str, Any]:
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
        table = plain.shared_by.sum(cluster_confusion(model, plain, published=published))
        found[step] = _scores("cluster", table, published)
    best = max(found, key=lambda step: found[step]["miou"])
    curve = {"steps": list(found), "miou_by_step": [scored["miou"] for scored in found.values()]}
    return {"best_by_label": {"step": best, **found[best], **curve}}


def recorded(experiment: Experiment) -> dict[str, Any]:
    """The experiment as a run record holds it: without the folders of one machine and how it was run there, to be shared."""
    values = experiment.to_dict()
    for key in ("data_root", "feature_store", "devices"):
        del values[key]
    name, file = split_backbone(experiment.backbone)
    values["backbone"] = name or Path(file).name
    if experiment.start_from is not None:
        values["start_from"] = Path(experiment.start_from).name
    return values


@torch.inference_mode()
def cluster_confusion(
    model: Stego, plain: Features, mirrored: Features | None = None, *, published: bool = False
) -> Tensor:
    """Confusion matrix of the cluster probe over a store with labels, int64 (n_clusters, n_classes), extra clusters included.

    mirrored: the store of the mirrored images, whose codes are averaged in. published: see `metrics.confusion`. It is the
    table that `evaluate` makes under "cluster", by a shorter way: similarities are linear in the code, so they are upsampled
    in its place.
    """
    model.eval()
    n_clusters, n_classes = len(model.cluster_probe.clusters), plain.n_classes

    def maps(rows: Tensor) -> Tensor:
        code = _codes(model, plain, mirrored, rows)
        return upsample(model.cluster_probe.similarity(code), plain.image_size).cpu()

    return _count(plain, maps, n_clusters, n_classes, published, "the cluster probe")


def _stego_tables(
    run: Run, dataset: SegmentationDataset, plain: Features, mirrored: Features | None
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
        """Counts what the probes say, and yields what the CRF takes of each image, if it is wanted."""
        for rows in progress(torch.arange(len(plain)).split(BATCH), "evaluating"):
            label, codes = plain.label_rows(rows), _codes(model, plain, mirrored, rows)
            found = probe_scores(model, codes, label.shape[1:])
            for name in sizes:
                add(name, found[name].argmax(1).cpu(), label)
            if refine:
                paths = [dataset.images[row] for row in plain.places(rows).tolist()]
                yield from _crf_jobs(model, codes, plain.image_rows(rows), paths, list(sizes))

    refined_maps = in_processes(refined_labels, scored(), len(plain), "the dense CRF")
    for row, refined in enumerate(progress(refined_maps, "dense CRF", total=len(plain), disable=not refine)):
        for name, labels in zip(sizes, refined, strict=True):
            add(f"{name}_crf", torch.from_numpy(labels), plain.label_rows(torch.tensor([row]))[0])
    return tables


def _can_refine() -> bool:
    if not crf.available():
        notice(f"pydensecrf is not installed: scores are reported without the CRF (to have it: {crf.INSTALL})")
    return crf.available()


def _crf_jobs(model: Stego, codes: Tensor, images: Tensor, paths: list[Path], names: list[str]) -> Iterator[Job]:
    """What `refined_labels` takes of each image: the image, and the probabilities of the probes `names`."""
    for path, image, code in zip(paths, images, codes, strict=True):
        logits = crf_logits(model, code[None], image.shape[1:])
        probabilities = [logits[name][0].softmax(0).cpu().numpy() for name in names]
        yield str(path), (image.permute(1, 2, 0).contiguous().numpy(), probabilities)


def _codes(model: Stego, plain: Features, mirrored: Features | None, rows: Tensor) -> Tensor:
    return mean_code(model, plain.rows(rows), None if mirrored is None else mirrored.rows(rows))


def _baseline_tables(run: Run, training: Features, plain: Features, mirrored: Features | None) -> dict[str, Tensor]:
    """Confusion matrices of the baselines, fitted on the training images."""
    n_classes, n_clusters = len(run.classes), len(run.model.cluster_probe.clusters)
    seed, published = run.experiment.seed, run.experiment.published
    broadcast = run.processes.broadcast  # one process's fit, were others to differ in a last bit
    features = broadcast(kmeans_on_features(training, n_clusters, seed))
    components = broadcast(kmeans_on_components(training, run.experiment.code_dim, n_clusters, seed))
    colors = broadcast(kmeans_on_colors(training, n_clusters, seed))
    tables = {
        "kmeans_features": _table(plain, mirrored, features, n_classes, published, "k-means on features"),
        "kmeans_pca": _table(plain, mirrored, components, n_classes, published, "k-means on principal components"),
        "kmeans_colors": _color_table(plain, colors, n_classes, published),
    }
    if training.has_labels:
        scorer = broadcast(linear_on_features(training, seed))
        tables["linear_features"] = _table(plain, mirrored, scorer, n_classes, published, "the linear probe on features")
    return tables


def _table(
    plain: Features, mirrored: Features | None, scorer: LinearScorer, n_classes: int, published: bool, what: str
) -> Tensor:
    """Confusion matrix of a baseline, `what`, on L2-normalized features, averaged with the mirror image's as STEGO's codes are."""

    def maps(rows: Tensor) -> Tensor:
        features = F.normalize(plain.rows(rows), dim=1)
        if mirrored is not None:
            features = 0.5 * (features + F.normalize(mirrored.rows(rows), dim=1).flip(-1))
        return upsample(scorer(features), plain.image_size)

    return _count(plain, maps, len(scorer.bias), n_classes, published, what)


def _color_table(plain: Features, scorer: LinearScorer, n_classes: int, published: bool) -> Tensor:
    def maps(rows: Tensor) -> Tensor:
        return scorer(plain.image_rows(rows).float() / 255)

    return _count(plain, maps, len(scorer.bias), n_classes, published, "k-means on colors")


def _count(
    plain: Features, maps: Callable[[Tensor], Tensor], n_pred: int, n_classes: int, published: bool, what: str
) -> Tensor:
    table = torch.zeros(n_pred, n_classes, dtype=torch.int64)
    for rows in progress(torch.arange(len(plain)).split(BATCH), f"scoring {what}"):
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
