"""Scores of a run on held-out images, beside baselines on the same features."""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import crf
from .baselines import LinearScorer, kmeans_on_colors, kmeans_on_components, kmeans_on_features, linear_on_features
from .datasets import SegmentationDataset, open_split, open_training_set
from .datasets.check import show_findings
from .datasets.transforms import Size
from .features import Features, open_features
from .features.source import content_id
from .loss import upsample
from .metrics import confusion, identity, match, published_map, scores
from .model import Stego
from .probes import crf_logits, fit_probes, probe_scores
from .provenance import Provenance
from .run import Run, record_path
from .utils import devices
from .utils.errors import StegoError
from .utils.files import without_nan, write_json
from .utils.memory import enough_memory
from .utils.notices import notice
from .utils.paths import shown_path
from .utils.pool import Job, in_processes
from .utils.progress import progress, say

BATCH = 16
"""Images that are scored at once."""


@torch.inference_mode()
def evaluate(run: Run, split: str = "val", *, baselines: bool = True) -> dict[str, Any]:
    """Scores the run's last step on `split`, and writes the run record.

    Clusters are matched to classes once over the whole split; labels serve this matching, the scores and the linear probes
    alone (paper, section 4).

    Parameters
    ----------
    run
        From `train` or `load_run`.
    split
        "val", "train" or "test", where the dataset has it.
    baselines
        Score k-means and a linear probe on the raw features too, which needs features of the training split.

    Returns
    -------
    dict
        The record. Its "scores" hold, for each method, accuracy, miou and iou in percent, and for clusters their matching (the
        class of each, -1 for none): "cluster" and "linear" (STEGO), and the baselines "kmeans_features", "kmeans_pca",
        "kmeans_colors" and "linear_features"; with `experiment.crf`, "cluster", "linear" and "kmeans_features" also as "..._crf",
        and "crf" names the engine. Linear probes need training labels. With `experiment.official.keep_every`, "best_by_label" holds the scores of the step that
        the labels favor, as the published code reports them; it is no result. "scores" is empty, and "unscored" says why, for
        a split without labels or with a single class.

        The file is metrics.json for the validation split of the run's own data, whose matching `Run.predict` uses; another
        split, other data and other settings (see `load_run`) go to metrics-SPLIT....json.

    Raises
    ------
    StegoError
        For a split with other classes than the run's, and for a run that stopped before its probes were fitted.

    Notes
    -----
    Started by torchrun or SLURM, each process scores a part of the images; the confusion matrices are those of one process.

    Examples
    --------
    >>> record = evaluate(run)
    >>> record["scores"]["cluster"]["miou"]
    """
    experiment, start = run.experiment, time.perf_counter()
    devices.join(experiment.device)
    run.refuse_unfitted()
    dataset = open_split(experiment, split)
    run.refuse_other_classes(dataset)
    root = run.folder.parent / "features"
    if devices.first():
        show_findings(dataset)
    with enough_memory(f"scoring {dataset.name}", "choose a smaller eval_size, baselines=False, or device='cpu'"):
        judged = _scored(run, dataset, baselines) if dataset.has_labels else _unscored(dataset)
    data = devices.once(lambda: content_id(dataset, root, labels=False))
    record = without_nan({
        "experiment": experiment.to_record(),
        "provenance": recorded_provenance(run),
        "step": run.step,
        "shifts": list(run.shifts),
        **run.observed,
        "split": split,
        "data": data,
        "images": len(dataset),
        "classes": list(run.classes.names),
        **judged,
        "evaluation_seconds": round(time.perf_counter() - start, 1),
    })  # fmt: skip
    if devices.first():
        path = record_path(run, split, data)
        write_json(path, record)
        if path.name != "metrics.json":
            say(f"run record: {shown_path(path)}")
    devices.wait()
    return record


def recorded_provenance(run: Run) -> dict[str, Any]:
    """The run's provenance, with the versions that scored it; what a released checkpoint does not tell is taken from here."""
    now = Provenance.of(run.backbone, run.experiment.feature_store, {"images": None, "labels": None}).to_dict()
    known = {key: value for key, value in run.provenance.to_dict().items() if value}
    return now | known | {"versions": now["versions"]}


