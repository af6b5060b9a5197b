"""Heads that no loss has shaped: STEGO without the correspondence loss."""

import torch
from sklearn.decomposition import PCA
from sklearn.random_projection import GaussianRandomProjection

from stego_lib.baselines import sample_features
from stego_lib.experiment import Experiment
from stego_lib.features import Features
from stego_lib.model import Stego, build_model
from stego_lib.probes import fit_probes
from stego_lib.utils.errors import StegoError

FIXED_HEADS = {
    "pca": "linear",
    "random projection": "linear",
    "untrained head": "nonlinear",
    "features": "none",
}
"""Name -> the kind of segmentation head that holds it."""


@torch.no_grad()
def fixed_head(kind: str, store: Features, experiment: Experiment) -> Stego:
    """A model with a fixed head and probes fitted to its codes; all but the head is as for a trained one.

    Parameters
    ----------
    kind
        "pca": the first `code_dim` principal components of the features of random grid cells, minus their mean; "random
        projection": that many Gaussian directions; "untrained head": the experiment's own head with its initial weights;
        "features": the features themselves.
    store
        Features of the training split.
    experiment
        Its head must be of the kind in `FIXED_HEADS`.

    Raises
    ------
    StegoError
        For an unknown or unfitting kind, and for more principal components than features have channels.
    """
    if FIXED_HEADS.get(kind) != experiment.head:
        raise StegoError(
            f"fixed head {kind!r} on an experiment with head={experiment.head!r}; fixed heads and what they need: {FIXED_HEADS}"
        )
    channels, dim = store.shape[1], experiment.code_dim
    if kind == "pca" and dim > channels:
        raise StegoError(f"{dim} principal components of features with {channels} channels; code_dim must not be above")
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
        model.head.linear.weight.copy_(torch.from_numpy(fitted.components_)[:, :, None, None])
        model.head.linear.bias.zero_()
    if not store.has_labels:
        model.linear_probe.forget()
    fit_probes(model, store, experiment.seed)
    return model
