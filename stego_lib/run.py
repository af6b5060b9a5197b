"""A run is one folder: `Run` reads it, `load_run` opens it."""

import re
from collections.abc import Iterator
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from .backbone import Backbone
from .datasets import Classes, SegmentationDataset
from .datasets.folder import muted_colors, read_classes, told_apart, write_classes
from .datasets.images import Rules, as_rgb, open_image
from .datasets.transforms import resize_image
from .experiment import EVALUATION, MACHINE, Experiment, split_backbone
from .features.extraction import content_id
from .model import Stego, build_model, mean_code
from .probes import most_similar
from .published.checkpoint import read_published
from .runtime.devices import ALONE
from .runtime.errors import StegoError
from .runtime.files import explained, fingerprint, load_state, read_json, save_state, write_json
from .runtime.notices import notice
from .runtime.paths import runs_root, shown_path, user_path

ImageLike: TypeAlias = str | Path | Image.Image | np.ndarray | Tensor
NOTHING = 255
"""Id of transparent pixels in label maps."""
LONGEST = 4
"""How many times the shorter side the longer one may be for `predict` to take the shorter side at the evaluation size."""


class Run:
    """A training run and everything it left: open one with `load_run`, make one with `train`.

    folder/experiment.json, classes.json: what was asked. checkpoint.pt: model, optimizer, step. log.csv: one line a
    step. correspondences.json: the shifts, why they are what they are, and histograms of what they were set by. watch.json: how
    many groups the codes fell into. metrics.json: the run record that `evaluate` writes for the validation split of the run's
    own data; what else is evaluated gets a record of its own, metrics-SPLIT....json. figures/: images. kept/: weights at earlier steps, with `Experiment.validate_every`. A released checkpoint has only what evaluating it leaves.
    """

    def __init__(
        self, folder: Path, experiment: Experiment, classes: Classes, model: Stego, backbone: Backbone | None = None
    ):
        self.folder, self.experiment, self.classes, self.model = folder, experiment, classes, model
        self.shifts: tuple[float, float, float] = (0.0, 0.0, 0.0)  # until training sets them
        self.step = 0
        self.feature_store: str = experiment.feature_store  # until training says which way it has taken
        self.processes = ALONE  # those that work on it together
        self.trained_on: str | None = None  # the backbone's weights, as a checkpoint names them
        self._told: set[str] = set()  # what `predict` has said, once for all its images
        self.data: dict[str, str] | None = None  # the training split, as a checkpoint names it; see `run.data_ids`
        if backbone is not None:
            self.backbone = backbone

    def __repr__(self) -> str:
        return f"Run({shown_path(self.folder)!r}, {self.experiment.name}, step {self.step} of {self.experiment.steps})"

    @cached_property
    def backbone(self) -> Backbone:
        """The frozen backbone, loaded when first needed. StegoError if its weights are not those the run was trained on."""
        _, file = split_backbone(self.experiment.backbone)
        if file and not Path(file).is_file():
            raise StegoError(
                f"backbone file {file} does not exist, on which {self.folder} was trained; put it into the run's folder, or open the "
                "run with load_run(RUN, backbone=FILE)"
            )
        backbone = Backbone.of(self.experiment.but(device=self.processes.device(self.experiment.device)))
        if self.trained_on not in (None, backbone.weights_id):
            raise StegoError(
                f"{self.folder} was trained on other weights of {self.experiment.backbone} than there are now; name the file that has them, load_run(RUN, backbone=FILE), or train it again"
            )
        return backbone

    @property
    def log(self) -> pd.DataFrame:
        """Losses and mean code correspondences, one row a step."""
        path = self.folder / "log.csv"
        if not path.exists():
            raise StegoError(f"{self.folder} has no log.csv: a released checkpoint has none, or the file was removed")
        return pd.read_csv(path, index_col="step")

    @property
    def correspondences(self) -> dict[str, Any]:
        """The shifts, the rule and the reason behind them, and histograms of what they were set by, see `calibration.Calibration`."""
        return read_json(self.folder / "correspondences.json")

    @property
    def watched(self) -> dict[str, Any]:
        """What was seen of the codes while they were trained, see `watch.Watch`; empty for a run without it."""
        path = self.folder / "watch.json"
        return read_json(path) if path.exists() else {}

    @property
    def observed(self) -> dict[str, Any]:
        """What a run record says of the training without labels: how the shifts were set, and whether the codes collapsed."""
        found: dict[str, Any] = {}
        if (self.folder / "correspondences.json").exists():
            about = self.correspondences
            found["calibration"] = {
                key: about[key] for key in ("rule", "attracting", "images", "reason") if key in about
            }
        if seen := self.watched:
            last = {key: seen[key][-1] if seen[key] else None for key in ("groups", "within", "nearest", "clusters")}
            found |= {"collapsed": seen["collapsed"], "codes": last | {"seen": seen["seen"]}}
        return found

    @property
    def metrics(self) -> dict[str, Any]:
        """The run record of the validation split of the run's own data. StegoError if it has not been evaluated."""
        path = self.folder / "metrics.json"
        if not path.exists():
            raise StegoError(f"{self.folder} has no metrics.json yet; call evaluate(run)")
        return read_json(path)

    def save(self, optimizer: torch.optim.Optimizer) -> None:
        """Writes checkpoint.pt, whole or not at all."""
        save_state(
            self.folder / "checkpoint.pt",
            {
                "step": self.step, "model": self.model.state_dict(), "optimizer": optimizer.state_dict(),
                "shifts": list(self.shifts), "backbone_weights": self.backbone.weights_id,
                "feature_store": self.feature_store, "data": self.data, "precision": str(self.backbone.precision),
            },
        )  # fmt: skip

    def refuse_unfitted(self) -> None:
        """StegoError if training stopped before the probes were fitted: they hold random numbers, and so would every result.

        With probes="joint" they are as good as the head is at that step, so only a notice says where the run stopped.
        """
        done, steps = self.step, self.experiment.steps
        if done >= steps or not (self.folder / "experiment.json").exists():  # a released checkpoint has its probes
            return
        go_on = "train.ipynb with the same parameters and -p resume True, or train(run.experiment, resume=True)"
        if self.experiment.probes == "after":
            raise StegoError(
                f"{shown_path(self.folder)} stopped at step {done} of {steps}, before its probes were fitted, so it has no clusters "
                f"yet; finish it first: {go_on}"
            )
        self._tell(f"{shown_path(self.folder)} stopped at step {done} of {steps}; to finish it: {go_on}")

    def _tell(self, text: str) -> None:
        """A notice, once a run."""
        if text not in self._told:
            self._told.add(text)
            notice(text)

    def keep_weights(self) -> None:
        """Writes the weights as they are at this step to kept/STEP.pt, beside the checkpoint."""
        save_state(self.folder / "kept" / f"{self.step:07d}.pt", {"model": self.model.state_dict()})

    def kept_weights(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """What `keep_weights` wrote: step and the model's state, in the order of steps."""
        for path in sorted((self.folder / "kept").glob("[0-9]*.pt")):
            yield int(path.stem), load_state(path)["model"]

    def code(self, images: Tensor) -> Tensor:
        """Codes (B, K, h, w) of uint8 images (B, 3, H, W), averaged with those of their mirror images if so set."""
        if not self.experiment.mirror:
            return mean_code(self.model, self.backbone(images), None)
        features, mirrored = self.backbone(torch.cat([images, images.flip(-1)])).chunk(2)
        return mean_code(self.model, features, mirrored)

    @property
    def segments(self) -> Classes:
        """Name and color of every id that `predict` may give, the position being the id.

        Of a run whose clusters are matched to classes: the classes, then the clusters without a class. Else: the clusters.
        Clusters are called "cluster 0" and so on, in muted colors, so that nobody takes them for classes.
        """
        count, matching = len(self.model.cluster_probe.clusters), self._matching
        if matching is not None:
            own, others = self.classes, [cluster for cluster in range(count) if matching[cluster] < 0]
        elif all(re.fullmatch(r"cluster \d+", name) for name in self.classes.names):
            own, others = self.classes, list(range(len(self.classes), count))
        else:
            own, others = None, list(range(count))
        names = [*(own.names if own else ()), *(f"cluster {cluster}" for cluster in others)]
        return Classes(tuple(told_apart(names)), (*(own.colors if own else ()), *muted_colors(len(others))))

    @overload
    def predict(self, images: ImageLike) -> np.ndarray: ...
    @overload
    def predict(self, images: list[Any] | tuple[Any, ...]) -> list[np.ndarray]: ...
    @torch.inference_mode()
    def predict(self, images: ImageLike | list[Any] | tuple[Any, ...]) -> np.ndarray | list[np.ndarray]:
        """Label map of an image of any size, uint8 (H, W) at the image's own resolution; of a list, a list of them.

        Parameters
        ----------
        images
            A path, a PIL image, a uint8 array (H, W, 3), a uint8 tensor (3, H, W), or a list of these. Files are read as those
            of the training data were: upright as their EXIF data say, unless its classes.json says otherwise. A PIL image, an
            array and a tensor are not turned.

        Returns
        -------
        numpy.ndarray or list
            Ids into `segments`. Once the run is evaluated: classes, and from `len(run.classes)` on the clusters that are
            matched to no class, in their order. Before: clusters. 255 (`NOTHING`) where a file or PIL image is transparent.

        Raises
        ------
        StegoError
            For a file that cannot be read, and for an array that is no image.
        """
        if isinstance(images, list | tuple):
            return [self.predict(image) for image in images]
        self.refuse_unfitted()
        pixels, transparent = _as_tensor(images, self.classes.rules)
        height, width = pixels.shape[1:]
        code = self.code(resize_image(pixels, self._working_size(height, width), self.experiment.published)[None])
        found = most_similar(self.model.cluster_probe.similarity(code)[0], (height, width), self._ids)
        if transparent is not None:
            found[transparent] = NOTHING
        return found

    @property
    def matched(self) -> bool:
        """Whether the clusters are matched to classes, which takes labels and `evaluate`."""
        return self._matching is not None

    @property
    def _matching(self) -> list[int] | None:
        """Class of each cluster, -1 for one without, from the run record; None if these weights were never scored."""
        record = self.metrics if (self.folder / "metrics.json").exists() else {}
        matching = record.get("matching") if record.get("step") == self.step else None
        count, classes = len(self.model.cluster_probe.clusters), range(-1, len(self.classes))
        if matching is not None and (len(matching) != count or any(class_ not in classes for class_ in matching)):
            raise StegoError(
                f"{self.folder / 'metrics.json'} does not fit the run: its matching is not one of {count} clusters and "
                f"{len(self.classes)} classes; remove it, and call evaluate(run) again"
            )
        return matching

    @property
    def _ids(self) -> np.ndarray:
        """What `predict` calls each cluster, uint8 (n_clusters,)."""
        ids = np.arange(len(self.model.cluster_probe.clusters))
        if (matching := self._matching) is not None:
            ids = np.array(matching)
            ids[ids < 0] = len(self.classes) + np.arange((ids < 0).sum())
        return ids.astype(np.uint8)

    def _working_size(self, height: int, width: int) -> tuple[int, int]:
        """The evaluation size for an image of this shape: nothing cut off, sides in whole patches, at most `LONGEST` to 1."""
        size, patch = self.experiment.eval_size, self.backbone.patch
        if isinstance(size, tuple):
            return size
        short, long = sorted((height, width))
        scale = min(size / short, LONGEST * size / long)
        rows, columns = (max(patch, round(side * scale / patch) * patch) for side in (height, width))
        if long > LONGEST * short:
            self._tell(
                f"an image more than {LONGEST} times as long as it is wide is segmented with its longer side at "
                f"{LONGEST * size} pixels, so that more of its small things are lost than in other images; cut it into pieces to keep them"
            )
        return rows, columns


def start_run(folder: Path, experiment: Experiment, classes: Classes) -> None:
    """Writes what determines the run into its folder; what it is found by comes last, when all else is there."""
    write_classes(folder / "classes.json", classes)
    write_json(folder / "experiment.json", experiment.to_dict())


EVALUATION_KEYS = ("dataset", "data_root", "backbone", "published", "precision", *EVALUATION, *MACHINE)
"""Fields of the experiment that may be changed when a run is opened: all that does not touch what was trained."""


def load_run(path: str | Path, *, runs_dir: str | Path | None = None, **changes: Any) -> Run:
    """Opens a run folder, or a checkpoint that STEGO's authors released (a .ckpt file, see `published`).

    changes: values of the experiment for evaluation, such as data_root; `EVALUATION_KEYS` are possible. backbone: another
    place of the weights that the run was trained on, which they must be; a file in the run's folder is found there. What is
    evaluated of a .ckpt goes into a folder of its own below `runs_dir`. Raises StegoError that names what is missing
    or broken.
    """
    released = Path(path).suffix.lower() == ".ckpt"
    possible = [key for key in EVALUATION_KEYS if not released or key != "backbone"]  # a released checkpoint holds its own
    unknown = [key for key in changes if key not in possible]
    if unknown:
        raise StegoError(
            f"load_run cannot change {', '.join(unknown)}: the run was trained with it; it can change {', '.join(possible)}"
        )
    folder = user_path(path)
    if released:
        return _load_published(folder, user_path(runs_dir, runs_root()), changes)
    missing = [name for name in ("experiment.json", "classes.json", "checkpoint.pt") if not (folder / name).exists()]
    if missing:
        raise StegoError(f"{folder.resolve()} is not a run with a checkpoint: {', '.join(missing)} missing")
    asked = Experiment.from_dict(read_json(folder / "experiment.json"))
    experiment = asked.but(**{"backbone": _beside(asked.backbone, folder)} | changes)
    classes = read_classes(folder / "classes.json")
    state = read_checkpoint(folder)
    in_dim = state["model"]["feature_mean"].shape[1]
    with torch.device("meta"):  # shapes alone: a small file may name a model that no memory holds
        refuse_misfit(build_model(experiment, in_dim, len(classes)), state, folder)
    model = build_model(experiment, in_dim, len(classes))
    model.load_state_dict(state["model"])
    run = Run(folder, experiment, classes, model.eval())
    run.step, run.shifts, run.trained_on = state["step"], tuple(state["shifts"]), state.get("backbone_weights")
    run.data = state.get("data")
    if experiment.feature_store == "auto":
        run.feature_store = state.get("feature_store", "auto")
    if run.trained_on is None and experiment.backbone not in (asked.backbone, _beside(asked.backbone, folder)):
        raise StegoError(f"{folder} does not tell which weights of the backbone it was trained on, so it takes no others")
    if "backbone" in changes and experiment.backbone != asked.backbone:
        _ = run.backbone  # other weights are refused before anything is made of them
    return run


def _beside(backbone: str, folder: Path) -> str:
    """The backbone of a run in `folder`: where its file lay, or a file of that name in the run's folder."""
    name, file = split_backbone(backbone)
    here = folder.absolute() / Path(file).name
    return "@".join(filter(None, (name, str(here)))) if file and not Path(file).exists() and here.is_file() else backbone


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """What `Run.save` wrote; StegoError for a file that is broken or holds something else."""
    path = folder / "checkpoint.pt"
    state = load_state(path)
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
    """StegoError that names the weights of a checkpoint which are not those of the model, by name or shape."""
    theirs, ours = (
        {name: value.shape for name, value in found.items()} for found in (state["model"], model.state_dict())
    )
    wrong = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    if wrong:
        raise StegoError(
            f"{folder / 'checkpoint.pt'} does not fit {folder / 'experiment.json'}: {', '.join(wrong[:5])} missing, unknown or "
            "of another shape; are they of one run?"
        )


def _load_published(path: Path, runs_dir: Path, changes: dict[str, Any]) -> Run:
    found = read_published(path)
    experiment = Experiment.from_dict(found.experiment.to_dict() | changes)
    model = build_model(experiment, found.vit.embed_dim, len(found.classes))
    model.load_state_dict(found.weights, strict=False)  # no mean was taken off the features, and no decoder is needed
    # One folder for each set of weights and way of evaluating, so that no matching of another dataset is ever used.
    of_values = {key: value for key, value in experiment.to_dict().items() if key not in ("data_root", "backbone")}
    key = fingerprint(*sorted(found.weights.items()), sorted(of_values.items()))
    run = Run(runs_dir / f"{path.stem}-{experiment.dataset}-{key[:8]}", experiment, found.classes, model.eval())
    own, knn, rand = (float(shift) for shift in experiment.shifts)
    run.step, run.shifts = found.step, (own, knn, rand)
    return run


def _as_tensor(image: ImageLike, rules: Rules) -> tuple[Tensor, np.ndarray | None]:
    """uint8 (3, H, W), and where it is transparent, bool (H, W), None if nowhere."""
    transparent = None
    if isinstance(image, str | Path):
        image, transparent = open_image(user_path(image), rules)
    elif isinstance(image, Image.Image):
        image, transparent = as_rgb(image, rules)
    if isinstance(image, Image.Image):
        image = _as_array(image)
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.dtype == np.uint8:
        whole = image.flags.c_contiguous and image.flags.writeable  # else a view, or read-only
        image = torch.from_numpy(image if whole else np.array(image, order="C")).movedim(-1, 0)
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8 or not image.numel():
        array = isinstance(image, Tensor | np.ndarray)
        what = f"{image.dtype} of shape {tuple(image.shape)}" if array else type(image).__name__
        raise StegoError(f"an image must be uint8 with three channels and a pixel at least, not {what}")
    return image, transparent


def _as_array(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3) of an RGB image, in strips: NumPy's own way needs the memory of two more."""
    width, height = image.size
    found = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, 256):
        bottom = min(top + 256, height)
        found[top:bottom] = np.asarray(image.crop((0, top, width, bottom)))
    return found


