"""Changed features, fixed heads and numbers of clusters: each does what it says, and like is compared with like."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from common import tiny_experiment
from scipy.ndimage import uniform_filter
from sklearn.decomposition import PCA
from torch.testing import assert_close

from stego_book.studies import negative
from stego_book.studies.cluster_counts import CRITERIA, chosen_counts, criteria, linkages
from stego_book.studies.fixed_heads import fixed_head
from stego_lib import Backbone, StegoError, open_dataset
from stego_lib.features import open_features
from stego_lib.model import build_model


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    noise = torch.randn(9, 12, 6, 8, generator=generator)
    slopes = torch.randn(2, 12, 1, 1, generator=generator)
    return noise + slopes[0] * rows + slopes[1] * columns


def test_what_is_removed_is_gone(maps):
    points = negative.without_position(maps, rounds=4)(maps).movedim(1, -1).reshape(-1, 12)
    place = torch.arange(6.0).repeat_interleave(8).repeat(9)[:, None]
    inputs = torch.cat([points, torch.ones(len(points), 1)], 1).double()
    error = place - inputs @ torch.linalg.lstsq(inputs, place.double(), rcond=1e-4, driver="gelsd").solution
    assert error.var() > 0.7 * place.var()
    places = negative.without_place_means(maps)(maps).mean(0)
    assert_close(places, maps.mean((0, 2, 3))[:, None, None].expand_as(places), rtol=1e-3, atol=1e-4)
    means = negative.without_image_means(maps, 0.5)(maps).mean((2, 3)) - maps.mean((0, 2, 3))
    assert_close(means, 0.5 * (maps.mean((2, 3)) - maps.mean((0, 2, 3))), rtol=1e-3, atol=1e-4)
    white = negative.whitened(maps, dim=5)(maps).movedim(1, -1).reshape(-1, 5)  # fitted to all cells here
    assert_close(torch.cov(white.T), torch.eye(5), rtol=1e-2, atol=1e-2)


def test_guided_filter_of_a_constant_image_is_a_mean():
    probabilities = torch.rand(2, 20, 30, generator=torch.Generator().manual_seed(0))
    smoothed = negative.guided_filter(torch.full((3, 20, 30), 80, dtype=torch.uint8), probabilities, radius=2)
    mean = [uniform_filter(uniform_filter(map_, 5), 5) for map_ in probabilities.numpy()]
    assert_close(smoothed.float(), torch.from_numpy(np.stack(mean)).float(), rtol=1e-3, atol=1e-3)


def test_the_study_compares_the_same_images(scenes_root, backbone_file, tmp_path, monkeypatch):
    monkeypatch.setattr(negative, "runs_root", lambda: tmp_path)  # the default folder of features
    tiny = tiny_experiment(scenes_root, backbone_file)
    features = negative.changed_features(tiny, seeds=[0], blocks=[-2])
    rows = pd.concat([features, negative.changed_label_maps(tiny, seeds=[0], every=2)])
    scores = rows.set_index(["kind", "way"])[list(negative.SCORES)]
    assert_close(scores.loc["segments", "unchanged"].to_numpy(), scores.loc["label map", "upsampled"].to_numpy())
    assert scores.stack().between(0, 100).all() and set(rows["kind"]) == {"features", "block", "segments", "label map"}
    block = negative.table(rows, "block")["mIoU", "scenes"]
    assert list(block.index) == ["block -1", "block -2"]
    assert block.iloc[0] == f"{scores.loc['features', 'unchanged'].miou:.1f}"


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
    model, fresh = fixed_head("untrained head", store, experiment), build_model(experiment, 32, 8)
    for name, value in fresh.head.state_dict().items():
        assert torch.equal(value, model.head.state_dict()[name])
    assert not torch.equal(fresh.cluster_probe.clusters, model.cluster_probe.clusters), "clusters are fitted"


def test_every_criterion_finds_groups_that_are_far_apart():
    """Six groups of unit codes: a wrong choice on codes of STEGO is no mistake of ours."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.eye(6, 12)[torch.arange(6).repeat(200)]
    codes = F.normalize(centers + 0.05 * torch.randn(1200, 12, generator=generator), dim=1)
    images, counts = torch.arange(1200) // 30, (4, 5, 6, 8, 12)
    values = criteria(codes, images, counts)
    table = pd.concat({"a": pd.DataFrame(values, counts).assign(classes=6, miou=1)}, names=["record", "clusters"])
    assert chosen_counts(table).loc[[*CRITERIA], "a"].tolist() == [6] * len(CRITERIA)
    assert values == criteria(codes, images, counts), "seeded"
    with pytest.raises(StegoError, match="counts"):
        criteria(codes, images, (1, 4))


def test_every_linkage_joins_the_clusters_of_groups_that_are_far_apart():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(torch.tensor([40, 60, 80, 120]))
    codes = F.normalize(torch.eye(4, 8)[labels] + 0.05 * torch.randn(300, 8, generator=generator), dim=1)
    table = linkages((codes, labels), (codes[::2], labels[::2]), 4, n_clusters=20, counts=(1, 4, 10))
    assert len(table) == 12 and (table[table["branches"] >= 4]["miou"] == 100).all()
    alone = table[table["branches"] == 1]
    assert alone["accuracy"].tolist() == pytest.approx([40] * 4), "all have the name of the largest group"
    assert alone["miou"].tolist() == pytest.approx([10] * 4)
