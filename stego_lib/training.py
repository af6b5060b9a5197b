"""The training loop."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from .backbone import Backbone, choose_device, fit_sizes
from .batches import Batch, Draw, draw_batch, find_neighbors
from .calibration import calibrate
from .datasets import SegmentationDataset, open_training_set
from .datasets.findings import tell
from .experiment import MACHINE, Experiment
from .features.online import open_features, way_of
from .features.store import Features, FeatureStore
from .loss import stego_loss
from .model import Stego, build_model
from .optional.losses import alignment_loss, image_crf_loss, reconstruction_loss
from .probes import fit_probes
from .run import Run, data_ids, find_run, load_run, new_folder, read_checkpoint, refuse_misfit, start_run
from .runtime.devices import ALONE, Processes, join, spawn, started
from .runtime.errors import StegoError
from .runtime.files import explained, locked, sweep, write_json
from .runtime.log import open_log
from .runtime.memory import enough_memory
from .runtime.notices import notice
from .runtime.paths import runs_root, user_path
from .runtime.progress import progress
from .watch import Watch

SAVE_EVERY = 200
"""Steps between checkpoints."""


def train(experiment: Experiment, *, runs_dir: str | Path | None = None, resume: bool = False) -> Run:
    """Trains the head and both probes on the train split; returns the run, its folder below `runs_dir`.

    Features are computed once and kept in runs_dir/features. Sizes that the backbone's patch or stride does not divide are
    rounded, and a notice says so; `run.experiment` holds those that were used. With `resume`, the newest unfinished run of the same
    experiment goes on from its last checkpoint, to the same weights as if it had not stopped (on a CPU); a finished one
    is returned unchanged. It is found wherever its data, its weights file or the run itself lie now, see `run.find_run`.
    A batch has no more images, and an image no more neighbors, than there are; a notice says so. `experiment.start_from` names
    a run or released checkpoint whose head and probes it begins with.
    Raises StegoError before any long work (a missing dataset, a broken image, an unknown backbone, ...), for a run that
    another process is training, and for a loss that is no number or a full disk: the last checkpoint is then untouched.

    With `experiment.devices` above 1 as many processes are started, and train on equal shares of each batch to the same
    weights up to rounding; a script must call this below `if __name__ == "__main__":`, a notebook anywhere. In a program that
    torchrun or SLURM has started several times, each calls this; the first process writes the run, all return it.
    """
    runs_dir = user_path(runs_dir, runs_root())
    if experiment.devices == 1 or started() != (1, 1):
        with torch.random.fork_rng([]):  # networks are built with random weights before theirs are loaded
            return train_among(join(experiment.devices, experiment.device), experiment, runs_dir, resume)
    refuse_unequal_shares(experiment, experiment.devices)
    run = load_run(spawn(_train_spawned, experiment.devices, experiment.device, experiment.to_dict(), runs_dir, resume))
    run.experiment = run.experiment.but(**{name: getattr(experiment, name) for name in MACHINE})
    run.model.to(choose_device(experiment.device))
    return run


def _train_spawned(processes: Processes, experiment: dict[str, Any], runs_dir: Path, resume: bool) -> str:
    return str(train_among(processes, Experiment.from_dict(experiment), runs_dir, resume).folder)


def refuse_unequal_shares(experiment: Experiment, count: int) -> None:
    """StegoError if a batch does not divide into `count` equal shares: means of shares would not be the batch's."""
    if experiment.batch_size % count:
        raise StegoError(
            f"a batch of {experiment.batch_size} does not divide into {count} equal shares; change batch_size"
        )


