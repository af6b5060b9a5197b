"""Neighbors of many images: read from the file of a store, and approximate ones by faiss."""

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from common import tiny_experiment
from torch import Tensor
from torch.testing import assert_close

from stego_lib import Backbone, open_dataset
from stego_lib.batches import find_neighbors
from stego_lib.datasets.scenes import draw_scenes
from stego_lib.features import open_features
from stego_lib.features.pooled import Pooled
from stego_lib.features.store import Features, FeatureStore
from stego_lib.neighbors import nearest_neighbors
from stego_lib.official import approximate
from stego_lib.utils.notices import Notice


def groups(count: int = 12_000, channels: int = 16) -> Tensor:
    """Features of images in groups of about 40 that are alike."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(count // 40, channels, generator=generator)
    return centers[torch.randint(len(centers), (count,), generator=generator)] + 0.5 * torch.randn(
        count, channels, generator=generator
    )


def by_hand(features: Tensor, mean: Tensor, k: int) -> Tensor:
    """The same by one table of all cosines."""
    unit = torch.nn.functional.normalize(features - mean, dim=1)
    return (unit @ unit.T).fill_diagonal_(-2).topk(k, dim=1).indices


@pytest.fixture(scope="module")
def opened(tmp_path_factory, backbone_file) -> dict[str, Features]:
    """The same images in a full and in a compact store, and online."""
    root = tmp_path_factory.mktemp("data")
    draw_scenes(root / "scenes", train=20, val=2, size=32)
    backbone = Backbone(str(backbone_file), device="cpu", precision="float32")
    dataset = open_dataset("scenes", root, "train")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)  # random weights: ten components do not hold their features
        return {
            kind: open_features(dataset, backbone, 32, root / "features", kind)
            for kind in ("store", "compact", "online")
        }


@pytest.mark.parametrize("kind", ["store", "compact", "online"])
def test_pooled_features_are_read_in_parts(opened, kind):
    features = opened[kind]
    expected = opened["store"].rows(torch.arange(20)).mean((2, 3))
    assert_close(
        features.pooled, expected, rtol=1e-3, atol=1e-3
    )  # the store rounds to float16, they were averaged before
    assert torch.equal(features.pooled_rows(slice(3, 7)), features.pooled[3:7])
    assert torch.equal(features.pooled_rows(torch.tensor([9, 2, 9])), features.pooled[[9, 2, 9]])
    assert torch.equal(torch.cat(list(features.pooled_parts())), features.pooled)
    assert_close(features.mean, features.pooled.double().mean(0).float(), rtol=1e-6, atol=1e-7)


def test_the_parts_do_not_matter(opened, monkeypatch):
    whole = opened["store"].mean
    monkeypatch.setattr("stego_lib.features.store.PART", 3)
    assert [len(part) for part in opened["store"].pooled_parts()] == [3] * 6 + [2]
    assert_close(opened["store"].mean, whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("chunk", [1, 6, 100])
def test_neighbors_from_a_file_are_those_of_the_tensor(opened, chunk):
    features, mean = opened["store"], torch.linspace(-1, 1, 32)
    found = nearest_neighbors(Pooled(features, mean), 4, chunk)
    assert torch.equal(found, by_hand(features.pooled, mean, 4))


def test_training_finds_them_from_the_file_of_a_store(opened, tmp_path, backbone_file, monkeypatch):
    """Without ever having all pooled features in memory."""
    features = opened["store"]
    expected = by_hand(features.pooled, features.mean, 3)
    monkeypatch.setattr(FeatureStore, "pooled", property(lambda self: pytest.fail("all are read")))
    monkeypatch.setattr("stego_lib.features.store.PART", 7)
    experiment = tiny_experiment(tmp_path, backbone_file, neighbors=3)
    found = find_neighbors(features, SimpleNamespace(feature_mean=features.mean.view(1, -1, 1, 1)), experiment)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("count", [599, 12_000])
def test_approximate_neighbors_are_nearly_all_true_ones(count):
    pytest.importorskip("faiss", reason="faiss is not installed (extra `neighbors`)")
    features = groups(count)
    found = approximate.approximate_neighbors(features, 7)
    exact = by_hand(features, torch.zeros(16), 7)
    assert (exact[:, :, None] == found[:, None]).any(2).double().mean() > 0.98
    assert not (found == torch.arange(count)[:, None]).any(), "no image is its own"
    assert all(len(set(row)) == 7 for row in found[:500].tolist())
    unit = torch.nn.functional.normalize(features, dim=1)
    cosines = torch.einsum("nc,nkc->nk", unit, unit[found])
    assert (cosines.diff(dim=1) <= 1e-6).all(), "nearest first"
    assert torch.equal(approximate.approximate_neighbors(features, 7), found), "the same again"


def test_images_alone_in_their_cell_have_neighbors_too(monkeypatch):
    pytest.importorskip("faiss", reason="faiss is not installed (extra `neighbors`)")
    monkeypatch.setattr(approximate, "PROBED", 1)
    features = groups(8000)
    lonely = torch.ones(16)
    features -= 0.9 * (features @ lonely)[:, None] * lonely / lonely.square().sum()  # nothing else points that way
    features[:3] = lonely + 0.01 * torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    found = approximate.approximate_neighbors(features, 7)
    for own in range(3):
        assert set(found[own, :2].tolist()) == {0, 1, 2} - {own}
    assert all(len(set(row)) == 7 for row in found.tolist())


def test_many_images_get_approximate_ones_and_a_notice_says_so(monkeypatch):
    pytest.importorskip("faiss", reason="faiss is not installed (extra `neighbors`)")
    features = groups(2000)
    assert torch.equal(approximate.find_nearest(features, 3), nearest_neighbors(features, 3)), (
        "few: exact, and no notice"
    )
    monkeypatch.setattr(approximate, "EXACT", 1000)
    with pytest.warns(
        Notice,
        match=r"neighbors of 2,000 images are approximate \(faiss\): exact ones would take 4 times as long as those of 1,000",
    ):
        found = approximate.find_nearest(features, 3)
    assert torch.equal(found, approximate.approximate_neighbors(features, 3))


def test_without_faiss_all_pairs_are_compared_and_the_extra_is_named(monkeypatch):
    features = groups(2000)
    monkeypatch.setattr(approximate, "EXACT", 1000)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.warns(
        Notice, match=r"all pairs of 2,000 images .* pip install 'stego_lib\[neighbors\]' finds approximate ones"
    ):
        found = approximate.find_nearest(features, 3)
    assert torch.equal(found, nearest_neighbors(features, 3))
