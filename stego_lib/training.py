"""The training loop."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backbone import Backbone
from .batches import Batch, draw_batch, find_neighbors
from .calibration import histograms, measure_correspondences, resolve_shifts
from .datasets import open_training_set
from .errors import StegoError
from .experiment import Experiment
from .features import FeatureStore, open_store
from .files import explained, locked, sweep, write_json
from .loss import stego_loss
from .losses_extra import alignment_loss, picture_crf_loss, reconstruction_loss
from .memory import enough_memory
from .model import Stego
from .notices import notice
from .paths import runs_root
from .probes import fit_probes
from .progress import progress
from .run import Run, build_model, load_run, read_checkpoint, refuse_misfit, start_run
from .run_folders import find_run, new_folder
from .trainlog import open_log

SAVE_EVERY = 200
"""Steps between checkpoints."""


def train(experiment: Experiment, *, runs_dir: str | Path | None = None, resume: bool = False) -> Run:
    """Trains the head and both probes on the train split; returns the run, its folder below `runs_dir`.

    Features are computed once and kept in runs_dir/features. With `resume`, the newest unfinished run of the same
    experiment goes on from its last checkpoint, to the same weights as if it had not stopped (on a CPU); a finished one
    is returned as it is. `experiment.start_from` names a run or released checkpoint whose head and probes it begins with.
    Raises StegoError before any long work (a missing data set, a broken picture, an unknown backbone, ...), for a run that
    another process is training, and for a loss that is no number or a full disk: the last checkpoint is then untouched.
    """
    runs_dir = Path(runs_dir) if runs_dir is not None else runs_root()
    dataset = open_training_set(experiment)
    if len(dataset) <= max(experiment.neighbors, experiment.batch_size - 1):
        raise StegoError(
            f"{dataset.name} has {len(dataset)} training pictures: too few for batch_size {experiment.batch_size} and {experiment.neighbors} neighbours"
        )
    backbone = Backbone.of(experiment)
    for size in (experiment.train_size, experiment.eval_size):
        backbone.grid(*(size if isinstance(size, tuple) else (size, size)))
    model = build_model(experiment, backbone.dim, len(dataset.classes)).to(backbone.device)
    if not dataset.has_labels:
        model.linear_probe.forget()
    if experiment.start_from is not None:
        take_over(model, load_run(experiment.start_from))
    optimiser = make_optimiser(model, experiment)
    folder = find_run(runs_dir, experiment, backbone) if resume else None
    store = open_store(dataset, backbone, experiment.train_size, runs_dir / "features", published=experiment.published)
    if experiment.subtract_mean and experiment.start_from is None:
        model.feature_mean.copy_(store.mean.view(1, -1, 1, 1))
    neighbors = find_neighbors(store, model, experiment)
    run = Run(folder or new_folder(runs_dir, experiment), experiment, dataset.classes, model, backbone)
    busy = f"{run.folder} is being trained by another process; wait for it, or train without resume"
    with locked(run.folder / ".lock", busy, wait=False):
        if folder is None:
            begin(run, store, neighbors, optimiser)
        else:
            go_on(run, optimiser)
        run_steps(run, store, neighbors, optimiser)
    model.eval()
    return run


def begin(run: Run, store: FeatureStore, neighbors: Tensor, optimiser: torch.optim.Optimizer) -> None:
    """Sets the shifts and writes a new run's files, with a checkpoint of step 0, so that it can be resumed from then on."""
    measured = measure_correspondences(store, neighbors, run.model.feature_mean.cpu(), run.experiment)
    run.shifts = resolve_shifts(run.experiment, measured)
    write_json(run.folder / "correspondences.json", histograms(measured))
    run.save(optimiser)
    start_run(run.folder, run.experiment, run.classes)


def go_on(run: Run, optimiser: torch.optim.Optimizer) -> None:
    """Takes up a run where its checkpoint left it, and removes what was being written when it was killed."""
    for folder in (run.folder, run.folder / "kept"):
        sweep(folder)
    state = read_checkpoint(run.folder)
    refuse_misfit(run.model, state, run.folder)
    run.model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    run.step, run.shifts = state["step"], tuple(state["shifts"])


def run_steps(run: Run, store: FeatureStore, neighbors: Tensor, optimiser: torch.optim.Optimizer) -> None:
    """Trains from the run's step to the last, with a line in the log for each step and a checkpoint now and then."""
    experiment, model, saved = run.experiment, run.model, run.step
    knobs = "choose a smaller batch_size, points, negatives or code_dim, a smaller train_size, or device='cpu'"
    with (
        enough_memory(f"a training step on {store.folder.name}", knobs),
        explained(run.folder / "log.csv"),
        open_log(run.folder / "log.csv", run.step, [*probe_terms(experiment), *optional_terms(experiment)]) as log,
    ):
        bar = progress(range(run.step, experiment.steps), "training", initial=run.step, total=experiment.steps)
        for step in bar:
            batch = draw_batch(store, neighbors, model, experiment, step, run.backbone)
            values = train_step(model, optimiser, batch, experiment, run.shifts)
            refuse_nonfinite(run, values, saved)
            log.add(step, values)
            bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
            run.step = step + 1
            if run.step == experiment.steps and experiment.probes == "after":
                fit_probes(model, store, experiment.seed)
            if experiment.validate_every and run.step % experiment.validate_every == 0:
                run.keep_weights()
            if run.step % SAVE_EVERY == 0 or run.step == experiment.steps:
                refuse_nonfinite(run, {f"weight {name}": value for name, value in model.state_dict().items()}, saved)
                log.sync()  # before the checkpoint: no step that it counts may be missing
                run.save(optimiser)
                saved = run.step