def train_among(processes: Processes, experiment: Experiment, runs_dir: Path, resume: bool) -> Run:
    """`train` in each of the processes; the first one alone writes into the run's folder."""
    refuse_unequal_shares(experiment, processes.count)
    dataset = open_training_set(experiment)
    experiment = fitted_to(experiment, dataset)
    refuse_unequal_shares(experiment, processes.count)
    backbone = Backbone.of(experiment.but(device=processes.device(experiment.device)))
    experiment = fit_sizes(experiment, backbone.geometry, tell=processes.first)
    model = build_model(experiment, backbone.dim, len(dataset.classes)).to(backbone.device)
    if not dataset.has_labels:
        model.linear_probe.forget()
    if experiment.start_from is not None:
        take_over(model, load_run(experiment.start_from), tell=processes.first)
    optimizer = make_optimizer(model, experiment)
    model.head.dropout.rank, model.head.dropout.count = processes.rank, processes.count
    if processes.first:
        tell(dataset, runs_dir / "features")
    data = processes.broadcast(data_ids(dataset, runs_dir) if processes.first else {})
    folder = processes.broadcast(find_run(runs_dir, experiment, backbone, data) if resume and processes.first else None)
    store = open_features(
        dataset, backbone, experiment.train_size, runs_dir / "features", way_to_take(experiment, folder),
        published=experiment.published, processes=processes,
    )  # fmt: skip
    if isinstance(store, FeatureStore):
        store.keep_on(backbone.device)
    mean = store.mean.view(1, -1, 1, 1)  # asked for by every process: online, they compute it now, together
    if experiment.subtract_mean and experiment.start_from is None:
        model.feature_mean.copy_(mean)
    refuse_too_many_clusters(model, store)
    if processes.first:
        tell_if_alike(store)
    neighbors = processes.broadcast(find_neighbors(store, model, experiment) if processes.first else torch.empty(0))
    resumed = folder is not None
    folder = folder or processes.broadcast(new_folder(runs_dir, experiment) if processes.first else Path())
    run = Run(folder, experiment, dataset.classes, model, backbone)
    run.feature_store, run.processes, run.data = way_of(store), processes, data
    busy = f"{run.folder} is being trained by another process; wait for it, or train without resume"
    with locked(run.folder / ".lock", busy, wait=False) if processes.first else nullcontext():
        if resumed:
            go_on(run, optimizer, processes)
        elif processes.first:
            begin(run, store, neighbors, optimizer)
        run.shifts = processes.broadcast(run.shifts)
        run_steps(run, store, neighbors, optimizer, processes)
        processes.wait()
        if not processes.first:  # probes that are fitted after the head are fitted once
            model.load_state_dict(read_checkpoint(run.folder)["model"])
    model.eval()
    return run


def fitted_to(experiment: Experiment, dataset: SegmentationDataset) -> Experiment:
    """The experiment with no more images in a batch, and no more neighbors, than the training split has; a notice says so.

    Raises StegoError for a single image, which has neither neighbor nor negative, and for more clusters than label maps can
    number.
    """
    count = len(dataset)
    if count < 2:
        raise StegoError(
            f"{dataset.name} has one training image; an image's partners are others, so add images, or cut it with crop='five'"
        )
    clusters = len(dataset.classes) + experiment.extra_clusters
    if clusters > MOST_CLUSTERS:
        raise StegoError(
            f"{len(dataset.classes)} classes and extra_clusters = {experiment.extra_clusters} make {clusters} clusters; label maps "
            f"number {MOST_CLUSTERS} at most"
        )
    changes = {name: value for name, value in (("batch_size", count), ("neighbors", count - 1)) if getattr(experiment, name) > value}
    if not changes:
        return experiment
    told = ", ".join(f"{name} is {value} (asked: {getattr(experiment, name)})" for name, value in changes.items())
    notice(f"{dataset.name} has {count} training images, so {told}")
    return experiment.but(**changes)


MOST_CLUSTERS = 255
"""Clusters that an 8-bit label map can number beside 255, which is transparency."""


def refuse_too_many_clusters(model: Stego, store: Features) -> None:
    """StegoError for more clusters than there are grid cells to find them in."""
    clusters, (count, _, height, width) = len(model.cluster_probe.clusters), store.shape
    if clusters > count * height * width:
        raise StegoError(
            f"{clusters} clusters cannot be found in {count} training images of {height} x {width} grid cells; lower n_classes or "
            "extra_clusters, or take more or larger images (train_size)"
        )


def tell_if_alike(store: Features) -> None:
    """A notice if the images of the training split are all alike: nothing can be learned from comparing them."""
    unit = F.normalize(store.pooled, dim=1)
    if (unit @ F.normalize(unit.mean(0), dim=0)).min() > ALIKE:
        notice(
            f"the {len(store)} training images look all alike to the backbone: neighbors and negatives are the same image again, so "
            "expect nothing of this run; are they copies, or blank?"
        )