@dataclass(frozen=True)
class Scored:
    """The features and labels of a split that is scored."""

    plain: Features
    """Features of the images."""
    flipped: Features | None = None
    """Those of the horizontally flipped images, where codes are averaged over both."""
    published: bool = False
    """Count as the published code does, see `metrics.confusion`."""

    def batches(self, what: str) -> Iterator[Tensor]:
        """Rows of this process's share of the batches, with a progress bar."""
        return iter(progress(devices.share(torch.arange(len(self.plain)).split(BATCH)), what))

    def codes(self, model: Stego, rows: Tensor) -> Tensor:
        """Codes of the images, (B, K, h, w)."""
        return model.mean_code(self.plain.rows(rows), None if self.flipped is None else self.flipped.rows(rows))

    def unit_features(self, rows: Tensor) -> Tensor:
        """L2-normalized features, averaged as the codes are, (B, C, h, w)."""
        views = [self.plain.rows(rows), *([self.flipped.rows(rows).flip(-1)] if self.flipped is not None else [])]
        return torch.stack([F.normalize(view, dim=1) for view in views]).mean(0)

    def count(self, table: Tensor, predicted: Tensor, label: Tensor) -> None:
        """Adds pixels to a confusion matrix (n_pred, n_classes)."""
        table += confusion(predicted, label, len(table), self.plain.n_classes, published=self.published)

    def confusion(self, score_maps: Callable[[Tensor], Tensor], n_pred: int, what: str) -> Tensor:
        """Confusion matrix, int64 (n_pred, n_classes), of the largest of score_maps(rows), (B, n_pred, H, W)."""
        table = torch.zeros(n_pred, self.plain.n_classes, dtype=torch.int64)
        for rows in self.batches(f"scoring {what}"):
            self.count(table, score_maps(rows).argmax(1).cpu(), self.plain.label_rows(rows))
        return devices.total(table)


def _unscored(dataset: SegmentationDataset, why: str = "has no labels") -> dict[str, Any]:
    text = f"{dataset.name} {dataset.split} {why}, so nothing is scored; run.predict(images) segments them"
    notice(text)
    return {"scores": {}, "unscored": text}


def _scored(run: Run, dataset: SegmentationDataset, baselines: bool) -> dict[str, Any]:
    """The part of the record that needs labels: scores, matching, confusion matrix, best step by labels."""
    published, scored = run.experiment.official.published, open_scored(run, dataset)
    plain = scored.plain
    present = plain.labels_there()
    if not present:
        raise StegoError(
            f"{dataset.name} {dataset.split}: every pixel of {dataset.labels[0]} and the other label maps is ignored, so there is "
            "nothing to score; are they label maps of this dataset?"
        )
    if len(present) == 1:  # any segmentation could score 100
        return _unscored(dataset, f"has no label but {dataset.classes.names[present[0]]!r} (id {present[0]})")
    kmeans = fit_kmeans(run) if baselines else None
    tables = _refined_tables(run, dataset, scored, kmeans)
    tables |= _baseline_tables(run, scored) if baselines else {}
    found = {name: _scores(name, table, published) for name, table in tables.items()}
    return {
        "scores": found,
        **({"crf": crf.engine(quiet=False)} if run.experiment.crf else {}),
        **_best_by_label(run, plain),
        "matching": found["cluster"]["matching"],
        "confusion": tables["cluster"].tolist(),
    }


def open_scored(run: Run, dataset: SegmentationDataset) -> Scored:
    """The features of a split as the run's experiment scores it."""
    size, mirror = run.experiment.eval_size, run.experiment.mirror
    flipped = _features(run, dataset, size, mirror=True) if mirror else None
    return Scored(_features(run, dataset, size), flipped, run.experiment.official.published)


def _features(run: Run, dataset: SegmentationDataset, size: Size, mirror: bool = False, store: str = "") -> Features:
    root, kind = run.folder.parent / "features", store or run.experiment.feature_store
    return open_features(
        dataset, run.backbone, size, root, kind, mirror=mirror, published=run.experiment.official.published
    )


def _training_features(run: Run) -> Features:
    return _features(
        run, open_training_set(run.experiment), run.experiment.train_size, store=run.provenance.store or ""
    )


def _best_by_label(run: Run, plain: Features) -> dict[str, Any]:
    """Scores of the cluster probe at the kept step with the highest mIoU, as the published code validates: no flip, no CRF."""
    kept = list(run.kept_weights())
    if not kept:
        return {}
    model, published, found = copy.deepcopy(run.model), run.experiment.official.published, {}
    for step, state in progress(kept, "evaluating kept steps"):
        model.load_state_dict(state)
        if run.experiment.probes == "after" and not run.experiment.own_prototypes:
            fit_probes(model, _training_features(run), run.experiment.seed, linear=False)
        found[step] = _scores("cluster", probe_confusion(model, plain, published=published), published)
    best = max(found, key=lambda step: found[step]["miou"])
    curve = {"steps": list(found), "miou_by_step": [scored["miou"] for scored in found.values()]}
    return {"best_by_label": {"step": best, **found[best], **curve}}


@torch.inference_mode()
def probe_confusion(
    model: Stego, plain: Features, flipped: Features | None = None, *, probe: str = "cluster", published: bool = False
) -> Tensor:
    """Confusion matrix of the "cluster" or "linear" probe, int64 (n_pred, n_classes); the features as in `Scored`."""
    scored, cluster = Scored(plain, flipped, published), probe == "cluster"
    model.eval()
    score = model.cluster_probe.similarity if cluster else model.linear_probe
    maps = lambda rows: upsample(score(scored.codes(model, rows)), plain.image_size)  # noqa: E731
    return scored.confusion(maps, model.n_clusters if cluster else plain.n_classes, f"the {probe} probe")


