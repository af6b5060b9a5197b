"""The training loop: from an experiment to a run."""

from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .backbone import Backbone, fit_sizes
from .batches import Batch, Draw, draw_batch, find_neighbors, fit_to_data
from .datasets import open_training_set
from .datasets.classes import read_classes
from .experiment import Experiment
from .features import open_features
from .loss import stego_loss
from .model import Stego, build_model
from .provenance import Provenance
from .run import Run, find_run, load_run, new_folder
from .utils import devices
from .utils.errors import StegoError, enough_memory
from .utils.files import check_folder, disk_errors, fingerprint, write_json
from .utils.log import TrainingLog
from .utils.notices import notice
from .utils.paths import runs_root, user_path
from .utils.progress import progress
from .utils.states import save_state
from .utils.torch_state import drawing, usual_modes
from .watch import Watch

if TYPE_CHECKING:
    from .features import Features

# Steps between checkpoints.
SAVE_EVERY = 200


@usual_modes()
def train(experiment: Experiment, *, runs_dir: str | Path | None = None, resume: bool = False) -> Run:
    """Trains the head and both probes on the training split.

    Features are extracted once and stored in runs_dir/features. Image sizes are rounded to those that the backbone
    accepts, and batch size and neighbors are limited to the number of images, with a notice; `run.experiment` holds the
    actual values.

    Parameters
    ----------
    experiment
        Settings. `experiment.start_from` is an optional run or released checkpoint to start from.
    runs_dir
        Parent folder of runs and stored features; `runs/` of the project by default.
    resume
        Resume the newest run of this experiment and `Provenance` from its last checkpoint. On a CPU, the weights equal
        those of an uninterrupted run. A finished run is not trained again.

    Returns
    -------
    Run
        The run, with a folder in `runs_dir`.

    Raises
    ------
    StegoError
        For missing data, unreadable images, an unknown backbone and unsupported settings, before long work; for a loss
        that is not finite and a full disk, which leave the last checkpoint intact.

    Notes
    -----
    For several GPUs, start the script with `torchrun --nproc-per-node N script.py` or SLURM. The processes share the
    work of the backbone, rank 0 writes the run, and all return it.

    Examples
    --------
    >>> run = train(Experiment.preset("scenes", steps=20))
    """
    method = trainer_of(experiment)
    method.check(experiment)
    runs_dir = user_path(runs_dir, runs_root())
    check_folder(runs_dir)
    devices.join(experiment.device, fingerprint("train", experiment.to_dict(), str(runs_dir.absolute()), resume))
    dataset = open_training_set(experiment)
    experiment = fit_to_data(experiment, dataset)
    with drawing():  # networks draw random weights before loading theirs
        backbone = Backbone.of(experiment)
    experiment = fit_sizes(experiment, backbone.geometry)
    model = build_model(experiment, backbone.dim, len(dataset.classes)).to(backbone.device)
    if not dataset.has_labels:
        model.linear_probe.forget()
    start = None if experiment.start_from is None else start_from(load_run(experiment.start_from), model)
    root, published = runs_dir / "features", experiment.official.published
    features = open_features(
        dataset, backbone, experiment.train_size, root, experiment.feature_store, published=published
    )
    if start is None and not features.has_labels:  # label maps with less than two classes
        model.linear_probe.forget()
    if devices.first():
        from .datasets.findings import show_findings

        show_findings(dataset, features.class_pixels)
    features.keep_on(backbone.device)
    check_clusters(model, features)
    provenance = Provenance.of(backbone, features.kind, features.fingerprints, start)
    folder = devices.once(lambda: find_run(runs_dir, experiment, provenance) if resume else None)
    resumed = folder is not None
    if folder is None:
        folder = devices.once(lambda: new_folder(runs_dir, experiment))
    run = Run(folder, experiment, dataset.classes, model, backbone)
    run.provenance = provenance
    if resumed:
        run.classes = read_classes(folder / "classes.json")
        run.check_classes(dataset)
    if experiment.official.subtract_mean and start is None:
        model.feature_mean.copy_(features.mean.view(1, -1, 1, 1))
    features.share()
    neighbors = devices.once(lambda: find_neighbors(features, model, experiment))
    trainer = method(run, features, neighbors)
    if resumed:
        trainer.restore(run.resume(trainer.optimizer))
    else:
        correspondences = trainer.begin()
        if devices.first():
            write_json(folder / "correspondences.json", correspondences)
            run.save(trainer.optimizer, trainer.state())
            run.save_experiment()
        devices.wait()
    if run.step < experiment.steps:
        train_steps(trainer)
    devices.wait()
    run.load_checkpoint()
    model.eval()
    return run