def new_folder(runs_dir: Path, experiment: Experiment) -> Path:
    """Makes a folder named by time and experiment; of two processes that ask at once each gets its own."""
    stem, again = f"{datetime.now():%Y%m%d-%H%M%S}-{experiment.name}", 1
    while True:
        folder = runs_dir / (stem if again == 1 else f"{stem}-{again}")
        try:
            with explained(folder.parent):
                folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
        except FileExistsError:
            again += 1


def find_run(
    runs_dir: Path, experiment: Experiment, backbone: Backbone, data: dict[str, str], *, tell: bool = True
) -> Path | None:
    """The newest run of this experiment, on these images and weights of the backbone, that has a checkpoint, or None.

    How and where a run computes and how it is scored (`MACHINE`, `EVALUATION`) may differ, and so may the places of data and weights:
    `data` are the fingerprints of the training split, see `data_ids`. A run that would be the one but for its data or its
    weights is passed over with a notice; if none is found, a notice says what the nearest differs in. `tell=False` says nothing.
    """
    say = notice if tell else _nothing
    nearest: tuple[list[str], Path] | None = None
    told = False
    for path in sorted(runs_dir.glob("*/experiment.json"), key=lambda path: _natural(path.parent.name), reverse=True):
        try:
            theirs = Experiment.from_dict(read_json(path))
        except (StegoError, TypeError) as error:
            say(f"{path} is passed over: {error}")
            continue
        if not (path.parent / "checkpoint.pt").exists():
            continue
        differing = theirs.differing(experiment, (*MACHINE, *EVALUATION, "data_root"))
        state = read_checkpoint(path.parent) if set(differing) <= {"backbone"} else {}
        if differing and (not state or state.get("backbone_weights") != backbone.weights_id):
            if "seed" not in differing and (nearest is None or len(differing) < len(nearest[0])):
                nearest = differing, path
        elif state.get("backbone_weights") not in (None, backbone.weights_id):
            told = True
            say(f"{path.parent} is passed over: it was trained on other weights of {experiment.backbone}")
        elif changed := _changed(state.get("data"), data, theirs.data_root, experiment.data_root):
            told = True
            say(f"{path.parent} is passed over: {changed}")
        else:
            return path.parent
    if nearest is not None and not told and len(nearest[0]) <= TOLD:
        old = Experiment.from_dict(read_json(nearest[1]))
        changes = ", ".join(f"{name} {getattr(old, name)}, now {getattr(experiment, name)}" for name in nearest[0])
        say(f"there is no run of exactly this experiment in {runs_dir}; the nearest, {nearest[1].parent.name}, has {changes}")
    return None


