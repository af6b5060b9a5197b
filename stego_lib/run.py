"""A run is one folder: `Run` reads it, `load_run` opens it."""

import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from .backbone import Backbone, upsample
from .datasets import Classes
from .datasets.base import open_picture
from .datasets.folder import read_classes, write_classes
from .datasets.transforms import resize_picture
from .errors import StegoError
from .experiment import HOW, SCORING, Experiment, split_backbone
from .files import fingerprint, load_state, read_json, save_state, write_json
from .model import Stego
from .notices import notice
from .paths import runs_root, shown_path
from .processes import ALONE
from .published import read_published

Picture: TypeAlias = str | Path | Image.Image | np.ndarray | Tensor


class Run:
    """A training run and everything it left: open one with `load_run`, make one with `train`.

    folder/experiment.json, classes.json: what was asked. checkpoint.pt: model, optimiser, step. log.csv: one line a
    step. correspondences.json: the shifts, why they are what they are, and histograms of what they were set by. watch.json: how
    many groups the codes fell into. metrics.json: the run record that `evaluate` writes for the validation split of the run's
    own data; what else is evaluated gets a record of its own, metrics-SPLIT....json. figures/: pictures. kept/: weights at earlier steps, with `Experiment.validate_every`. A released checkpoint has only what evaluating it leaves.
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
        self.data: dict[str, str] | None = None  # the training split, as a checkpoint names it; see `run_folders.data_ids`
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
                f"the backbone file of {self.folder}, {file}, does not exist; put it into the run's folder, or open the run with "
                "load_run(RUN, backbone=FILE)"
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
        return pd.read_csv(self.folder / "log.csv", index_col="step")

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
                key: about[key] for key in ("rule", "attracting", "pictures", "reason") if key in about
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

    def save(self, optimiser: torch.optim.Optimizer) -> None:
        """Writes checkpoint.pt, whole or not at all."""
        save_state(
            self.folder / "checkpoint.pt",
            {
                "step": self.step, "model": self.model.state_dict(), "optimiser": optimiser.state_dict(),
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
        notice(f"{shown_path(self.folder)} stopped at step {done} of {steps}; to finish it: {go_on}")

    def keep_weights(self) -> None:
        """Writes the weights as they are at this step to kept/STEP.pt, beside the checkpoint."""
        save_state(self.folder / "kept" / f"{self.step:07d}.pt", {"model": self.model.state_dict()})

    def kept_weights(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """What `keep_weights` wrote: step and the model's state, in the order of steps."""
        for path in sorted((self.folder / "kept").glob("[0-9]*.pt")):
            yield int(path.stem), load_state(path)["model"]

    def code(self, pictures: Tensor) -> Tensor:
        """Codes (B, K, h, w) of uint8 pictures (B, 3, H, W), averaged with those of their mirror images if so set."""
        if not self.experiment.mirror:
            return mean_code(self.model, self.backbone(pictures), None)
        features, mirrored = self.backbone(torch.cat([pictures, pictures.flip(-1)])).chunk(2)
        return mean_code(self.model, features, mirrored)

    @torch.inference_mode()
    def predict(self, images: Picture | list[Picture]) -> list[np.ndarray]:
        """Label maps of pictures of any size, each uint8 (H, W) at the picture's own resolution.

        images: one or a list of paths, PIL images, uint8 arrays (H, W, 3) or uint8 tensors (3, H, W). Ids are classes
        once the run is evaluated (clusters are then matched to classes; 255 = a cluster without class), clusters before.
        """
        self.refuse_unfitted()
        images = images if isinstance(images, list) else [images]
        matching = torch.tensor(self.metrics["matching"]) if self._matched else None
        found = []
        for image in images:
            picture = _as_tensor(image)
            size = self._working_size(*picture.shape[1:])
            code = self.code(resize_picture(picture, size, self.experiment.published)[None])
            clusters = upsample(self.model.cluster_probe.similarity(code), picture.shape[1:])[0].argmax(0).cpu()
            labels = clusters if matching is None else matching[clusters]
            found.append(labels.to(torch.uint8).numpy())  # -1 becomes 255
        return found

    @property
    def _matched(self) -> bool:
        return (self.folder / "metrics.json").exists() and self.metrics.get("matching") is not None

    def _working_size(self, height: int, width: int) -> tuple[int, int]:
        """The evaluation size for a picture of this shape: nothing cut off, sides in whole patches."""
        size, patch = self.experiment.eval_size, self.backbone.patch
        if isinstance(size, tuple):
            return size
        scale = size / min(height, width)
        height, width = (max(patch, round(side * scale / patch) * patch) for side in (height, width))
        return height, width