def start_from(source: Run, model: Stego) -> str:
    """Copies head, feature mean and, if their shapes match, probes of a run to `model`; returns their fingerprint.

    Shows a notice for probes of other shapes, which keep their random weights. Raises StegoError for another head.
    """
    theirs, ours = source.model.state_dict(), model.state_dict()
    matching = {name: value for name, value in theirs.items() if name in ours and value.shape == ours[name].shape}
    fresh = [name for name in ours if name not in matching]
    if source.model.head.kind != model.head.kind or any(name.startswith(("head.", "feature_mean")) for name in fresh):
        text = f"start_from {source!r}: the head has another kind or size."
        raise StegoError(f"{text} Use its backbone, head and code_dim.")
    if fresh:
        notice(f"start_from: random weights for {', '.join(fresh)}, because the number of classes or clusters differs.")
    model.load_state_dict(matching, strict=False)
    return fingerprint(*(item for pair in sorted(matching.items()) for item in pair))


def check_clusters(model: Stego, features: "Features") -> None:
    """Raises StegoError for more clusters than 8-bit ids or grid cells."""
    count, _, height, width = features.shape
    limit = min(255, count * height * width)
    if model.n_clusters > limit:
        text = f"the limit for {count} images of {height} x {width} cells and 8-bit label maps"
        raise StegoError(
            f"{model.n_clusters} clusters are more than {limit}, {text}. Lower n_classes or extra_clusters."
        )


class Trainer:
    """Trains a run by STEGO; subclasses in `stego_lib.successors` implement the other values of `Experiment.method`.

    Parameters: the run, features of the training images, and their nearest neighbors, int64 (N, k).
    """

    def __init__(self, run: Run, features: "Features", neighbors: Tensor):
        self.run, self.features, self.neighbors = run, features, neighbors
        self.experiment, self.model = run.experiment, run.model
        self.optimizer: torch.optim.Optimizer = make_optimizer(self.model, self.experiment)
        self.precision = torch.float32 if self.experiment.official.published else run.backbone.precision

    @classmethod
    def check(cls, experiment: Experiment) -> None:
        """Raises StegoError for unsupported settings, before any work."""

    def columns(self) -> list[str]:
        """Names of the values of `step`, in this order."""
        joint = ["loss_cluster", "loss_linear"] if self.experiment.probes == "joint" else []
        parts = [f"{what}_{kind}" for what in ("loss", "code") for kind in ("self", "knn", "rand")]
        return ["loss", *parts, *joint, *self.experiment.official.loss_weights]

    def begin(self) -> dict[str, Any]:
        """Sets the shifts of a new run. Returns the content of correspondences.json."""
        from .calibration import calibrate

        calibration = calibrate(self.features, self.neighbors, self.model.feature_mean.cpu(), self.experiment)
        self.run.shifts = calibration["shifts"]
        return calibration

    def step(self, number: int) -> dict[str, float]:
        """Takes a step; random choices only depend on `number` and the seed. Returns the values of `columns()`."""
        batch = draw_batch(self.features, self.neighbors, self.model, self.experiment, number, self.run.backbone)
        if number + 1 < self.experiment.steps:
            self.features.prefetch(Draw(self.neighbors, self.experiment, number + 1).needed)
        return train_step(self.model, self.optimizer, batch, self.experiment, self.run.shifts, self.precision)

    def finish(self) -> None:
        """Fits probes after the last step, unless they were trained jointly."""
        if self.experiment.probes == "after":
            from .probes import fit_probes

            fit_probes(self.model, self.features, self.experiment.seed, clusters=not self.experiment.own_prototypes)

    def state(self) -> dict[str, Any]:
        """Additional state for the checkpoint, besides model and optimizer."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Restores the result of `state`."""


def trainer_of(experiment: Experiment) -> type[Trainer]:
    """The `Trainer` class of `experiment.method`."""
    if experiment.method == "stego":
        return Trainer
    return import_module(f"{__package__}.successors.{experiment.method}").Trainer