def _nothing(text: str) -> None:
    """Says nothing."""


TOLD = 3
"""Differences up to which another run is near enough to be told."""


def data_ids(dataset: SegmentationDataset, runs_dir: Path) -> dict[str, str]:
    """Fingerprints of a split's images, and of images and label maps: what a run remembers of the data it was trained on."""
    root = runs_dir / "features"
    return {"images": content_id(dataset, root, labels=False), "all": content_id(dataset, root)}


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts 'a-10' behind 'a-2'."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _changed(before: dict[str, str] | None, now: dict[str, str], old_root: str, root: str) -> str | None:
    """What differs in the data that a run was trained on, or None."""
    if before is None:  # a checkpoint of version 0.1.0 does not tell
        same = user_path(old_root).resolve() == user_path(root).resolve()
        return None if same else f"it was trained on data in {old_root}, and does not tell which files these were"
    if before["images"] != now["images"]:
        return f"its training images were others (then in {old_root}, now in {root})"
    return None if before["all"] == now["all"] else "the label maps of its training images have changed since"


def newest_run(runs_dir: str | Path | None = None) -> Path:
    """The run folder made last; StegoError if there is none with a checkpoint."""
    runs_dir = user_path(runs_dir, runs_root())
    found = sorted(runs_dir.glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise StegoError(f"{runs_dir} holds no run; train one first (make train), or name a run folder")
    return found[-1].parent