ALIKE = 1 - 1e-5
"""Correspondence of an image's mean feature with that of all images above which it counts as a copy of them."""


def way_to_take(experiment: Experiment, folder: Path | None) -> str:
    """How features are got: as asked, or where that is open, as the run in `folder` that goes on has got them so far."""
    asked = experiment.feature_store
    before = read_checkpoint(folder).get("feature_store", asked) if folder is not None else asked
    if asked == "auto":
        return before
    if before not in (asked, "auto"):
        notice(f"{folder} goes on with feature_store={asked!r}; up to here it was {before!r}")
    return asked


def begin(run: Run, store: Features, neighbors: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Sets the shifts and writes a new run's files, with a checkpoint of step 0, so that it can be resumed from then on."""
    found = calibrate(store, neighbors, run.model.feature_mean.cpu(), run.experiment)
    run.shifts = found.shifts
    write_json(run.folder / "correspondences.json", found.to_dict())
    run.save(optimizer)
    start_run(run.folder, run.experiment, run.classes)


def go_on(run: Run, optimizer: torch.optim.Optimizer, processes: Processes = ALONE) -> None:
    """Takes up a run where its checkpoint left it, and removes what was being written when it was killed."""
    for folder in (run.folder, run.folder / "kept") if processes.first else ():
        sweep(folder)
    state = read_checkpoint(run.folder)
    refuse_misfit(run.model, state, run.folder)
    run.model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    run.step, run.shifts = state["step"], tuple(state["shifts"])
    before, now = state.get("precision"), str(run.backbone.precision)
    if before not in (None, now) and processes.first:
        notice(
            f"{run.folder} was begun on features computed in {before}, here they are in {now}: scores may differ by more than "
            "rounding from a run in one of them (precision='float32' is the same everywhere)"
        )
    if processes.first:  # how it is scored, and where its data lie, may have changed
        write_json(run.folder / "experiment.json", run.experiment.to_dict())


def run_steps(
    run: Run, store: Features, neighbors: Tensor, optimizer: torch.optim.Optimizer, processes: Processes = ALONE
) -> None:
    """Trains from the run's step to the last, with a line in the log for each step and a checkpoint now and then."""
    experiment, model, saved = run.experiment, run.model, run.step
    watch = Watch(run.folder, store, experiment, run.step)
    knobs = "choose a smaller batch_size, code_dim or train_size, or device='cpu'"
    first, path = processes.first, run.folder / "log.csv"
    device = model.feature_mean.device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),  # dropout draws from the caller's generators
        enough_memory(f"a training step on {store.name}", knobs),
        explained(path),
        open_log(path, run.step, [*probe_terms(experiment), *optional_terms(experiment)])
        if first
        else nullcontext() as log,
    ):
        todo = range(run.step, experiment.steps)
        bar = progress(todo, "training", initial=run.step, total=experiment.steps, disable=not first)
        for step in bar:
            batch = draw_batch(store, neighbors, model, experiment, step, run.backbone, processes)
            if step + 1 < experiment.steps:
                store.expect(Draw(neighbors, experiment, step + 1).needed(processes))
            values = train_step(model, optimizer, batch, experiment, run.shifts, processes)
            refuse_nonfinite(run, values, saved)
            run.step = step + 1
            if log is None:
                continue
            log.add(step, values)
            bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
            if run.step == experiment.steps and experiment.probes == "after":
                fit_probes(model, store, experiment.seed)
            watch.look(model, run.step)
            if experiment.validate_every and run.step % experiment.validate_every == 0:
                run.keep_weights()
            if run.step % SAVE_EVERY == 0 or run.step == experiment.steps:
                refuse_nonfinite(run, {f"weight {name}": value for name, value in model.state_dict().items()}, saved)
                log.sync()  # before the checkpoint: no step that it counts may be missing
                run.save(optimizer)
                saved = run.step


