"""A run is one folder: `Run` reads it, `load_run` opens it, `find_run` finds it."""

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .annotations import names as naming
from .annotations.names import NOTHING
from .backbone import Backbone
from .datasets import Classes, SegmentationDataset, open_training_set
from .datasets.classes import distinct_names, muted_colors, read_classes, without_names, write_classes
from .datasets.images import ImageLike, as_tensor
from .experiment import EVALUATION, MACHINE, Experiment
from .export.onnx_file import export_onnx
from .features import Features
from .features.source import content_id
from .model import Stego
from .networks.checkpoint import read_published
from .predict import MAX_ASPECT_RATIO, Scores, label_maps, probe_scores, score_image
from .provenance import Provenance
from .utils import devices
from .utils.errors import StegoError
from .utils.fields import split_backbone
from .utils.files import disk_errors, fingerprint, load_state, read_json, remove_temporary, save_state, write_json
from .utils.notices import notice
from .utils.paths import runs_root, shown_path, user_path

RESUME = "train.ipynb with the same parameters and -p resume True, or train(run.experiment, resume=True)"


class Run:
    """A training run: made by `train`, opened by `load_run`.

    Its folder holds

    * experiment.json, classes.json: what was asked for;
    * checkpoint.pt: weights, optimizer, step; kept/: weights at earlier steps, with `Experiment.validate_every`;
    * log.csv: losses and mean code correspondences, one line per step;
    * correspondences.json: the shifts, why they have their values, and histograms of the correspondences;
    * watch.json: how many groups the codes fell into;
    * metrics.json: the run record that `evaluate` writes for the validation split; metrics-SPLIT....json for others;
    * names.json: what `name_segments` called the clusters.

    A released checkpoint has only what evaluating it leaves.
    """

    def __init__(
        self, folder: Path, experiment: Experiment, classes: Classes, model: Stego, backbone: Backbone | None = None
    ):
        self.folder, self.experiment, self.classes, self.model = folder, experiment, classes, model
        self.step, self.shifts = 0, (0.0, 0.0, 0.0)
        self.provenance = Provenance()
        """What the run was made from. A released checkpoint does not tell."""
        self._shown: set[str] = set()
        if backbone is not None:
            self.backbone = backbone

    def __repr__(self) -> str:
        return f"Run({shown_path(self.folder)!r}, {self.experiment.name}, step {self.step} of {self.experiment.steps})"

    @cached_property
    def backbone(self) -> Backbone:
        """The frozen backbone, loaded at first use. Raises StegoError if its weights are not those of training."""
        _, file = split_backbone(self.experiment.backbone)
        if file and not Path(file).is_file():
            raise StegoError(
                f"backbone file {file} does not exist, on which {self.folder} was trained; put it into the run's folder, or open "
                "the run with load_run(RUN, backbone=FILE)"
            )
        backbone = Backbone.of(self.experiment)
        if self.provenance.weights not in (None, backbone.weights_id):
            raise StegoError(
                f"{self.folder} was trained on other weights of {self.experiment.backbone} than there are now; name the file that "
                "has them, load_run(RUN, backbone=FILE), or train it again"
            )
        return backbone

    # ------------------------------------------------------------------------------------------ what it left

    @property
    def log(self) -> pd.DataFrame:
        """Losses and mean code correspondences, one row per step."""
        path = self.folder / "log.csv"
        if not path.exists():
            raise StegoError(f"{self.folder} has no log.csv: a released checkpoint has none, or the file was removed")
        return pd.read_csv(path, index_col="step")

    @property
    def correspondences(self) -> dict[str, Any]:
        """correspondences.json, see `calibration.Calibration`."""
        return read_json(self.folder / "correspondences.json")

    @property
    def watched(self) -> dict[str, Any]:
        """watch.json, see `watch.Watch`; empty where there is none."""
        path = self.folder / "watch.json"
        return read_json(path) if path.exists() else {}

    @property
    def observed(self) -> dict[str, Any]:
        """The part of a run record that needs no labels: how the shifts were set, whether the codes collapsed, a compact store."""
        found: dict[str, Any] = {}
        if (self.folder / "correspondences.json").exists():
            about = self.correspondences
            keys = ("rule", "attracting", "images", "reason")
            found["calibration"] = {key: about[key] for key in keys if key in about}
        if seen := self.watched:
            last = {key: seen[key][-1] if seen[key] else None for key in ("groups", "within", "nearest", "clusters")}
            found |= {"collapsed": seen["collapsed"], "codes": last | {"seen": seen["seen"]}}
        return found

    @property
    def metrics(self) -> dict[str, Any]:
        """The run record of the validation split of the run's own data. Raises StegoError before `evaluate`."""
        path = self.folder / "metrics.json"
        if not path.exists():
            raise StegoError(f"{self.folder} has no metrics.json yet; call evaluate(run)")
        return read_json(path)

    # ------------------------------------------------------------------------------------------ checkpoints

    def save(self, optimizer: torch.optim.Optimizer, beside: dict[str, Any]) -> None:
        """Writes checkpoint.pt atomically. beside: `training.Trainer.state`."""
        save_state(
            self.folder / "checkpoint.pt",
            {
                "step": self.step, "model": self.model.state_dict(), "optimizer": optimizer.state_dict(),
                "shifts": list(self.shifts), "beside": beside,
            },
        )  # fmt: skip

    def save_experiment(self) -> None:
        """Writes what determines the run; experiment.json, by which a run is found, comes last."""
        write_classes(self.folder / "classes.json", self.classes)
        write_json(self.folder / "provenance.json", self.provenance.to_dict())
        write_json(self.folder / "experiment.json", self.experiment.to_dict())

    def load_checkpoint(self) -> dict[str, Any]:
        """Takes weights, step and shifts from checkpoint.pt, and returns all that it holds."""
        state = read_checkpoint(self.folder)
        refuse_misfit(self.model, state, self.folder)
        self.model.load_state_dict(state["model"])
        self.step, self.shifts = state["step"], tuple(state["shifts"])
        return state

    def resume(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Loads the last checkpoint, and removes files that were being written when the run was killed.

        Returns what `training.Trainer.state` gave to `save`.
        """
        state = self.load_checkpoint()
        optimizer.load_state_dict(state["optimizer"])
        if devices.first():
            for folder in (self.folder, self.folder / "kept"):
                remove_temporary(folder)
            write_json(
                self.folder / "experiment.json", self.experiment.to_dict()
            )  # MACHINE and EVALUATION fields may differ
        return state.get("beside", {})

    def refuse_nonfinite(self, values: dict[str, Any], saved: int) -> None:
        """StegoError for a loss term or weight that is not finite; `saved`: step of the last checkpoint."""
        wrong = [name for name, value in values.items() if not torch.as_tensor(value).isfinite().all()]
        if wrong:
            term = next((name for name in wrong if name != "loss"), "loss")  # a part of the sum says more
            raise StegoError(
                f"{self.folder}: {term} is not a finite number at step {self.step}, so training stopped; the last checkpoint, of "
                f"step {saved}, is good. Lower lr_head or lr_probes, or look at the images and the backbone"
            )

    def keep_weights(self) -> None:
        """Writes the weights of this step to kept/STEP.pt."""
        save_state(self.folder / "kept" / f"{self.step:07d}.pt", {"model": self.model.state_dict()})

    def kept_weights(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Step and model state of each file in kept/, in the order of steps."""
        for path in sorted((self.folder / "kept").glob("[0-9]*.pt")):
            yield int(path.stem), load_state(path)["model"]

    def refuse_unfitted(self) -> None:
        """StegoError if training stopped before the probes were fitted, because they hold random numbers.

        With probes="joint" they are as good as the head, so only a notice says where the run stopped.
        """
        done, steps = self.step, self.experiment.steps
        if done >= steps or not (self.folder / "experiment.json").exists():  # a released checkpoint has its probes
            return
        if self.experiment.probes == "after":
            raise StegoError(
                f"{shown_path(self.folder)} stopped at step {done} of {steps}, before its probes were fitted, so it has no "
                f"clusters yet; finish it first: {RESUME}"
            )
        self._notice(f"{shown_path(self.folder)} stopped at step {done} of {steps}; to finish it: {RESUME}")

    def refuse_other_classes(self, dataset: SegmentationDataset) -> None:
        """StegoError for a dataset whose classes are not those of the run."""
        ours, theirs = self.classes, dataset.classes
        if len(theirs) != len(ours):
            raise StegoError(
                f"{dataset.name} has {len(theirs)} classes, this run was trained for {len(ours)}; evaluate it on its own dataset"
            )
        if theirs.names != ours.names and not without_names(ours) and not without_names(theirs):
            raise StegoError(
                f"{dataset.name} has the classes {', '.join(theirs.names[:3])} ..., this run was trained for "
                f"{', '.join(ours.names[:3])} ...; evaluate it on its own dataset"
            )

    def _notice(self, text: str) -> None:
        """A notice, once per run."""
        if text not in self._shown:
            self._shown.add(text)
            notice(text)

    # ------------------------------------------------------------------------------------------ prediction

    def code(self, images: Tensor) -> Tensor:
        """Codes (B, K, h, w) of uint8 images (B, 3, H, W), averaged over horizontal flips if the experiment says so."""
        if not self.experiment.mirror:
            return self.model.mean_code(self.backbone(images))
        features, flipped = self.backbone(torch.cat([images, images.flip(-1)])).chunk(2)
        return self.model.mean_code(features, flipped)

    def scores(self, image: Tensor) -> Scores:
        """Scores of the cluster probe on the grid of one image, uint8 (3, H, W), at the working size of `predict`."""
        experiment = self.experiment
        return score_image(
            image,
            lambda images: probe_scores(self.model, self.code(images))["cluster"],
            experiment.eval_size,
            self.backbone.patch,
            experiment.official.published,
        )

    @overload
    def predict(self, images: ImageLike) -> np.ndarray: ...
    @overload
    def predict(self, images: list[Any] | tuple[Any, ...]) -> list[np.ndarray]: ...
    @torch.inference_mode()
    def predict(self, images: ImageLike | list[Any] | tuple[Any, ...]) -> np.ndarray | list[np.ndarray]:
        """Label map of an image at its own resolution; of a list of images, a list of label maps.

        Parameters
        ----------
        images
            A path, a PIL image, a uint8 array (H, W, 3), a uint8 tensor (3, H, W), or a list of these, of any size. Files are
            read as those of the training data were: upright by their EXIF data, unless classes.json says otherwise. A PIL
            image, an array and a tensor are not rotated.

        Returns
        -------
        numpy.ndarray or list
            uint8 (H, W), ids into `segments`: for an evaluated run, classes and then the clusters without a class; else
            clusters. 255 (`NOTHING`) where a file or PIL image is transparent, and where a cluster was dropped.

        Raises
        ------
        StegoError
            For a file that cannot be read, for an array that is no image, and for an unfinished run without clusters.

        Examples
        --------
        >>> label_map = run.predict("image.jpg")
        """
        if isinstance(images, list | tuple):
            return [self.predict(image) for image in images]
        self.refuse_unfitted()
        pixels, transparent = as_tensor(images, self.classes.rules)
        labels = label_maps(self.scores(pixels), tuple(pixels.shape[1:]), self._ids)[0].numpy()
        if transparent is not None:
            labels[transparent] = NOTHING
        return labels

    def export(
        self, path: str | Path, *, precision: str = "float32", outputs: tuple[str, ...] = ("labels", "scores")
    ) -> dict[str, Any]:
        """Writes the run as one ONNX file: from an RGB image of any size to a score of each segment at every pixel.

        Normalization, resizing, backbone, head, cluster probe and matching are in the graph; a dense CRF is not. Its input is
        "image", uint8 (H, W, 3). Names and colors of the ids, sizes and origin are in the file's metadata, each as JSON.

        Parameters
        ----------
        path
            The file, .onnx.
        precision
            "float32", or "int8": the weights of the matrix products in 8 bits, a quarter of the size.
        outputs
            What the graph returns, see `export.graph.OUTPUTS`. A large image needs 4 bytes per pixel and segment for "scores".

        Returns
        -------
        dict
            The metadata, and "path", "bytes", "agreement": the share of the pixels of some images, named by "compared_on", that
            such a graph labels as `predict` does in float32. A line says it too.

        Raises
        ------
        StegoError
            Where onnx and onnxruntime are not installed, for an unfinished run, and for a backbone that torch cannot trace.

        Notes
        -----
        A backbone that cannot be traced for free sizes is exported for one working size, with a notice.

        Examples
        --------
        >>> run.export("stego.onnx", precision="int8")["agreement"]
        """
        self.refuse_unfitted()
        return export_onnx(self, path, precision, outputs, self._ids.tolist(), MAX_ASPECT_RATIO)

    @property
    def matched(self) -> bool:
        """Whether `evaluate` has matched the clusters to classes."""
        return self._matching is not None

    @property
    def segments(self) -> Classes:
        """Name and color of every id of `predict`, by position: what `name_segments` called them, else `unnamed_segments`."""
        return naming.merge(self.unnamed_ids, self.unnamed_segments, self.names)[1]

    @property
    def unnamed_segments(self) -> Classes:
        """The segments without the names of `name_segments`. Evaluation, and the figures of run records, speak of these.

        For matched clusters: the classes, then the clusters without a class. Else: the clusters. Clusters are called
        "cluster 0" and so on, in muted colors, so that nobody takes them for classes.
        """
        count, matching = self.model.n_clusters, self._matching
        if matching is not None:
            own, others = self.classes, [cluster for cluster in range(count) if matching[cluster] < 0]
        elif all(re.fullmatch(r"cluster \d+", name) for name in self.classes.names):
            own, others = self.classes, list(range(len(self.classes), count))
        else:
            own, others = None, list(range(count))
        names = [*(own.names if own else ()), *(f"cluster {cluster}" for cluster in others)]
        return Classes(tuple(distinct_names(names)), (*(own.colors if own else ()), *muted_colors(len(others))))

    def name_segments(self, names: Mapping[str, str | None] | None) -> None:
        """Names segments: writes names.json into the run's folder. `predict` and `segments` follow it, also after `evaluate`.

        The names hold for the clusters that the run has now. After further training they are refused. Scores do not depend on them.

        Parameters
        ----------
        names
            Name in `unnamed_segments` -> name. Segments of one name are merged. None drops a segment: its pixels get id 255.
            Segments that are left out keep their names. Earlier names are forgotten; None in place of a dictionary does this alone.

        Raises
        ------
        StegoError
            For an unknown segment, a name that is none, and if every segment is dropped.

        Examples
        --------
        >>> run.name_segments({"cluster 0": "road", "cluster 3": "road", "cluster 5": None})
        """
        self.refuse_unfitted()
        path = self.folder / naming.FILE
        if names is None:
            path.unlink(missing_ok=True)
            return
        clusters = self.model.cluster_probe.clusters
        naming.write_names(path, names, self.unnamed_segments, self.unnamed_ids, self.step, clusters)

    @property
    def names(self) -> dict[int, str | None]:
        """Cluster -> what it was called, None if dropped; empty without names.json. StegoError for names of another training."""
        return naming.read_names(self.folder / naming.FILE, self.step, self.model.cluster_probe.clusters)

    @property
    def _matching(self) -> list[int] | None:
        """Class of each cluster, -1 for one without, from metrics.json; None before this step was evaluated."""
        record = self.metrics if (self.folder / "metrics.json").exists() else {}
        matching = record.get("matching") if record.get("step") == self.step else None
        count, classes = self.model.n_clusters, range(-1, len(self.classes))
        if matching is not None and (len(matching) != count or any(class_ not in classes for class_ in matching)):
            raise StegoError(
                f"{self.folder / 'metrics.json'} does not fit the run: its matching is not one of {count} clusters and "
                f"{len(self.classes)} classes; remove it, and call evaluate(run) again"
            )
        return matching

    @property
    def _ids(self) -> np.ndarray:
        """The id of each cluster in label maps, uint8 (n_clusters,); 255 for one that was dropped."""
        return naming.merge(self.unnamed_ids, self.unnamed_segments, self.names)[0]

    @property
    def unnamed_ids(self) -> np.ndarray:
        """The segment of each cluster without names, uint8 (n_clusters,): ids into `unnamed_segments`."""
        ids = np.arange(self.model.n_clusters)
        if (matching := self._matching) is not None:
            ids = np.array(matching)
            ids[ids < 0] = len(self.classes) + np.arange((ids < 0).sum())
        return ids.astype(np.uint8)


# ---------------------------------------------------------------------------------------------- models and checkpoints


def build_model(experiment: Experiment, in_dim: int, n_classes: int) -> Stego:
    """A model with fresh weights drawn from the experiment's seed.

    Raises StegoError for more clusters than an 8-bit label map can number beside 255, which means transparency.
    """
    if (clusters := n_classes + experiment.official.extra_clusters) > NOTHING:
        raise StegoError(
            f"{n_classes} classes and extra_clusters = {experiment.official.extra_clusters} make {clusters} clusters; label maps number "
            f"{NOTHING} at most"
        )
    with torch.random.fork_rng([]):  # weights are drawn on the CPU
        torch.default_generator.manual_seed(experiment.seed)
        return Stego(
            in_dim, experiment.code_dim, n_classes,
            head=experiment.head, dropout=experiment.dropout, extra_clusters=experiment.official.extra_clusters,
            decoder=experiment.official.rec_weight > 0, lengths=experiment.method == "primaps",
        )  # fmt: skip


def refuse_too_many_clusters(model: Stego, features: Features) -> None:
    """StegoError for more clusters than there are grid cells."""
    count, _, height, width = features.shape
    if model.n_clusters > count * height * width:
        raise StegoError(
            f"{model.n_clusters} clusters cannot be found in {count} training images of {height} x {width} grid cells; lower "
            "n_classes or extra_clusters, or take more or larger images (train_size)"
        )


def copy_weights(source: Run, model: Stego) -> str:
    """Copies head, feature mean and probes of a run into `model`; probes for other numbers of classes or clusters start anew.

    Returns a fingerprint of what was copied. Raises StegoError where the head does not fit.
    """
    theirs, ours = source.model.state_dict(), model.state_dict()
    fitting = {name: value for name, value in theirs.items() if name in ours and value.shape == ours[name].shape}
    wrong = [name for name in ours if name.startswith(("head.", "feature_mean")) and name not in fitting]
    if wrong or source.model.head.kind != model.head.kind:
        raise StegoError(
            f"start_from {source!r}: its head is of another kind or size than this experiment's; take backbone, features, head "
            "and code_dim from its experiment"
        )
    if source.step < source.experiment.steps and (source.folder / "experiment.json").exists():
        notice(f"start_from: {source.folder} stopped at step {source.step} of {source.experiment.steps}")
    anew = [name for name in ours if "probe" in name and name not in fitting]
    if anew:
        notice(f"start_from: {', '.join(anew)} begin anew, for another number of classes or clusters")
    model.load_state_dict(fitting, strict=False)
    return fingerprint(*(item for pair in sorted(fitting.items()) for item in pair))


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """What `Run.save` wrote. Raises StegoError for a file that is broken or holds something else."""
    path = folder / "checkpoint.pt"
    state = load_state(path)
    if "optimiser" in state:  # of version 0.1.0  # codespell:ignore optimiser
        state["optimizer"] = state.pop("optimiser")  # codespell:ignore optimiser
    kinds = {"step": int, "model": dict, "optimizer": dict, "shifts": list}
    wrong = [key for key, kind in kinds.items() if not isinstance(state.get(key), kind)]
    wrong += [] if wrong or len(state["shifts"]) == 3 else ["shifts"]
    wrong += [] if wrong or all(isinstance(value, Tensor) for value in state["model"].values()) else ["model"]
    wrong += [] if wrong or getattr(state["model"].get("feature_mean"), "ndim", 0) == 4 else ["feature_mean"]
    if wrong:
        raise StegoError(
            f"{path} is not a checkpoint of a run: {', '.join(wrong)} missing or of another kind; remove it, and train again"
        )
    return state


def refuse_misfit(model: Stego, state: dict[str, Any], folder: Path) -> None:
    """StegoError for weights of a checkpoint that differ from the model's by name or shape."""
    theirs, ours = (
        {name: value.shape for name, value in found.items()} for found in (state["model"], model.state_dict())
    )
    wrong = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    if wrong:
        raise StegoError(
            f"{folder / 'checkpoint.pt'} does not fit {folder / 'experiment.json'}: {', '.join(wrong[:5])} missing, unknown or "
            "of another shape; are they of one run?"
        )


FILES = ("experiment.json", "classes.json", "provenance.json", "checkpoint.pt")
"""What a run folder cannot do without."""
EVALUATION_KEYS = ("dataset", "backbone", "official", *EVALUATION, *MACHINE)
"""Fields of the experiment that may change when a run is opened, because training does not depend on them."""


def load_run(path: str | Path, *, runs_dir: str | Path | None = None, **changes: Any) -> Run:
    """Opens a run folder, or a checkpoint that STEGO's authors released (.ckpt).

    Parameters
    ----------
    path
        The folder or file.
    runs_dir
        Where the evaluation of a .ckpt goes, in a folder of its own; `runs/` of the project by default.
    changes
        Values of the experiment for evaluation, see `EVALUATION_KEYS`; `backbone` names another place of the same weights. A
        weight file in the run's folder is found there.

    Raises
    ------
    StegoError
        That names what is missing, broken or cannot be changed.

    Examples
    --------
    >>> run = load_run("runs/20260102-030405-scenes-scenes_vit_tiny8-seed0", crf=False)
    """
    released = Path(path).suffix.lower() == ".ckpt"
    possible = [
        key for key in EVALUATION_KEYS if not released or key != "backbone"
    ]  # a released checkpoint has its own
    unknown = [key for key in changes if key not in possible]
    if unknown:
        raise StegoError(
            f"load_run cannot change {', '.join(unknown)}: the run was trained with it; it can change {', '.join(possible)}"
        )
    folder = user_path(path)
    if released:
        return _load_published(folder, user_path(runs_dir, runs_root()), changes)
    missing = [name for name in FILES if not (folder / name).exists()]
    if missing:
        raise StegoError(f"{folder.resolve()} is not a run with a checkpoint: {', '.join(missing)} missing")
    asked = Experiment.read(folder / "experiment.json")
    experiment = asked.but(**{"backbone": _located(asked.backbone, folder)} | changes)
    classes = read_classes(folder / "classes.json")
    state = read_checkpoint(folder)
    in_dim = state["model"]["feature_mean"].shape[1]
    with torch.device("meta"):  # shapes alone: a small file may name a model that no memory holds
        refuse_misfit(build_model(experiment, in_dim, len(classes)), state, folder)
    run = Run(folder, experiment, classes, build_model(experiment, in_dim, len(classes)).eval())
    run.load_checkpoint()
    run.provenance = read_provenance(folder)
    if "backbone" in changes and experiment.backbone != asked.backbone:
        _ = run.backbone  # other weights are refused at once
    return run


def _located(backbone: str, folder: Path) -> str:
    """The backbone of a run, with its file in the run's folder if it is missing where it was."""
    name, file = split_backbone(backbone)
    here = folder.absolute() / Path(file).name
    return (
        "@".join(filter(None, (name, str(here)))) if file and not Path(file).exists() and here.is_file() else backbone
    )


def _load_published(path: Path, runs_dir: Path, changes: dict[str, Any]) -> Run:
    found = read_published(path)
    experiment = Experiment.from_dict(found.experiment.to_dict() | changes)
    model = build_model(experiment, found.vit.embed_dim, len(found.classes))
    model.load_state_dict(found.weights, strict=False)  # without feature mean and decoder
    # One folder for each set of weights and way of evaluating, so that no matching of another dataset is used.
    of_values = {key: value for key, value in experiment.to_dict().items() if key not in ("data_root", "backbone")}
    key = fingerprint(*sorted(found.weights.items()), sorted(of_values.items()))
    run = Run(runs_dir / f"{path.stem}-{experiment.dataset}-{key[:8]}", experiment, found.classes, model.eval())
    own, knn, rand = (float(shift) for shift in experiment.shifts)
    run.step, run.shifts = found.step, (own, knn, rand)
    return run


# ---------------------------------------------------------------------------------------------- run folders


def new_folder(runs_dir: Path, experiment: Experiment) -> Path:
    """Makes a folder named by time and experiment; two processes that ask at once get one each."""
    stem, number = f"{datetime.now():%Y%m%d-%H%M%S}-{experiment.name}", 1
    while True:
        folder = runs_dir / (stem if number == 1 else f"{stem}-{number}")
        try:
            with disk_errors(folder.parent):
                folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def read_provenance(folder: Path) -> Provenance:
    """The provenance of a run folder."""
    return Provenance.from_dict(read_json(folder / "provenance.json"))


def fingerprints_of(dataset: SegmentationDataset, runs_dir: Path) -> dict[str, str | None]:
    """Fingerprints of a split: "images", and "labels", which is None without them."""
    root = runs_dir / "features"
    labels = content_id(dataset, root) if dataset.has_labels else None
    return {"images": content_id(dataset, root, labels=False), "labels": labels}


def find_run(runs_dir: Path, experiment: Experiment, provenance: Provenance) -> Path | None:
    """The newest run of this experiment and provenance that has a checkpoint, or None.

    Fields of `MACHINE` and `EVALUATION` may differ. Where there is none, a notice says that training starts from step 0, and
    in what the newest run of the same experiment differs.
    """
    compared, differing = comparable(experiment), []
    for path in sorted(runs_dir.glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime, reverse=True):
        folder = path.parent
        if not all((folder / name).exists() for name in FILES):
            continue
        if comparable(Experiment.read(folder / "experiment.json")) != compared:
            continue
        changed = read_provenance(folder).differing(provenance)
        if not changed:
            return folder
        differing.append(f"{folder.name} differs in {', '.join(changed)}")
    notice("; ".join(["no run of this experiment to resume: training starts from step 0", *differing[:1]]))
    return None


def comparable(experiment: Experiment) -> dict[str, Any]:
    """What decides, beside the provenance, whether two runs are the same: the provenance knows the start by its content."""
    return {key: value for key, value in experiment.to_record().items() if key not in (*EVALUATION, "start_from")}


def newest_run(runs_dir: str | Path | None = None) -> Path:
    """The run folder with the newest checkpoint. Raises StegoError if there is none."""
    runs_dir = user_path(runs_dir, runs_root())
    found = sorted(runs_dir.glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise StegoError(f"{runs_dir} holds no run; train one first (make train), or name a run folder")
    return found[-1].parent


def record_path(run: Run, split: str, data: str) -> Path:
    """The file of the run record of a split: metrics.json for the validation split of the run's own data, scored as it says.

    data: fingerprint of the split's images.
    """
    experiment, asked = run.experiment, run.folder / "experiment.json"
    others: list[Any] = []
    if asked.exists():
        trained = Experiment.read(asked)
        fields = experiment.differing(trained, (*MACHINE, "data_root", "backbone"))
        others = [(key, getattr(experiment, key)) for key in fields]
        if not _own_data(run, trained):
            others.append(data)
    elif (run.folder / "metrics.json").exists() and run.metrics.get("data", data) != data:
        others.append(data)  # the own data of a released checkpoint are those that it was scored on first
    if split == "val" and not others:
        return run.folder / "metrics.json"
    return run.folder / f"metrics-{split}{f'-{fingerprint(others)[:8]}' if others else ''}.json"


def _own_data(run: Run, trained: Experiment) -> bool:
    """Whether the run was trained on the training split that its experiment names now, wherever that lies."""
    if run.experiment.dataset != trained.dataset:
        return False
    try:
        training = open_training_set(run.experiment)
    except StegoError:  # the training split may be missing here
        return user_path(run.experiment.data_root).resolve() == user_path(trained.data_root).resolve()
    return fingerprints_of(training, run.folder.parent)["images"] == run.provenance.images