def mean_code(model: Stego, features: Tensor, mirrored: Tensor | None) -> Tensor:
    """Code of the features (B, C, h, w), averaged with the turned-back code of the mirrored pictures' features if given."""
    device = model.feature_mean.device
    if mirrored is None:
        return model(features.to(device))
    code, turned = model(torch.cat([features, mirrored]).to(device)).chunk(2)
    return 0.5 * (code + turned.flip(-1))


def start_run(folder: Path, experiment: Experiment, classes: Classes) -> None:
    """Writes what determines the run into its folder; what it is found by comes last, when all else is there."""
    write_classes(folder / "classes.json", classes)
    write_json(folder / "experiment.json", experiment.to_dict())


def build_model(experiment: Experiment, in_dim: int, n_classes: int) -> Stego:
    """A model with fresh weights drawn from the experiment's seed."""
    with torch.random.fork_rng([]):  # the CPU's generator alone: weights are drawn there
        torch.default_generator.manual_seed(experiment.seed)
        return Stego(
            in_dim,
            experiment.code_dim,
            n_classes,
            head=experiment.head,
            dropout=experiment.dropout,
            extra_clusters=experiment.extra_clusters,
            decoder=experiment.rec_weight > 0,
        )


EVALUATION_KEYS = ("dataset", "data_root", "backbone", "published", "precision", *SCORING, *HOW)
"""Fields of the experiment that may be changed when a run is opened: all that does not touch what was trained."""


def load_run(path: str | Path, *, runs_dir: str | Path | None = None, **changes: Any) -> Run:
    """Opens a run folder, or a checkpoint that STEGO's authors released (a .ckpt file, see `published`).

    changes: values of the experiment for evaluation, such as data_root; `EVALUATION_KEYS` are possible. backbone: another
    place of the weights that the run was trained on, which they must be; a file in the run's folder is found there. What is
    evaluated of a .ckpt goes into a folder of its own below `runs_dir`. Raises StegoError that names what is missing
    or broken.
    """
    unknown = [key for key in changes if key not in EVALUATION_KEYS]
    if unknown:
        raise StegoError(
            f"load_run cannot change {', '.join(unknown)}: the run was trained with it; it can change {', '.join(EVALUATION_KEYS)}"
        )
    if Path(path).suffix == ".ckpt":
        if "backbone" in changes:
            raise StegoError(f"{path} is a released checkpoint, which holds its backbone: open it without backbone")
        return _load_published(Path(path).expanduser(), Path(runs_dir) if runs_dir else runs_root(), changes)
    folder = Path(path)
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
    kinds = {"step": int, "model": dict, "optimiser": dict, "shifts": list}
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
    # One folder for each set of weights and way of evaluating, so that no matching of another data set is ever used.
    of_values = {key: value for key, value in experiment.to_dict().items() if key not in ("data_root", "backbone")}
    key = fingerprint(*sorted(found.weights.items()), sorted(of_values.items()))
    run = Run(runs_dir / f"{path.stem}-{experiment.dataset}-{key[:8]}", experiment, found.classes, model.eval())
    own, knn, rand = (float(shift) for shift in experiment.shifts)
    run.step, run.shifts = found.step, (own, knn, rand)
    return run


def environment() -> dict[str, str]:
    """Where and with what a result was made: versions, processor, threads, date (UTC)."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "timm", "scikit-learn", "numpy")},
        "machine": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})",
        "threads": str(torch.get_num_threads()),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    }


def _as_tensor(image: Picture) -> Tensor:
    if isinstance(image, str | Path):
        image = open_picture(Path(image))
    if isinstance(image, Image.Image):
        image = np.array(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.array(image, order="C")).movedim(-1, 0)  # a copy, for views and read-only arrays
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
        raise StegoError(
            f"a picture must be uint8 with three channels, not {image.dtype} of shape {tuple(image.shape)}"
        )
    return image
