"""A run is one folder: `Run` reads and writes it, `load_run` opens it, `find_run` finds it."""

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any, overload

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .annotations import names as naming
from .annotations.names import NOTHING
from .backbone import Backbone
from .datasets import Classes, SegmentationDataset
from .datasets.classes import distinct_names, muted_colors, read_classes, without_names, write_classes
from .datasets.images import ImageLike, as_tensor
from .experiment import EVALUATION, MACHINE, Experiment
from .model import Stego, build_model
from .networks.checkpoint import read_published
from .predict import Scores, label_maps, probe_scores, score_image
from .provenance import Provenance
from .utils import devices
from .utils.errors import StegoError
from .utils.fields import split_backbone
from .utils.files import disk_errors, fingerprint, read_json, remove_temporary, write_json
from .utils.notices import notice
from .utils.paths import runs_root, shown_path, user_path
from .utils.states import load_state, save_state

CHECKPOINT = "checkpoint.safetensors"
# Files that a run folder cannot do without.
FILES = ("experiment.json", "classes.json", "provenance.json", CHECKPOINT)


class Run:
    """A training run: made by `train`, opened by `load_run`.

    Its folder holds

    * experiment.json, classes.json, provenance.json: what the run is made from;
    * checkpoint.safetensors: weights, optimizer, step; kept/: weights at earlier steps, with `Official.keep_every`;
    * log.csv: losses and mean code correspondences, one line per step;
    * correspondences.json: the shifts, why they have their values, and histograms of the correspondences;
    * watch.json: how many groups the codes fell into;
    * metrics.json: the run record that `evaluate` writes for the validation split; metrics-SPLIT....json for others;
    * names.json: what `name_segments` called the clusters.

    The folder of a released checkpoint holds only what evaluating it writes.
    """

    def __init__(
        self, folder: Path, experiment: Experiment, classes: Classes, model: Stego, backbone: Backbone | None = None
    ):
        self.folder, self.experiment, self.classes, self.model = folder, experiment, classes, model
        self.step, self.shifts = 0, (0.0, 0.0, 0.0)
        self.provenance = Provenance()
        """What the run was made from; unknown for a released checkpoint."""
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
            raise StegoError(f"backbone file {file} does not exist. Open the run with load_run(RUN, backbone=FILE).")
        backbone = Backbone.of(self.experiment)
        if self.provenance.weights not in (None, backbone.weights_id):
            raise StegoError(
                f"{self.folder} was trained on other weights of {self.experiment.backbone}. "
                "Open it with load_run(RUN, backbone=FILE)."
            )
        return backbone

    # ------------------------------------------------------------------------------------------ reading

    @property
    def log(self) -> pd.DataFrame:
        """Losses and mean code correspondences, one row per step."""
        path = self.folder / "log.csv"
        if not path.exists():
            raise StegoError(f"{self.folder} has no log.csv. Released checkpoints have none.")
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
        """The part of a run record that needs no labels: how the shifts were set, and whether the codes collapsed."""
        record: dict[str, Any] = {}
        if (self.folder / "correspondences.json").exists():
            measured, keys = self.correspondences, ("rule", "attracting", "images", "reason")
            record["calibration"] = {key: measured[key] for key in keys if key in measured}
        if watched := self.watched:
            last = {key: (watched[key] or [None])[-1] for key in ("groups", "within", "nearest", "clusters")}
            record |= {"collapsed": watched["collapsed"], "codes": last | {"seen": watched["seen"]}}
        return record

    @property
    def metrics(self) -> dict[str, Any]:
        """The run record of the validation split of the run's own data. Raises StegoError before `evaluate`."""
        path = self.folder / "metrics.json"
        if not path.exists():
            raise StegoError(f"{self.folder} has no metrics.json. Call evaluate(run).")
        return read_json(path)

    def kept_weights(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Step and model state of each file in kept/, in the order of steps."""
        for path in sorted((self.folder / "kept").glob("[0-9]*.safetensors")):
            yield int(path.stem), load_state(path)

    # ------------------------------------------------------------------------------------------ writing

    def save(self, optimizer: torch.optim.Optimizer, trainer: dict[str, Any]) -> None:
        """Writes the checkpoint atomically. trainer: `training.Trainer.state`."""
        state = {"step": self.step, "shifts": self.shifts, "model": self.model.state_dict()}
        save_state(self.folder / CHECKPOINT, state | {"optimizer": optimizer.state_dict(), "trainer": trainer})

    def save_weights(self) -> None:
        """Writes the weights of this step to kept/STEP.safetensors."""
        save_state(self.folder / "kept" / f"{self.step:07d}.safetensors", self.model.state_dict())

    def save_experiment(self) -> None:
        """Writes what determines the run; experiment.json, by which a run is found, comes last."""
        write_classes(self.folder / "classes.json", self.classes)
        write_json(self.folder / "provenance.json", self.provenance.to_dict())
        write_json(self.folder / "experiment.json", self.experiment.to_dict())

    def load_checkpoint(self) -> dict[str, Any]:
        """Takes weights, step and shifts from the checkpoint, and returns all that it holds."""
        path = self.folder / CHECKPOINT
        state = load_state(path)
        try:
            self.model.load_state_dict(state["model"])
            self.step, self.shifts = state["step"], tuple(state["shifts"])
        except (KeyError, RuntimeError) as error:
            raise StegoError(f"{path} does not fit experiment.json. Are the files of one run?") from error
        return state

    def resume(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Loads the last checkpoint and removes half-written files. Returns what `training.Trainer.state` gave to `save`."""
        state = self.load_checkpoint()
        optimizer.load_state_dict(state["optimizer"])
        if devices.first():
            for folder in (self.folder, self.folder / "kept"):
                remove_temporary(folder)
            # Fields of `MACHINE` and `EVALUATION` may differ.
            write_json(self.folder / "experiment.json", self.experiment.to_dict())
        return state["trainer"]

    # ------------------------------------------------------------------------------------------ checks

    def check_fitted(self) -> None:
        """StegoError if training stopped before the probes were fitted, because they hold random numbers.

        With probes="joint" they are as good as the head, so a notice says where the run stopped.
        """
        if self.step >= self.experiment.steps or not (self.folder / "experiment.json").exists():
            return
        text = f"{shown_path(self.folder)} stopped at step {self.step} of {self.experiment.steps}"
        if self.experiment.probes == "after":
            raise StegoError(
                f"{text}, before its probes were fitted. Finish it with train(run.experiment, resume=True)."
            )
        self._notice(f"{text}; train(run.experiment, resume=True) finishes it")

    def check_classes(self, dataset: SegmentationDataset) -> None:
        """StegoError for a dataset whose classes are not those of the run. Corrected names pass, another order does not."""
        ours, theirs = self.classes, dataset.classes
        if len(theirs) != len(ours):
            raise StegoError(f"{dataset.name} has {len(theirs)} classes; this run was trained for {len(ours)}.")
        if without_names(ours) or without_names(theirs):
            return
        pairs = list(zip(ours.names, theirs.names, strict=True))
        moved = [name for old, name in pairs if name != old and name in ours.names]
        if moved or all(old != name for old, name in pairs):
            raise StegoError(
                f"{dataset.name} has the classes {', '.join(theirs.names[:3])}, ...; this run was trained for "
                f"{', '.join(ours.names[:3])}, ... in this order."
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
        self.check_fitted()
        pixels, transparent = as_tensor(images, self.classes.rules)
        labels = label_maps(self.scores(pixels), tuple(pixels.shape[1:]), self._ids)[0].numpy()
        if transparent is not None:
            labels[transparent] = NOTHING
        return labels

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
        self.check_fitted()
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


# ---------------------------------------------------------------------------------------------- opening

# Fields of the experiment that may change when a run is opened, because training does not depend on them.
EVALUATION_KEYS = ("dataset", "backbone", "official", *EVALUATION, *MACHINE)


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
        For missing or damaged files, and for a value that cannot be changed.

    Examples
    --------
    >>> run = load_run("runs/20260102-030405-scenes-scenes_vit_tiny8-seed0", crf=False)
    """
    released = Path(path).suffix.lower() == ".ckpt"
    possible = [key for key in EVALUATION_KEYS if not (released and key == "backbone")]
    unknown = [key for key in changes if key not in possible]
    if unknown:
        raise StegoError(f"load_run cannot change {', '.join(unknown)}. It can change {', '.join(possible)}.")
    folder = user_path(path)
    if released:
        return _load_published(folder, user_path(runs_dir, runs_root()), changes)
    missing = [name for name in FILES if not (folder / name).exists()]
    if missing:
        raise StegoError(f"{folder.absolute()} is not a run: {', '.join(missing)} missing.")
    trained = Experiment.read(folder / "experiment.json")
    experiment = trained.but(**{"backbone": _located(trained.backbone, folder)} | changes)
    classes = read_classes(folder / "classes.json")
    in_dim = load_state(folder / CHECKPOINT)["model"]["feature_mean"].shape[1]
    run = Run(folder, experiment, classes, build_model(experiment, in_dim, len(classes)).eval())
    run.load_checkpoint()
    run.provenance = read_provenance(folder)
    if experiment.backbone != trained.backbone:
        _ = run.backbone  # refuses other weights at once
    return run


def _located(backbone: str, folder: Path) -> str:
    """The backbone of a run, with its file in the run's folder if it is missing where it was."""
    name, file = split_backbone(backbone)
    here = folder.absolute() / PureWindowsPath(file).name  # the run may come from Windows
    if not file or Path(file).exists() or not here.is_file():
        return backbone
    return f"{name}@{here}" if name else str(here)


def _load_published(path: Path, runs_dir: Path, changes: dict[str, Any]) -> Run:
    published = read_published(path)
    experiment = Experiment.from_dict(published.experiment.to_dict() | changes)
    model = build_model(experiment, published.vit.embed_dim, len(published.classes))
    model.load_state_dict(published.weights, strict=False)  # without feature mean and decoder
    # One folder for each set of weights and way of evaluating, so that no matching of another dataset is used.
    of_values = {key: value for key, value in experiment.to_dict().items() if key not in ("data_root", "backbone")}
    key = fingerprint(*sorted(published.weights.items()), sorted(of_values.items()))
    run = Run(runs_dir / f"{path.stem}-{experiment.dataset}-{key[:8]}", experiment, published.classes, model.eval())
    own, knn, rand = (float(shift) for shift in experiment.shifts)
    run.step, run.shifts = published.step, (own, knn, rand)
    return run


def read_provenance(folder: Path) -> Provenance:
    """The provenance of a run folder."""
    return Provenance.from_dict(read_json(folder / "provenance.json"))


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


def find_run(runs_dir: Path, experiment: Experiment, provenance: Provenance) -> Path | None:
    """The newest run of this experiment and provenance that has a checkpoint, or None.

    Fields of `MACHINE` and `EVALUATION` may differ. Where there is no such run, a notice says that training starts from step
    0, and in what the newest run of the same experiment differs.
    """
    settings, others = _settings(experiment), []
    for folder in _folders(runs_dir):
        if any(not (folder / name).exists() for name in FILES):
            continue
        if _settings(Experiment.read(folder / "experiment.json")) != settings:
            continue
        differing = read_provenance(folder).differing(provenance)
        if not differing:
            return folder
        others.append(f"; {folder.name} differs in {', '.join(differing)}")
    notice(f"no run to resume: training starts from step 0{''.join(others[:1])}")
    return None


def _settings(experiment: Experiment) -> dict[str, Any]:
    """What identifies a run beside its provenance, which knows `start_from` by its content."""
    return {key: value for key, value in experiment.to_record().items() if key not in (*EVALUATION, "start_from")}


def _folders(runs_dir: Path) -> list[Path]:
    """Folders with a checkpoint, the one that was written last first."""
    checkpoints = sorted(runs_dir.glob(f"*/{CHECKPOINT}"), key=lambda path: path.stat().st_mtime_ns)
    return [path.parent for path in reversed(checkpoints)]


def newest_run(runs_dir: str | Path | None = None) -> Path:
    """The run folder with the newest checkpoint. Raises StegoError if there is none."""
    runs_dir = user_path(runs_dir, runs_root())
    folders = _folders(runs_dir)
    if not folders:
        raise StegoError(f"{runs_dir} holds no run. Train one first, or name a run folder.")
    return folders[0]


def record_path(run: Run, split: str, data: str | None) -> Path:
    """The file of the run record of a split: metrics.json for the validation split of the run's own data and settings.

    data: fingerprint of the split's images, None without labels. Own data lie where they lay in training, or are those that were scored first.
    """
    first, trained = run.folder / "metrics.json", run.folder / "experiment.json"
    experiment = Experiment.read(trained) if trained.exists() else run.experiment
    names = run.experiment.differing(experiment, (*MACHINE, "backbone"))
    others = [(name, getattr(run.experiment, name)) for name in names]
    moved = not trained.exists() or run.experiment.data_root != experiment.data_root
    if moved and first.exists() and read_json(first)["data"] != data:
        others.append(("data", data))
    if split == "val" and not others:
        return first
    return run.folder / f"metrics-{split}{f'-{fingerprint(others)[:8]}' if others else ''}.json"