def refuse_nonfinite(run: Run, values: dict[str, Any], saved: int) -> None:
    """StegoError for a loss term or weight that is infinite or no number; `saved`: step of the last checkpoint."""
    wrong = [name for name, value in values.items() if not _finite(value)]
    if wrong:
        term = next((name for name in wrong if name != "loss"), "loss")  # what the sum is made of says more
        raise StegoError(
            f"{run.folder}: {term} is not a finite number at step {run.step}, so training stopped; the last checkpoint, of "
            f"step {saved}, is good. Lower lr_head or lr_probes, or look at the images and the backbone"
        )


def _finite(value: float | Tensor) -> bool:
    return bool(value.isfinite().all()) if isinstance(value, Tensor) else math.isfinite(value)


def train_step(
    model: Stego,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    experiment: Experiment,
    shifts: tuple[float, float, float],
    processes: Processes = ALONE,
) -> dict[str, float]:
    """One update of head and joint probes by one backward pass; the probes see the code without its gradient.

    Of several processes each has its share of the batch; means are taken over all shares, and negatives come from all.

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
        average=processes.mean, gather=processes.gather,
    )  # fmt: skip
    if experiment.rec_weight:
        values["loss_rec"] = reconstruction_loss(feats, model.decoder(code))
    if experiment.crf_weight:
        values["loss_crf"] = image_crf_loss(batch.images, code, batch.crf_points)
    if experiment.aug_alignment_weight:
        code_view = model.head(batch.feats_view)
        values["loss_aug"] = alignment_loss(code, code_view, batch.view_coords, published=experiment.published)
    for name, weight in optional_terms(experiment).items():
        total = total + weight * values[name]
    if experiment.probes == "joint":
        values["loss_cluster"] = model.cluster_probe.loss(code.detach())
        total = total + values["loss_cluster"]
        if batch.label is not None:
            values["loss_linear"] = model.linear_probe.loss(code.detach(), batch.label, processes.mean)
            total = total + values["loss_linear"]
    optimizer.zero_grad()
    total.backward()
    average_gradients(model, processes)
    optimizer.step()
    means = processes.mean(torch.stack([total.detach(), *(value.detach() for value in values.values())])).tolist()
    return dict(zip(["loss", *values], means, strict=True))


def average_gradients(model: Stego, processes: Processes) -> None:
    """Replaces each gradient by its mean over the processes."""
    if processes.count == 1:
        return
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    mean = processes.mean(parameters_to_vector(found))
    for gradient, part in zip(found, mean.split([one.numel() for one in found]), strict=True):
        gradient.copy_(part.view_as(gradient))


def probe_terms(experiment: Experiment) -> list[str]:
    """Names of the losses of probes that are trained beside the head; the linear one stays empty without labels."""
    return ["loss_cluster", "loss_linear"] if experiment.probes == "joint" else []


def optional_terms(experiment: Experiment) -> dict[str, float]:
    """Weights of the optional terms that are on, by the name of their loss."""
    weights = dict(
        loss_rec=experiment.rec_weight, loss_crf=experiment.crf_weight, loss_aug=experiment.aug_alignment_weight
    )
    return {name: weight for name, weight in weights.items() if weight}


def take_over(model: Stego, source: Run, tell: bool = True) -> None:
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
    if tell and source.step < source.experiment.steps and (source.folder / "experiment.json").exists():
        notice(f"start_from: {source.folder} stopped at step {source.step} of {source.experiment.steps}")
    anew = [name for name in ours if "probe" in name and name not in fitting]
    if anew:
        notice(f"start_from: {', '.join(anew)} begin anew, for another number of classes or clusters")
    model.load_state_dict(fitting, strict=False)


def make_optimizer(model: Stego, experiment: Experiment) -> torch.optim.Adam:
    """Adam with one learning rate for the head (and the decoder, if there is one) and one for the probes."""
    probes = [*model.cluster_probe.parameters(), *model.linear_probe.parameters()]
    head = [*model.head.parameters(), *(model.decoder.parameters() if experiment.rec_weight else ())]
    groups = [
        dict(params=head, lr=experiment.lr_head),
        dict(params=probes, lr=experiment.lr_probes),
    ]
    return torch.optim.Adam([group for group in groups if group["params"]])