def train_steps(trainer: Trainer) -> None:
    """Trains the remaining steps, with a log line per step and a checkpoint every `SAVE_EVERY` steps."""
    run, features = trainer.run, trainer.features
    experiment, model, saved = run.experiment, run.model, run.step
    path = run.folder / "log.csv"
    watch = Watch(run.folder, features, experiment, run.step)
    with (
        enough_memory(f"a training step on {features.name}", "Lower batch_size, code_dim or train_size."),
        disk_errors(path),
        TrainingLog(path, run.step, trainer.columns()) if devices.first() else nullcontext() as log,
    ):  # fmt: skip
        bar = progress(range(run.step, experiment.steps), "training", initial=run.step, total=experiment.steps)
        for step in bar:
            values = trainer.step(step)
            check_finite(values, run, saved)
            run.step = step + 1
            if run.step == experiment.steps:
                trainer.finish()
            if log is None:
                continue
            log.add(step, values)
            bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
            watch.update(model, run.step)
            if experiment.official.keep_every and run.step % experiment.official.keep_every == 0:
                save_state(run.folder / "kept" / f"{run.step:07d}.safetensors", model.state_dict())
            if run.step % SAVE_EVERY == 0 or run.step == experiment.steps:
                check_finite({f"weight {name}": value for name, value in model.state_dict().items()}, run, saved)
                log.sync()  # before the checkpoint, whose steps must all be in the log
                run.save(trainer.optimizer, trainer.state())
                saved = run.step


def check_finite(values: dict[str, Any], run: Run, saved: int) -> None:
    """Raises StegoError if a loss or weight is not finite. saved: step of the last checkpoint."""
    wrong = [name for name, value in values.items() if not torch.as_tensor(value).isfinite().all()]
    if wrong:
        term = next((name for name in wrong if name != "loss"), "loss")  # rather the term than the sum
        raise StegoError(
            f"{run.folder}: {term} is not finite at step {run.step}; the last checkpoint is of step {saved}. "
            "Lower lr_head or lr_probes, or check the images."
        )


def train_step(
    model: Stego,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    experiment: Experiment,
    shifts: tuple[float, float, float],
    precision: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Updates the head, and joint probes on detached codes, by one backward pass.

    precision: of the matrix products of the head; weights, codes and losses are float32. Returns the values before the
    update: "loss" (the sum), the parts of `stego_loss`, and the losses of joint probes and of optional terms.
    """
    model.train()
    feats, feats_knn = batch.feats, batch.feats_knn
    # Without cache: inside another autocast context, such as that of `usual_modes`, the cache would keep the weights of
    # the first step.
    with torch.autocast(feats.device.type, precision, enabled=precision != torch.float32, cache_enabled=False):
        code, code_knn = (model.head(maps).float() for maps in (feats, feats_knn))
    if experiment.official.published:  # the published code also applies dropout to the target features
        feats, feats_knn = model.head.dropout(feats), model.head.dropout(feats_knn)
    total, values = stego_loss(
        feats,
        feats_knn,
        code,
        code_knn,
        batch.coords1,
        batch.coords2,
        batch.permutations,
        experiment.weights,
        shifts,
        centering=experiment.centering,
        zero_clamp=experiment.official.zero_clamp,
        stabilize=experiment.official.stabilize,
    )
    if weights := experiment.official.loss_weights:
        from .official import optional_losses

        values |= optional_losses(model, batch, feats, code, experiment)
        for name, weight in weights.items():
            total = total + weight * values[name]
    if experiment.probes == "joint":
        values["loss_cluster"] = model.cluster_probe.loss(code.detach())
        total = total + values["loss_cluster"]
        if batch.label is not None:
            values["loss_linear"] = model.linear_probe.loss(code.detach(), batch.label)
            total = total + values["loss_linear"]
    optimizer.zero_grad()
    if total.requires_grad:  # not for head="none", which has no weights
        total.backward()
    optimizer.step()
    return dict(zip(["loss", *values], torch.stack([total.detach(), *values.values()]).tolist(), strict=True))


def make_optimizer(model: Stego, experiment: Experiment) -> torch.optim.Adam:
    """Creates Adam with one learning rate for the head and decoder, and one for the probes."""
    probes = [*model.cluster_probe.parameters(), *model.linear_probe.parameters()]
    head = [*model.head.parameters(), *(model.decoder.parameters() if experiment.official.rec_weight else ())]
    groups = [dict(params=head, lr=experiment.lr_head), dict(params=probes, lr=experiment.lr_probes)]
    return torch.optim.Adam([group for group in groups if group["params"]])