def refuse_nonfinite(run: Run, values: dict[str, Any], saved: int) -> None:
    """StegoError for a loss term or weight that is infinite or no number; `saved`: step of the last checkpoint."""
    wrong = [name for name, value in values.items() if not _finite(value)]
    if wrong:
        term = next((name for name in wrong if name != "loss"), "loss")  # what the sum is made of says more
        raise StegoError(
            f"{run.folder}: {term} is not a finite number at step {run.step}, so training stopped; the last checkpoint, of "
            f"step {saved}, is good. Lower lr_head or lr_probes, or look at the pictures and the backbone"
        )


def _finite(value: float | Tensor) -> bool:
    return bool(value.isfinite().all()) if isinstance(value, Tensor) else math.isfinite(value)


def train_step(
    model: Stego,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    experiment: Experiment,
    shifts: tuple[float, float, float],
) -> dict[str, float]:
    """One update of head and joint probes by one backward pass; the probes see the code without its gradient.

    Returns the values of this step, before its update: loss (the sum), loss_{self,knn,rand}, mean code correspondences
    code_{self,knn,rand}, loss_{cluster,linear} of joint probes and loss_{rec,crf,aug} where these terms have a weight.
    """
    model.train()
    feats, feats_knn = batch.feats, batch.feats_knn
    code, code_knn = model.head(feats), model.head(feats_knn)
    if experiment.published:  # the target passes through dropout too, by a third mask
        feats, feats_knn = model.head.dropout(feats), model.head.dropout(feats_knn)
    total, values = stego_loss(
        feats, feats_knn, code, code_knn, batch.coords1, batch.coords2, batch.permutations,
        experiment.weights, shifts,
        centering=experiment.centering, zero_clamp=experiment.zero_clamp, stabilize=experiment.stabilize,
    )  # fmt: skip
    if experiment.rec_weight:
        values["loss_rec"] = reconstruction_loss(feats, model.decoder(code))
    if experiment.crf_weight:
        values["loss_crf"] = picture_crf_loss(batch.pictures, code, batch.crf_points)
    if experiment.aug_alignment_weight:
        code_view = model.head(batch.feats_view)
        values["loss_aug"] = alignment_loss(code, code_view, batch.view_coords, published=experiment.published)
    for name, weight in optional_terms(experiment).items():
        total = total + weight * values[name]
    if experiment.probes == "joint":
        values["loss_cluster"] = model.cluster_probe.loss(code.detach())
        total = total + values["loss_cluster"]
        if batch.label is not None:
            values["loss_linear"] = model.linear_probe.loss(code.detach(), batch.label)
            total = total + values["loss_linear"]
    optimiser.zero_grad()
    total.backward()
    optimiser.step()
    return {"loss": total.item()} | {key: value.item() for key, value in values.items()}


def probe_terms(experiment: Experiment) -> list[str]:
    """Names of the losses of probes that are trained beside the head; the linear one stays empty without labels."""
    return ["loss_cluster", "loss_linear"] if experiment.probes == "joint" else []


def optional_terms(experiment: Experiment) -> dict[str, float]:
    """Weights of the optional terms that are on, by the name of their loss."""
    weights = dict(
        loss_rec=experiment.rec_weight, loss_crf=experiment.crf_weight, loss_aug=experiment.aug_alignment_weight
    )
    return {name: weight for name, weight in weights.items() if weight}


def take_over(model: Stego, source: Run) -> None:
    """Copies head, feature mean and probes of a run into `model`; probes for another number of classes begin anew.

    Raises StegoError where the head does not fit.
    """
    theirs, ours = source.model.state_dict(), model.state_dict()
    fitting = {name: value for name, value in theirs.items() if name in ours and value.shape == ours[name].shape}
    wrong = [name for name in ours if name.startswith(("head.", "feature_mean")) and name not in fitting]
    if wrong or source.model.head.kind != model.head.kind:
        raise StegoError(
            f"start_from {source!r}: its head is of another kind or size than this experiment's; take backbone, features, head and code_dim from its experiment"
        )
    anew = [name for name in ours if "probe" in name and name not in fitting]
    if anew:
        notice(f"start_from: {', '.join(anew)} begin anew, for another number of classes or clusters")
    model.load_state_dict(fitting, strict=False)


def make_optimiser(model: Stego, experiment: Experiment) -> torch.optim.Adam:
    """Adam with one learning rate for the head (and the decoder, if there is one) and one for the probes."""
    probes = [*model.cluster_probe.parameters(), *model.linear_probe.parameters()]
    head = [*model.head.parameters(), *(model.decoder.parameters() if experiment.rec_weight else ())]
    groups = [
        dict(params=head, lr=experiment.lr_head),
        dict(params=probes, lr=experiment.lr_probes),
    ]
    return torch.optim.Adam([group for group in groups if group["params"]])
