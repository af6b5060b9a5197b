"""Evaluates a run and baselines on the same features."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .datasets import open_split, open_training_set
from .experiment import MACHINE, Experiment
from .features import Features, open_features
from .metrics import border_counts, border_f, confusion, identity, match, own_assigned, published_map, scores
from .model import Stego, mean_over_flips
from .predict import Scores, label_maps, probe_scores, refined_label_maps
from .run import Run
from .utils import devices
from .utils.errors import StegoError, enough_memory
from .utils.files import check_folder, fingerprint, read_json, without_nan, write_json
from .utils.notices import notice
from .utils.paths import shown_path
from .utils.progress import progress, say
from .utils.threads import in_threads
from .utils.torch_state import usual_modes

if TYPE_CHECKING:
    from .baselines import LinearScorer
    from .datasets.base import SegmentationDataset

# Images per batch.
BATCH = 16
# Methods that are also evaluated after the CRF, as NAME_crf.
REFINED = ("cluster", "linear", "taught", "kmeans_features")


@usual_modes()
@torch.inference_mode()
def evaluate(
    run: Run, split: str = "val", *, baselines: bool = True, crf_engine: str = "lattice", tile: int | None = None
) -> dict[str, Any]:
    """Evaluates the last step of a run on a split, and writes the run record.

    Clusters are matched to classes once for the whole split. Labels are only used for this matching, for scores and for
    linear probes (paper, section 4).

    Parameters
    ----------
    run
        The run.
    split
        "val", "train" or, if the dataset has it, "test".
    baselines
        Also evaluate k-means and a linear probe on raw features, for which features of the training split are needed.
    crf_engine
        Engine of the CRF, see `stego_lib.crf`.
    tile
        Side in pixels of a sliding window over images of `Experiment.eval_size`, as in `Run.predict`.

    Returns
    -------
    dict
        The run record. "scores" contains, for each method, "accuracy", "miou", "iou", "border_f" (`metrics.border_f`)
        and "own_miou" (`metrics.own_assigned`) in percent, and for clusters the "matching" to classes (-1 for none).
        Methods are "cluster" and "linear" of the run; the baselines "kmeans_features", "kmeans_pca", "kmeans_colors"
        and "linear_features"; with `Experiment.crf` also "cluster_crf", "linear_crf" and "kmeans_features_crf"; and
        "taught" after `Run.teach`. Linear probes need training labels. With `Official.keep_every`, "best_by_label" has
        the scores of the step with the best scores, as in the published code, which are not a result. Without labels,
        or with a single class, "scores" is empty and "unscored" has the reason.

        It is written to metrics.json for the validation split of the run's data, whose matching `Run.predict` uses, and
        otherwise to metrics-SPLIT....json.

    Raises
    ------
    StegoError
        For a split with other classes, and for an unfinished run without fitted probes.

    Notes
    -----
    Processes started by torchrun or SLURM divide the images, with the same result.

    Examples
    --------
    >>> record = evaluate(run)
    >>> record["scores"]["cluster"]["miou"]
    """
    experiment, start = run.experiment, time.perf_counter()
    devices.join(
        experiment.device, fingerprint("evaluate", experiment.to_dict(), str(run.folder.absolute()), split, tile)
    )
    run.check_fitted()
    check_folder(run.folder, "Evaluate a copy: load_run(RUN, runs_dir=FOLDER).")
    if experiment.crf:
        from .crf import check_engine

        check_engine(crf_engine)
    dataset = open_split(experiment, split)
    run.check_classes(dataset)
    with enough_memory(f"scoring {dataset.name}", "Lower eval_size, or use baselines=False or device='cpu'."):
        views = open_views(run, dataset, tile) if dataset.has_labels else None
        if devices.first():
            from .datasets.findings import show_findings

            show_findings(dataset, views.plain.class_pixels if views else None)
        results = _score(run, dataset, views, baselines, crf_engine) if views else _unscored(dataset)
    data = views.plain.fingerprints["images"] if views else None
    record = without_nan({
        "experiment": experiment.to_record(),
        "provenance": run.provenance.scored(run.backbone, experiment.feature_store).to_dict(),
        "step": run.step,
        "shifts": list(run.shifts),
        **observed(run),
        "split": split,
        **({} if tile is None else {"tile": tile}),
        "data": data,
        "images": len(dataset),
        "classes": list(run.classes.names),
        **results,
        "evaluation_seconds": round(time.perf_counter() - start, 1),
    })  # fmt: skip
    if devices.first():
        path = _record_path(run, split, data, tile)
        write_json(path, record)
        if path.name != "metrics.json":
            say(f"run record: {shown_path(path)}")
    devices.wait()
    return record


def observed(run: Run) -> dict[str, Any]:
    """The part of a run record without labels: rule of the shifts, and whether the codes have collapsed."""
    record: dict[str, Any] = {}
    if (run.folder / "correspondences.json").exists():
        keys = ("rule", "attracting", "images", "reason")
        record["calibration"] = {key: value for key, value in run.correspondences.items() if key in keys}
    if watched := run.watched:
        last = {key: (watched[key] or [None])[-1] for key in ("groups", "within", "nearest", "clusters")}
        record |= {"collapsed": watched["collapsed"], "codes": last | {"seen": watched["seen"]}}
    return record


def _record_path(run: Run, split: str, data: str | None, tile: int | None = None) -> Path:
    """Path of the run record of a split: metrics.json for the validation split of the run's data and settings.

    data: fingerprint of the images of the split, None without labels. The data of the run are those in the folder of
    training, or the first that were evaluated. tile: see `evaluate`.
    """
    first, trained = run.folder / "metrics.json", run.folder / "experiment.json"
    own = Experiment.read(trained) if trained.exists() else run.experiment
    ours, ignored = vars(run.experiment), (*MACHINE, "backbone")
    changes = [(key, ours[key]) for key in own.to_dict() if key not in ignored and ours[key] != getattr(own, key)]
    moved = not trained.exists() or run.experiment.data_root != own.data_root
    if moved and first.exists() and read_json(first)["data"] != data:
        changes.append(("data", data))
    if tile is not None:
        changes.append(("tile", tile))
    if split == "val" and not changes:
        return first
    return run.folder / f"metrics-{split}{f'-{fingerprint(changes)[:8]}' if changes else ''}.json"


@dataclass(frozen=True)
class Views:
    """Features of a split and, for averages over flips, of its mirrored images."""

    plain: Features
    flipped: Features | None = None

    def rows(self, rows: Tensor) -> list[Tensor]:
        """Features of images and, if opened, of their mirrored images, each (B, C, h, w)."""
        return [features.rows(rows) for features in (self.plain, self.flipped) if features is not None]


def open_views(run: Run, dataset: "SegmentationDataset", tile: int | None = None) -> Views:
    """Opens the features of a split for evaluation; for `tile` see `evaluate`."""
    experiment, backbone = run.experiment, run.backbone
    if tile is not None:
        from .tiles import TiledBackbone

        backbone = TiledBackbone(backbone, tile)
    root, published = run.folder.parent / "features", experiment.official.published

    def opened(mirror: bool) -> Features:
        arguments = (dataset, backbone, experiment.eval_size, root, experiment.feature_store)
        return open_features(*arguments, mirror=mirror, published=published)

    flipped = opened(mirror=True) if experiment.mirror else None
    return Views(opened(mirror=False), flipped)


def _training_features(run: Run) -> Features:
    experiment, root = run.experiment, run.folder.parent / "features"
    store, published = run.provenance.store or experiment.feature_store, experiment.official.published
    dataset = open_training_set(experiment)
    return open_features(dataset, run.backbone, experiment.train_size, root, store, published=published)


def _unscored(dataset: "SegmentationDataset", reason: str = "has no labels") -> dict[str, Any]:
    text = f"{dataset.name} {dataset.split} {reason}, so there are no scores. Segment images with run.predict(images)."
    notice(text)
    return {"scores": {}, "unscored": text}


def _score(run: Run, dataset: "SegmentationDataset", views: Views, baselines: bool, engine: str) -> dict[str, Any]:
    """The part of the run record that needs labels: scores, matching and confusion matrix."""
    experiment, published, model = run.experiment, run.experiment.official.published, run.model.eval()
    present = [class_ for class_, pixels in enumerate(views.plain.class_pixels or ()) if pixels]
    if not present:
        raise StegoError(
            f"All pixels of {dataset.name} {dataset.split} are ignored. Check the ids in {dataset.labels[0]}."
        )
    if len(present) == 1:  # any segmentation could score 100
        return _unscored(dataset, f"only has labels of {dataset.classes.names[present[0]]!r} (id {present[0]})")
    fitted = fit_baselines(run) if baselines else {}
    sizes = {"cluster": model.n_clusters} | ({"linear": len(run.classes)} if model.linear_probe.trained else {})
    taught = run.taught
    if taught is not None and set(taught.names) & set(run.classes.names):
        sizes["taught"] = len(taught.class_ids(run.classes)[1])
    counts = count_pixels(
        views,
        lambda rows: score_rows(run, views, rows, fitted),
        sizes | {name: len(baseline.bias) for name, baseline in fitted.items()},
        refined=[name for name in REFINED if experiment.crf],
        engine=engine,
        published=published,
    )
    results = {name: _scores(name, counted, published) for name, counted in counts.items()}
    return {
        "scores": results,
        **({"taught": taught.about} if taught and "taught" in sizes else {}),
        **({"crf": engine} if experiment.crf and engine != "lattice" else {}),
        **_best_by_label(run, views.plain),
        "matching": results["cluster"]["matching"],
        "confusion": counts["cluster"].confusion.tolist(),
    }


class PixelCounts(NamedTuple):
    """Counts for the scores of a method, summed over the images of a split."""

    confusion: Tensor
    """int64 (n, n_classes)."""
    own: Tensor
    """Sum of `metrics.own_assigned`, int64 (n_classes + 1, n_classes)."""
    borders: Tensor
    """Sum of `metrics.border_counts`, int64 (4,)."""


def count_pixels(
    views: Views,
    score: Callable[[Tensor], dict[str, Scores]],
    sizes: Mapping[str, int],
    *,
    refined: list[str] | tuple[str, ...] = (),
    engine: str = "lattice",
    published: bool = False,
) -> dict[str, PixelCounts]:
    """Computes `PixelCounts` of several methods in one pass over the images.

    score: indices of images, int64 (B,) -> `Scores` by method. sizes: n of each method. refined: methods to evaluate
    also after the CRF, as NAME_crf. published: see `metrics.confusion`.
    """
    plain, n_classes = views.plain, views.plain.n_classes
    refined = [name for name in sizes if name in refined]
    names = [*sizes, *(f"{name}_crf" for name in refined)]
    counts = {}
    for name in names:
        shapes = (sizes[name.removesuffix("_crf")], n_classes), (n_classes + 1, n_classes), (4,)
        counts[name] = PixelCounts(*(torch.zeros(shape, dtype=torch.int64) for shape in shapes))
    for rows in progress(devices.share(torch.arange(len(plain)).split(BATCH)), "evaluating"):
        by_method = score(rows)
        maps = {name: label_maps(by_method[name], plain.image_size) for name in sizes}
        if refined:
            images = [
                (image, [by_method[name].image(number) for name in refined])
                for number, image in enumerate(plain.image_rows(rows))
            ]
            after_crf = list(in_threads(lambda job: refined_label_maps(*job, engine), images))
            for column, name in enumerate(refined):
                maps[f"{name}_crf"] = torch.stack([labels[column] for labels in after_crf])
        labels = plain.label_rows(rows)
        for name, predicted in maps.items():
            counted = counts[name]
            for map_, label in zip(predicted, labels, strict=True):
                table = confusion(map_, label, len(counted.confusion), n_classes, published=published)
                counted.confusion.add_(table)
                counted.own.add_(own_assigned(table))
            counted.borders.add_(border_counts(predicted, labels, n_classes))
    return {name: PixelCounts(*map(devices.total, counted)) for name, counted in counts.items()}


def score_rows(run: Run, views: Views, rows: Tensor, baselines: "Mapping[str, LinearScorer]") -> dict[str, Scores]:
    """`Scores` of the probes, of `Run.taught` and of baselines for images of a split."""
    maps = views.rows(rows)
    code = run.model.mean_code(*maps)
    by_method = probe_scores(run.model, code)
    if run.taught is not None:
        inputs = code if run.taught.on == "codes" else mean_over_flips(*maps)
        by_method["taught"] = run.taught.class_scores(inputs, run.classes)
    unit = mean_over_flips(*(F.normalize(features, dim=1) for features in maps)) if baselines else code
    for name, baseline in baselines.items():
        # The factor 2 in the scores of k-means, 2 f.c - |c|^2, equals `ALPHA`, so the CRF treats both alike.
        inputs = views.plain.image_rows(rows).float() / 255 if name == "kmeans_colors" else unit
        by_method[name] = Scores(baseline(inputs))
    return by_method


@torch.inference_mode()
def probe_confusion(
    model: Stego, plain: Features, flipped: Features | None = None, *, probe: str = "cluster", published: bool = False
) -> Tensor:
    """Confusion matrix of the "cluster" or "linear" probe, int64 (n, n_classes), on features as in `Views`."""
    views, size = Views(plain, flipped), {"cluster": model.n_clusters, "linear": plain.n_classes}[probe]
    model.eval()
    counts = count_pixels(
        views, lambda rows: probe_scores(model, model.mean_code(*views.rows(rows))), {probe: size}, published=published
    )
    return counts[probe].confusion


def _best_by_label(run: Run, plain: Features) -> dict[str, Any]:
    """Scores of the cluster probe at the best kept step, without flips and CRF, as in the published code."""
    if not run.experiment.official.keep_every:
        return {}
    from .probes import fit_probes

    model, published, by_step = copy.deepcopy(run.model), run.experiment.official.published, {}
    for step, state in run.kept_weights():
        model.load_state_dict(state)
        if run.experiment.probes == "after" and not run.experiment.own_prototypes:
            fit_probes(model, _training_features(run), run.experiment.seed, linear=False)
        table = probe_confusion(model, plain, published=published)
        by_step[step] = _matched_scores(table, published)
    if not by_step:
        return {}
    best = max(by_step, key=lambda step: by_step[step]["miou"])
    curve = {"steps": list(by_step), "miou_by_step": [result["miou"] for result in by_step.values()]}
    return {"best_by_label": {"step": best, **by_step[best], **curve}}


def fit_kmeans(run: Run) -> "LinearScorer":
    """Fits k-means to the raw training features, with the seed and number of clusters of the run."""
    from .baselines import kmeans_on_features

    training, count, seed = _training_features(run), run.model.n_clusters, run.experiment.seed
    return devices.once(lambda: kmeans_on_features(training, count, seed))  # processes could differ by rounding


def fit_baselines(run: Run) -> "dict[str, LinearScorer]":
    """Fits all baselines to the training images; the linear probe needs labels."""
    from .baselines import kmeans_on_colors, kmeans_on_components, linear_on_features

    training, count, seed = _training_features(run), run.model.n_clusters, run.experiment.seed
    fitted = {
        "kmeans_features": fit_kmeans(run),
        "kmeans_pca": devices.once(lambda: kmeans_on_components(training, run.experiment.code_dim, count, seed)),
        "kmeans_colors": devices.once(lambda: kmeans_on_colors(training, count, seed)),
    }
    if training.has_labels:
        fitted["linear_features"] = devices.once(lambda: linear_on_features(training, seed))
    return fitted


def _scores(method: str, counts: PixelCounts, published: bool) -> dict[str, Any]:
    """Scores of a method and, for clusters, their matching."""
    table, n_classes = counts.confusion, counts.confusion.shape[1]
    own = scores(counts.own, torch.tensor([*range(n_classes), -1]))  # the last row is unmatched
    more = {"border_f": border_f(counts.borders), "own_miou": own["miou"]}
    if method.startswith(("linear", "taught")):
        no_class = torch.full((len(table) - n_classes,), -1)
        return scores(table, torch.cat([identity(n_classes), no_class]), published=published) | more
    return _matched_scores(table, published) | more


def _matched_scores(table: Tensor, published: bool) -> dict[str, Any]:
    """Scores and matching of clusters."""
    matching = match(table)
    named = published_map(matching) if published else matching
    return scores(table, matching, published=published) | {"matching": named.tolist()}
