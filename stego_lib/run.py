"""Runs: `Run` reads and writes a run folder, `load_run` opens it, `find_run` searches for it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .backbone import Backbone
from .datasets.classes import Classes, read_classes, without_names, write_classes
from .experiment import EVALUATION, MACHINE, Experiment
from .model import Stego, build_model
from .provenance import Provenance
from .utils import devices
from .utils.errors import StegoError, explained
from .utils.fields import split_backbone
from .utils.files import disk_errors, fingerprint, read_json, remove_temporary, write_json
from .utils.notices import notice
from .utils.paths import runs_root, shown_path, user_path
from .utils.states import CHECKPOINT, load_state, save_state
from .utils.torch_state import usual_modes

if TYPE_CHECKING:
    from .annotations.names import Naming
    from .datasets.base import SegmentationDataset
    from .datasets.images import ImageLike
    from .predict import Scores
    from .teach import Taught

# Required files of a run folder.
FILES = ("experiment.json", "classes.json", "provenance.json", CHECKPOINT)


class Run:
    """A training run and its folder. `train` creates a run, `load_run` opens it.

    The folder contains

    * experiment.json, classes.json, provenance.json: settings, classes and inputs;
    * checkpoint.safetensors: weights, optimizer and step; kept/: earlier weights (`Official.keep_every`);
    * log.csv: losses and mean code correspondences of each step;
    * correspondences.json: shifts, and histograms of the feature correspondences;
    * watch.json: measurements of collapse;
    * metrics.json: run record of the validation split, by `evaluate`; metrics-SPLIT....json for others;
    * names.json: names of clusters, by `name_segments`;
    * taught.safetensors: the classifier fitted by `teach`.

    The folder of a released checkpoint only contains its evaluation.
    """

    def __init__(
        self, folder: Path, experiment: Experiment, classes: Classes, model: Stego, backbone: Backbone | None = None
    ):
        self.folder, self.experiment, self.classes, self.model = folder, experiment, classes, model
        self.step, self.shifts = 0, (0.0, 0.0, 0.0)
        self.provenance = Provenance()  # unknown for a released checkpoint
        if backbone is not None:
            self.backbone = backbone

    def __repr__(self) -> str:
        return f"Run({shown_path(self.folder)!r}, {self.experiment.name}, step {self.step} of {self.experiment.steps})"

    @cached_property
    def backbone(self) -> Backbone:
        """The frozen backbone, loaded on first use. Raises StegoError if its weights differ from those of training."""
        _, file = split_backbone(self.experiment.backbone)
        problem = f"file {file} does not exist" if file and not Path(file).is_file() else ""
        if not problem:
            backbone = Backbone.of(self.experiment)
            if self.provenance.weights in (None, backbone.weights_id):
                return backbone
            problem = f"{self.experiment.backbone} has other weights"
        raise StegoError(f"{self.folder}: backbone {problem}. Open the run with load_run(RUN, backbone=FILE).")

    @property
    def log(self) -> pd.DataFrame:
        """Losses and mean code correspondences, one row per step."""
        return pd.read_csv(self.folder / "log.csv", index_col="step")

    @property
    def correspondences(self) -> dict[str, Any]:
        """correspondences.json, see `calibration.calibrate`."""
        return read_json(self.folder / "correspondences.json")

    @property
    def watched(self) -> dict[str, Any]:
        """watch.json, see `watch.Watch`; empty if missing."""
        path = self.folder / "watch.json"
        return read_json(path) if path.exists() else {}

    @property
    def metrics(self) -> dict[str, Any]:
        """The run record of the validation split. Raises StegoError before `evaluate`."""
        path = self.folder / "metrics.json"
        if not path.exists():
            raise StegoError(f"{self.folder} has no metrics.json. Call evaluate(run).")
        return read_json(path)

    def kept_weights(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Steps and state dicts in kept/, sorted by step."""
        for path in sorted((self.folder / "kept").glob("[0-9]*.safetensors")):
            yield int(path.stem), load_state(path)

    def save(self, optimizer: torch.optim.Optimizer, trainer: dict[str, Any]) -> None:
        """Writes the checkpoint atomically. trainer: `training.Trainer.state`."""
        state = {"step": self.step, "shifts": self.shifts, "model": self.model.state_dict()}
        save_state(self.folder / CHECKPOINT, state | {"optimizer": optimizer.state_dict(), "trainer": trainer})

    def save_experiment(self) -> None:
        """Writes classes, provenance and, as the last file, experiment.json, which `find_run` requires."""
        write_classes(self.folder / "classes.json", self.classes)
        write_json(self.folder / "provenance.json", self.provenance.to_dict())
        write_json(self.folder / "experiment.json", self.experiment.to_dict())

    def load_checkpoint(self) -> dict[str, Any]:
        """Loads weights, step and shifts from the checkpoint, and returns its content."""
        path = self.folder / CHECKPOINT
        state = load_state(path)
        with explained((KeyError, RuntimeError), f"{path} does not fit experiment.json", "Use the files of one run."):
            self.model.load_state_dict(state["model"])
            self.step, self.shifts = state["step"], tuple(state["shifts"])
        return state

    def resume(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Loads the checkpoint and deletes temporary files. Returns the state of the trainer, see `save`."""
        state = self.load_checkpoint()
        optimizer.load_state_dict(state["optimizer"])
        if devices.first():
            for folder in (self.folder, self.folder / "kept"):
                remove_temporary(folder)
            # Fields of `MACHINE` and `EVALUATION` may differ.
            write_json(self.folder / "experiment.json", self.experiment.to_dict())
        return state["trainer"]

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        images: Sequence[Any] = (),
        license: str | None = None,
        include_backbone: bool = False,
    ) -> None:
        """Writes a folder for sharing the run, a few hundred kilobytes; for the files see `stego_lib.share`.

        The model card (README.md) describes backbone, scores and the use of labels.

        Parameters
        ----------
        folder
            A new or empty folder.
        images
            Images for the card's thumbnail, which are published with the run; none by default.
        license
            License of head and probes, such as "mit"; none by default.
        include_backbone
            Also copy the file of the backbone, if others cannot load it by name.

        Raises
        ------
        StegoError
            For a folder with files, an unfinished run, a license that is incompatible with that of the backbone or
            cannot be checked, and `include_backbone` for a backbone without a file.

        Examples
        --------
        >>> run.save_pretrained("streets", images=["image.jpg"])
        >>> run = Run.from_pretrained("streets")
        """
        from .share import save_run

        save_run(self, folder, images, license, include_backbone)

    def push_to_hub(self, repository: str, *, private: bool = False, **options: Any) -> None:
        """Uploads the files of `save_pretrained` to Hugging Face's hub, after `hf auth login`.

        Parameters
        ----------
        repository
            "user/name". It is created if it does not exist; existing files are replaced.
        private
            Create a private repository.
        options
            Arguments of `save_pretrained`.

        Raises
        ------
        StegoError
            As in `save_pretrained`, and if the upload fails.

        Examples
        --------
        >>> run.push_to_hub("user/streets", license="mit")
        """
        from .share import push_run

        push_run(self, repository, private, **options)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> "Run":
        """`load_run` for a folder, or for a repository "user/name" or "user/name@revision" on the hub.

        Examples
        --------
        >>> run = Run.from_pretrained("user/streets", device="cpu")
        """
        return load_run(source if user_path(source).exists() else f"hf:{source}", **options)

    def check_fitted(self) -> None:
        """Raises StegoError for an unfinished run with probes="after"; shows a notice for other unfinished runs."""
        if self.step >= self.experiment.steps or not (self.folder / "experiment.json").exists():
            return
        text = f"{shown_path(self.folder)} stopped at step {self.step} of {self.experiment.steps}"
        if self.experiment.probes == "after":
            raise StegoError(
                f"{text}, before its probes were fitted. Finish it with train(run.experiment, resume=True)."
            )
        notice(f"{text}. Finish it with train(run.experiment, resume=True).")

    def check_classes(self, dataset: "SegmentationDataset") -> None:
        """Raises StegoError for a dataset with other classes or another order. Corrected names are accepted."""
        ours, theirs = self.classes.names, dataset.classes.names
        unnamed = without_names(self.classes) or without_names(dataset.classes)
        moved = any(name != old and name in ours for old, name in zip(ours, theirs, strict=False))
        if len(theirs) != len(ours) or (not unnamed and (moved or not set(ours) & set(theirs))):
            texts = [f"{len(names)} classes {', '.join(names[:3])}, ..." for names in (theirs, ours)]
            raise StegoError(
                f"{dataset.name} has the {texts[0]}; the run has the {texts[1]} Use the same classes in the same order."
            )

    def code(self, images: Tensor) -> Tensor:
        """Codes (B, K, h, w) of uint8 images (B, 3, H, W), averaged over horizontal flips with `mirror=True`."""
        return self.maps(images, "codes")

    def maps(self, images: Tensor, on: str | None = None) -> Tensor:
        """Codes of uint8 images (B, 3, H, W), or backbone features for on="features": (B, C, h, w).

        The default is that of the classifier fitted by `teach`, otherwise codes.
        """
        from .predict import run_maps

        return run_maps(self, images, on)

    def score_maps(self, maps: Tensor) -> "Scores":
        """Scores of `segments` on the grid from `maps`, by the cluster probe or by the classifier of `teach`."""
        from .predict import probe_scores

        return probe_scores(self.model, maps)["cluster"] if self.taught is None else self.taught.scores(maps)

    def scores(self, image: Tensor, size: int | None = None) -> "Scores":
        """Scores of `segments` on the grid of one image, uint8 (3, H, W), at the working size of `predict`."""
        from .predict import image_scores

        return image_scores(self, image, size)

    def predict(
        self,
        images: "ImageLike | list[Any] | tuple[Any, ...]",
        *,
        refine: str | None = None,
        size: int | None = None,
        tile: int | None = None,
        upsampler: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Any:
        """Predicts the label map of an image at its own resolution, or a list of label maps for a list of images.

        Parameters
        ----------
        images
            A path, a PIL image, a uint8 array (H, W, 3), a uint8 tensor (3, H, W), or a list of these, of any size.
            Files are rotated by their EXIF orientation as in training, see `datasets.classes.Rules`; PIL images,
            arrays and tensors are not.
        refine
            "crf" aligns borders with colors by a dense CRF on at most a megapixel, "none" does not; by default as in
            `Experiment.crf`.
        size
            Shorter side of the resized image in pixels; `Experiment.eval_size` by default.
        tile
            Side in pixels of a sliding window over the image at its own resolution, or resized to `size` if given, see
            `tiles.label_strips`. It finds smaller objects and takes longer. By default the whole image is one window.
        upsampler
            A function that upsamples features before the head: normalized images (1 or 2, 3, H, W) and features
            (B, C, h, w) -> (B, C, H', W'). AnyUp can be passed directly; for NAF pass
            `lambda images, features: naf(images, features, (H, W))`, for FeatUp
            `lambda images, features: featup.upsampler(features, images)`. Not with `tile`.

        Returns
        -------
        numpy.ndarray or list
            uint8 (H, W), ids into `segments`: for an evaluated run, classes followed by unmatched clusters; otherwise
            clusters. Transparent pixels and dropped clusters are 255.

        Raises
        ------
        StegoError
            For an unreadable file, an array that is not an image, and an unfinished run without fitted probes.

        Examples
        --------
        >>> label_map = run.predict("image.jpg")
        >>> label_map = run.predict("drone.jpg", tile=448)
        """
        from .tiles import predict

        return predict(self, images, refine, size, tile, upsampler)

    @cached_property
    def taught(self) -> "Taught | None":
        """The classifier fitted by `teach`, or None. Raises StegoError if it belongs to other weights."""
        from .teach import stored_classifier

        return stored_classifier(self)

    def teach(
        self,
        images: "str | Path | Sequence[Any] | None",
        labels: "str | Path | pd.DataFrame | Sequence[Any]" = (),
        method: str = "logistic",
        on: str = "codes",
        names: Sequence[str] | None = None,
    ) -> "Taught | None":
        """Fits a classifier to a few labels, which `segments` and `predict` then use instead of the clusters.

        It is stored in the run folder. Head and clusters do not change and remain unsupervised.

        Parameters
        ----------
        images
            A folder or a list of images; None deletes the classifier.
        labels
            One of

            * a label map for each image of a list: a file or an integer array (H, W) of ids into `names`, 255 for
              unlabeled pixels. A few scribbles suffice;
            * a table of clicks, a CSV file or a DataFrame, with the columns image (file name), x, y (pixels from the
              top left corner of the image as read by `predict`) and name.
        method
            "logistic": multinomial logistic regression. Cells of an image are similar, so an image with a label map
            counts for at most 10 observations, and one with clicks for a single observation; this sets the
            regularization. The total weight of a name with n labeled cells is proportional to sqrt(n); with clicks, all
            names have the same. "neighbors": vote of the 30 nearest labeled cells with weights softmax(cosine / 0.02),
            which disadvantages names with few labels.
        on
            "codes" of the head, or "features" of the backbone.
        names
            Names of the ids in label maps; the classes of the run by default.

        Returns
        -------
        stego_lib.teach.Taught
            The classifier, with the number of labels of each name.

        Raises
        ------
        StegoError
            For clicks outside of the image, unknown images, ids without a name, duplicate names, and fewer than two
            names.

        Examples
        --------
        >>> run.teach("photographs", "clicks.csv")
        >>> run.teach(["a.jpg", "b.jpg"], ["a.png", "b.png"], names=["road", "tree", "house"])
        """
        from .teach import teach_run

        self.__dict__["taught"] = teach_run(self, images, labels, method, on, names)  # replaces the cached value
        return self.taught

    def suggest(
        self, images: "str | Path | Sequence[Any]", count: int, on: str = "codes", seed: int = 0
    ) -> pd.DataFrame:
        """Suggests places to label: a typical place of each of `count` clusters, without labels.

        Grid cells are clustered by k-means, and the cell nearest to each center is returned. Add names, drop ambiguous
        rows, and pass the table to `teach`.

        Parameters
        ----------
        images
            A folder or a list of files.
        count
            Number of places.
        on
            "codes" or "features", as for `teach`.
        seed
            Seed of k-means and, for many images, of the sampled cells.

        Returns
        -------
        pandas.DataFrame
            Columns image (file name), x, y (pixels from the top left corner), by decreasing size of the cluster.

        Raises
        ------
        StegoError
            For an empty list, duplicate file names, and more places than different cells.

        Examples
        --------
        >>> clicks = run.suggest("photographs", 30)
        >>> clicks["name"] = [...]  # look at each place, and name it
        >>> run.teach("photographs", clicks)
        """
        from .suggest import suggest

        return suggest(self, images, count, on, seed)

    @property
    def _naming(self) -> "Naming":
        from .annotations.names import Naming

        return Naming(self.folder, self.classes, self.step, self.model.cluster_probe.clusters)

    @property
    def matched(self) -> bool:
        """Whether clusters are matched to classes, by `evaluate`."""
        return self._naming.matching is not None

    @property
    def segments(self) -> Classes:
        """Names and colors of the ids of `predict`, from `teach`, `name_segments` or `unnamed_segments`."""
        return self._naming.named[1] if self.taught is None else self.taught.classes

    @property
    def ids(self) -> np.ndarray:
        """Id in label maps of each channel of `score_maps`, uint8 (n,); 255 for dropped clusters."""
        return self._naming.named[0] if self.taught is None else np.arange(len(self.taught.names), dtype=np.uint8)

    @property
    def unnamed_segments(self) -> Classes:
        """Segments without `name_segments`, as in evaluation: classes, then unmatched clusters."""
        return self._naming.unnamed[1]

    @property
    def unnamed_ids(self) -> np.ndarray:
        """Id of each cluster in `unnamed_segments`, uint8 (n_clusters,)."""
        return self._naming.unnamed[0]

    @property
    def names(self) -> dict[int, str | None]:
        """Name of each cluster by `name_segments`, None if dropped. Raises StegoError for names of other clusters."""
        return self._naming.names

    @property
    def branches(self) -> dict[str, list[int]]:
        """Clusters of each branch of the tree of cluster centers, see `annotations.names.branches`."""
        return self._naming.branches

    def name_segments(self, names: Mapping[str, str | None] | None) -> None:
        """Names, merges or drops segments for `predict` and `segments`. Scores do not change.

        The names are stored in names.json for the current clusters and are invalid after further training.

        Parameters
        ----------
        names
            Name in `unnamed_segments` or `branches` -> new name. The name of a branch applies to all its clusters
            without a name of their own or of a smaller branch. Equal names merge segments; the pixels of a segment
            named None get id 255. Earlier names are replaced; `names=None` deletes them.

        Raises
        ------
        StegoError
            For unknown segments or branches, invalid names, and if all segments are dropped.

        Examples
        --------
        >>> run.name_segments({"cluster 0": "road", "cluster 3": "road", "cluster 5": None})
        >>> run.name_segments({"branch 12": "plant", "cluster 171": "grass"})
        """
        self.check_fitted()
        if self.taught is not None:
            raise StegoError("The segments have names from run.teach. Call run.teach(None) first.")
        self._naming.write(names)


# Fields of the experiment that `load_run` can change, because they do not affect a trained model.
CHANGEABLE = ("dataset", "backbone", "official", *EVALUATION, *MACHINE)


@usual_modes()
def load_run(path: str | Path, *, runs_dir: str | Path | None = None, **changes: Any) -> Run:
    """Opens a run folder, a shared run, or a checkpoint released by STEGO's authors (.ckpt).

    Parameters
    ----------
    path
        The folder or file, or "hf:user/name" or "hf:user/name@revision" on Hugging Face's hub or in its cache.
    runs_dir
        Parent folder for a copy of the run, if the run is read-only or must not change. Shared runs and .ckpt files
        always have a folder there, `runs/` of the project by default.
    changes
        Fields of the experiment to change for evaluation, see `CHANGEABLE`. `backbone` is a new location of the same
        weights.

    Raises
    ------
    StegoError
        For missing or damaged files, a failed download, and fields that cannot be changed.

    Examples
    --------
    >>> run = load_run("hf:user/name")
    >>> run = load_run("runs/20260102-030405-scenes-scenes_vit_tiny8-seed0", crf=False)
    """
    from .share import CONFIG, HUB, copied, open_shared

    folder, released = user_path(path), Path(path).suffix.lower() == ".ckpt"
    possible = [key for key in CHANGEABLE if not (released and key == "backbone")]
    if unknown := [key for key in changes if key not in possible]:
        raise StegoError(f"load_run cannot change {', '.join(unknown)}. It can change {', '.join(possible)}.")
    if released:
        return _load_released(folder, user_path(runs_dir, runs_root()), changes)
    if str(path).startswith(HUB) or (folder / CONFIG).exists():
        folder, runs_dir = open_shared(path, user_path(runs_dir, runs_root())), None
    if missing := [name for name in FILES if not (folder / name).exists()]:
        raise StegoError(
            f"{folder.absolute()} is not a run: {', '.join(missing)} missing. Pass a folder that train has written."
        )
    if runs_dir is not None:
        folder = copied(folder, user_path(runs_dir))
    experiment = Experiment.read(folder / "experiment.json").but(**changes)
    classes = read_classes(folder / "classes.json")
    in_dim = load_state(folder / CHECKPOINT)["model"]["feature_mean"].shape[1]
    run = Run(folder, experiment, classes, build_model(experiment, in_dim, len(classes)).eval())
    run.load_checkpoint()
    run.provenance = Provenance.read(folder)
    if "backbone" in changes:
        _ = run.backbone  # checks the weights
    return run


def _load_released(path: Path, runs_dir: Path, changes: dict[str, Any]) -> Run:
    from .networks.checkpoint import read_published

    released = read_published(path)
    experiment = released.experiment.but(**changes)
    model = build_model(experiment, released.vit.embed_dim, len(released.classes))
    model.load_state_dict(released.weights, strict=False)  # without feature mean and decoder
    # One folder for each combination of weights and settings, so that matchings are not mixed up.
    settings = {key: value for key, value in experiment.to_dict().items() if key not in ("data_root", "backbone")}
    key = fingerprint(*sorted(released.weights.items()), sorted(settings.items()))[:8]
    run = Run(runs_dir / f"{path.stem}-{experiment.dataset}-{key}", experiment, released.classes, model.eval())
    own, knn, rand = (float(shift) for shift in experiment.shifts)
    run.step, run.shifts = released.step, (own, knn, rand)
    return run


def new_folder(runs_dir: Path, experiment: Experiment) -> Path:
    """Creates a folder named by time and experiment."""
    with disk_errors(runs_dir):
        runs_dir.mkdir(parents=True, exist_ok=True)
    stem, number = f"{datetime.now():%Y%m%d-%H%M%S}-{experiment.name}", 1
    while True:
        folder = runs_dir / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def find_run(runs_dir: Path, experiment: Experiment, provenance: Provenance) -> Path | None:
    """The newest run of this experiment and provenance, or None with a notice.

    Fields of `MACHINE` and `EVALUATION` may differ. The notice names differences to the newest run of the experiment.
    """
    settings, others = _settings(experiment), []
    checkpoints = sorted(runs_dir.glob(f"*/{CHECKPOINT}"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for folder in (path.parent for path in checkpoints):
        # Shared runs have no correspondences and no optimizer.
        if any(not (folder / name).exists() for name in (*FILES, "correspondences.json")):
            continue
        with suppress(StegoError):  # a run of another version, or a damaged one, is not the run of this experiment
            if _settings(Experiment.read(folder / "experiment.json")) == settings:
                differing = Provenance.read(folder).differing(provenance)
                if not differing:
                    return folder
                others.append(f"; {folder.name} differs in {', '.join(differing)}")
    notice(f"There is no run to resume, so training starts at step 0{''.join(others[:1])}.")
    return None


def _settings(experiment: Experiment) -> dict[str, Any]:
    """Settings that identify a run together with its provenance, which includes `start_from`."""
    return {key: value for key, value in experiment.to_record().items() if key not in (*EVALUATION, "start_from")}
