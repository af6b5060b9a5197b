"""Fixed heads: against scikit-learn and numpy on the same features."""

import numpy as np
import pytest
import torch
from common import tiny_experiment
from sklearn.decomposition import PCA

from stego_book.studies.fixed_heads import fixed_head
from stego_lib import Backbone, open_dataset
from stego_lib.features import open_features


@pytest.fixture(scope="module")
def experiment(scenes_root, backbone_file):
    return tiny_experiment(scenes_root, backbone_file, code_dim=5)


@pytest.fixture(scope="module")
def store(experiment, tmp_path_factory):
    dataset = open_dataset(experiment.dataset, experiment.data_root, "train")
    return open_features(dataset, Backbone.of(experiment), 64, tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def cells(store):
    """Every feature of the training images, (M, C): few enough that the sample which is fitted on holds them all."""
    return store.rows(torch.arange(len(store))).float().movedim(1, -1).flatten(0, 2).numpy()


def codes(model, store):
    with torch.no_grad():
        return model.eval()(store.rows(torch.arange(len(store)))).movedim(1, -1).flatten(0, 2).numpy()


def test_pca_codes_are_the_principal_components(experiment, store, cells):
    model = fixed_head("pca", store, experiment.but(head="linear"))
    expected = PCA(5, svd_solver="full").fit_transform(cells)
    found = codes(model, store)
    signs = np.sign((found * expected).sum(0))  # a component's sign is free
    assert found == pytest.approx(expected * signs, abs=1e-3 * float(np.abs(expected).max()))


def test_the_features_themselves_are_the_code(experiment, store, cells):
    plain = experiment.but(head="none")
    assert codes(fixed_head("features", store, plain), store) == pytest.approx(cells)
    centered = codes(fixed_head("features", store, plain.but(official={"subtract_mean": True})), store)
    assert centered == pytest.approx(cells - cells.mean(0), abs=1e-3)


def test_an_untrained_head_is_the_one_that_training_begins_with(experiment, store):
    from stego_lib.model import build_model

    model, fresh = fixed_head("untrained head", store, experiment), build_model(experiment, 32, 8)
    for name, value in fresh.head.state_dict().items():
        assert torch.equal(value, model.head.state_dict()[name])
    assert not torch.equal(fresh.cluster_probe.clusters, model.cluster_probe.clusters), "clusters are fitted"
