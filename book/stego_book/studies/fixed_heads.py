"""Heads that are not trained: STEGO without the correspondence loss."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.decomposition import PCA
from sklearn.random_projection import GaussianRandomProjection

from stego_lib.backbone import Backbone, fit_sizes
from stego_lib.baselines import sample_features
from stego_lib.datasets import open_split, open_training_set
from stego_lib.evaluation import probe_confusion
from stego_lib.experiment import Experiment
from stego_lib.features import Features, open_features
from stego_lib.metrics import identity, match, scores
from stego_lib.model import Stego, build_model
from stego_lib.probes import fit_probes
from stego_lib.provenance import Provenance
from stego_lib.utils.errors import StegoError
from stego_lib.utils.files import without_nan
from stego_lib.utils.paths import runs_root, user_path

# Fixed head -> `Experiment.head` of its model.
FIXED_HEADS = {"pca": "linear", "random projection": "linear", "untrained head": "nonlinear", "features": "none"}


@torch.no_grad()
def fixed_head(kind: str, store: Features, experiment: Experiment) -> Stego:
    """A model with a fixed head and with probes fitted to its codes.

    "pca": the first `code_dim` principal components of the features of random grid cells, minus their mean; "random
    projection": `code_dim` Gaussian directions; "untrained head": the experiment's head with its initial weights;
    "features": the features themselves. store: features of the training split. The experiment's head must be of the
    kind in `FIXED_HEADS`.
    """
    if FIXED_HEADS.get(kind) != experiment.head:
        raise StegoError(f"fixed head {kind!r} does not fit head={experiment.head!r}. Heads: {FIXED_HEADS}.")
    channels, dim = store.shape[1], experiment.code_dim
    if kind == "pca" and dim > channels:
        raise StegoError(f"code_dim={dim} is more than the {channels} channels of the features. Lower it.")
    model = build_model(experiment, channels, store.n_classes)
    if experiment.official.subtract_mean:
        model.feature_mean.copy_(store.mean.view(1, -1, 1, 1))
    if FIXED_HEADS[kind] == "linear":
        features = sample_features(store, experiment.seed)[0].numpy()
        if kind == "pca":
            fitted = PCA(dim, random_state=experiment.seed).fit(features)
            model.feature_mean.copy_(torch.from_numpy(fitted.mean_).view(1, -1, 1, 1))
        else:
            fitted = GaussianRandomProjection(dim, random_state=experiment.seed).fit(features[:1])
        weight = torch.from_numpy(fitted.components_)[:, :, None, None]
        model.head.linear.load_state_dict({"weight": weight, "bias": torch.zeros(dim)})
    if not store.has_labels:
        model.linear_probe.forget()
    fit_probes(model, store, experiment.seed)
    return model


def score_fixed_head(kind: str, experiment: Experiment, runs_dir: str | Path | None = None) -> dict[str, Any]:
    """A run record of a fixed head: step 0, and the scores of both probes on the validation split."""
    backbone = Backbone.of(experiment)
    experiment = fit_sizes(experiment, backbone.geometry)
    opened = partial(
        open_features,
        backbone=backbone,
        root=user_path(runs_dir, runs_root()) / "features",
        store=experiment.feature_store,
        published=experiment.official.published,
    )
    training = opened(open_training_set(experiment), size=experiment.train_size)
    plain = opened(held_out := open_split(experiment, "val"), size=experiment.eval_size)
    mirrored = opened(held_out, size=experiment.eval_size, mirror=True) if experiment.mirror else None
    model = fixed_head(kind, training, experiment)
    table = probe_confusion(model, plain, mirrored)
    scored = {"cluster": scores(table, match(table))}
    if model.linear_probe.trained:
        linear = probe_confusion(model, plain, mirrored, probe="linear")
        scored["linear"] = scores(linear, identity(len(linear)))
    return without_nan({
        "experiment": experiment.to_record(),
        "provenance": Provenance.of(backbone, training.kind, training.fingerprints).to_dict(),
        "fixed_head": kind,
        "step": 0,
        "split": "val",
        "data": plain.fingerprints["images"],
        "images": len(held_out),
        "classes": list(held_out.classes.names),
        "scores": scored,
        "matching": match(table).tolist(),
        "confusion": table.tolist(),
    })  # fmt: skip