def fit_kmeans(run: Run) -> LinearScorer:
    """k-means on the raw features of the training split, with the run's seed and number of clusters: the baseline of STEGO."""
    training, count, seed = _training_features(run), run.model.n_clusters, run.experiment.seed
    return devices.once(lambda: kmeans_on_features(training, count, seed))  # others might differ in the last bit


def refined_scores(
    run: Run, scored: Scored, rows: Tensor, kmeans: LinearScorer | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What both probes, and k-means on raw features (`fit_kmeans`, or None), say of every pixel of some images, int64 (B,).

    Returns scores (B, n, H, W) by method, the largest is a pixel's cluster or class, and what the CRF takes, logits of that shape.
    """
    model, size = run.model, scored.plain.image_size
    codes = scored.codes(model, rows)
    found, logits = probe_scores(model, codes, size), crf_logits(model, codes, size)
    if not model.linear_probe.trained:
        del found["linear"], logits["linear"]
    if kmeans is not None:
        # 2 f.c - |c|^2: the inner product by `ALPHA`, as for the cluster probe, so both get the same CRF.
        found["kmeans_features"] = logits["kmeans_features"] = upsample(kmeans(scored.unit_features(rows)), size)
    return found, logits


def _refined_tables(
    run: Run, dataset: SegmentationDataset, scored: Scored, kmeans: LinearScorer | None
) -> dict[str, Tensor]:
    """Confusion matrices of both probes and of k-means on raw features, with and without CRF."""
    model, n_classes, plain = run.model.eval(), len(run.classes), scored.plain
    sizes = {"cluster": model.n_clusters} | ({"linear": n_classes} if model.linear_probe.trained else {})
    sizes |= {"kmeans_features": len(kmeans.bias)} if kmeans is not None else {}
    refine = run.experiment.crf
    names = [*sizes, *(f"{name}_crf" for name in sizes if refine)]
    tables = {name: torch.zeros(sizes[name.removesuffix("_crf")], n_classes, dtype=torch.int64) for name in names}
    own = [row for rows in devices.share(torch.arange(len(plain)).split(BATCH)) for row in rows.tolist()]

    def crf_jobs() -> Iterator[Job]:
        """Counts what the methods predict, and yields the CRF's input of each image if the CRF is on."""
        for rows in scored.batches("evaluating"):
            label, (found, logits) = plain.label_rows(rows), refined_scores(run, scored, rows, kmeans)
            for name in sizes:
                scored.count(tables[name], found[name].argmax(1).cpu(), label)
            if refine:
                for row, image, *ours in zip(rows.tolist(), plain.image_rows(rows), *logits.values(), strict=True):
                    maps = [one.softmax(0).cpu().numpy() for one in ours]
                    yield str(dataset.images[row]), (image.permute(1, 2, 0).contiguous().numpy(), maps)

    refined = in_processes(crf.refined_labels, crf_jobs(), len(own), "the dense CRF")
    for row, labels in zip(own, progress(refined, "dense CRF", total=len(own), disable=not refine), strict=refine):
        for name, predicted in zip(sizes, labels, strict=True):
            scored.count(tables[f"{name}_crf"], torch.from_numpy(predicted), plain.label_rows(torch.tensor([row]))[0])
    return {name: devices.total(table) for name, table in tables.items()}


def _baseline_tables(run: Run, scored: Scored) -> dict[str, Tensor]:
    """Confusion matrices of the other baselines, fitted on the training images."""
    training, n_clusters, seed = _training_features(run), run.model.n_clusters, run.experiment.seed
    plain = scored.plain

    def on_features(scorer: LinearScorer, what: str) -> Tensor:
        maps = lambda rows: upsample(scorer(scored.unit_features(rows)), plain.image_size)  # noqa: E731
        return scored.confusion(maps, len(scorer.bias), what)

    def on_colors(rows: Tensor) -> Tensor:
        return colors(plain.image_rows(rows).float() / 255)

    components = devices.once(lambda: kmeans_on_components(training, run.experiment.code_dim, n_clusters, seed))
    colors = devices.once(lambda: kmeans_on_colors(training, n_clusters, seed))
    tables = {
        "kmeans_pca": on_features(components, "k-means on principal components"),
        "kmeans_colors": scored.confusion(on_colors, n_clusters, "k-means on colors"),
    }
    if training.has_labels:
        linear = devices.once(lambda: linear_on_features(training, seed))
        tables["linear_features"] = on_features(linear, "the linear probe on features")
    return tables


def _scores(method: str, table: Tensor, published: bool) -> dict[str, Any]:
    """Scores of a confusion matrix, and for clusters the class of each."""
    if method.startswith("linear"):
        return scores(table, identity(table.shape[1]), published=published)
    named = published_map(match(table)) if published else match(table)
    return scores(table, match(table), published=published) | {"matching": named.tolist()}
