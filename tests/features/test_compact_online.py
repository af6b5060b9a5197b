"""Compact stores and features computed when they are needed: error, size, sharing, and training as from full stores."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import tiny_experiment
from torch.testing import assert_close

from stego_lib import Backbone, evaluate, open_dataset, train
from stego_lib.features import compact, open_features
from stego_lib.features.compact import Components, correspondence_error, fit_components
from stego_lib.utils import devices

pytestmark = pytest.mark.usefixtures("few_samples")


@pytest.fixture(autouse=True)
def loose(monkeypatch):
    """Random weights spread features over more components than trained ones; what is left out is more."""
    monkeypatch.setattr(compact, "MAX_ERROR", 0.05)


def opened(scenes_root, backbone, root, store="compact"):
    return open_features(open_dataset("scenes", scenes_root, "train"), backbone, 64, root, store)


def smooth_maps(images: int = 6, channels: int = 48, rank: int = 12, side: int = 10) -> torch.Tensor:
    """Features of few directions of falling size, and a little of all others."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(images, rank, side, side, generator=generator) * (0.6 ** torch.arange(rank))[:, None, None]
    basis = torch.linalg.qr(torch.randn(channels, rank, generator=generator)).Q
    noise = torch.randn(images, channels, side, side, generator=generator)
    return torch.einsum("cp,bphw->bchw", basis, codes) + 1 + 0.003 * noise


def test_codes_are_coordinates_in_the_basis_rounded_to_8_bits():
    maps, generator = smooth_maps(), torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(48, 7, generator=generator)).Q.T.contiguous()
    components = Components(torch.rand(48, generator=generator), basis)
    codes, unit = components.encode(maps)
    assert codes.dtype == torch.int8 and codes.shape == (6, 7, 10, 10) and unit.shape == (6, 7)
    for image in range(6):
        for number in range(7):
            exact = (maps[image] - components.mean[:, None, None]).mul(basis[number, :, None, None]).sum(0)
            step = unit[image, number].item()
            assert codes[image, number].abs().max() == 127
            assert_close(codes[image, number] * step, exact, rtol=0, atol=0.51 * step)
    terms = [(codes[2, n] * unit[2, n])[None] * basis[n, :, None, None] for n in range(7)]
    expected = components.mean[:, None, None] + sum(terms)
    assert_close(components.decode(codes, unit)[2], expected, rtol=1e-4, atol=1e-5)


def error_by_hand(first, second) -> float:
    """Mean difference of the cosines of all pairs of cells."""
    cells = [F.normalize(maps.movedim(1, -1).flatten(0, 2), dim=1) for maps in (first, second)]
    return (cells[0] @ cells[0].T - cells[1] @ cells[1].T).abs().mean().item()


@pytest.mark.parametrize("bound", [0.02, 0.004])
def test_as_few_components_as_the_error_allows(monkeypatch, bound):
    monkeypatch.setattr(compact, "MAX_ERROR", bound)
    maps = smooth_maps()
    components = fit_components(maps)
    decoded = components.decode(*components.encode(maps))
    assert components.error <= bound and len(components.basis) <= 16
    assert error_by_hand(maps[:2], decoded[:2]) == pytest.approx(components.error, rel=0.3)
    fewer = Components(components.mean, components.basis[:-1])
    assert correspondence_error(maps, fewer.decode(*fewer.encode(maps))) > 0.9 * bound, "one less is too few"


def test_rows_are_close_to_the_full_ones_in_a_sixth_of_the_room(scenes_root, backbone, tmp_path):
    full, small = (opened(scenes_root, backbone, tmp_path, store) for store in ("full", "compact"))
    assert small.kind == "compact" and small.shape == full.shape and small.fingerprints == full.fingerprints
    rows = torch.tensor([3, 0, 3, 11])
    assert correspondence_error(full.rows(rows), small.rows(rows)) < 0.08  # 10 of 32 components of random weights
    size = [next(features.folder.rglob("features.npy")).stat().st_size for features in (small, full)]
    assert size[0] <= size[1] / 6 + 128
    assert not list(small.folder.rglob("images.npy")) and not list(small.folder.rglob("labels.npy"))
    for name in ("label_rows", "image_rows"):
        assert torch.equal(getattr(small, name)(rows), getattr(full, name)(rows)), "read from the files"
    assert_close(small.pooled, full.pooled, rtol=1e-4, atol=1e-4)


def test_a_run_from_a_compact_store_says_so(scenes_root, backbone_file, tmp_path):
    experiment = tiny_experiment(scenes_root, backbone_file, feature_store="compact", probes="after")
    run = train(experiment, runs_dir=tmp_path)
    assert run.provenance.store == "compact" and evaluate(run)["provenance"]["store"] == "compact"
    assert all("compact" in path.name for path in (tmp_path / "features").glob("scenes-*"))
    usual = train(experiment.but(feature_store="full"), runs_dir=tmp_path / "usual")
    assert usual.log["loss"].iloc[0] == pytest.approx(run.log["loss"].iloc[0], abs=0.05)


@pytest.fixture(scope="module")
def online(scenes_root, backbone, tmp_path_factory):
    dataset = open_dataset("scenes", scenes_root, "train")
    return open_features(dataset, backbone, 64, tmp_path_factory.mktemp("features"), "online")


def test_an_image_goes_through_the_backbone_once_a_batch(online, monkeypatch):
    """Also when it is both an image and a neighbor, and read beforehand."""
    seen, forward = [], Backbone.forward
    monkeypatch.setattr(Backbone, "forward", lambda self, images: (seen.append(len(images)), forward(self, images))[1])
    rows = torch.tensor([3, 1, 3, 1, 7])
    online.prefetch(rows)
    features = online.rows(rows)
    assert seen == [3] and torch.equal(features[0], features[2]) and not torch.equal(features[0], features[1])


def test_only_mean_features_are_kept(online):
    assert {path.name for path in online.folder.rglob("*.npy")} == {"pooled.npy"}


@pytest.mark.parametrize("changes", [{}, dict(crop="five", train_size=32, subtract_mean=True)], ids=str)
def test_training_online_is_training_from_the_store(scenes_root, backbone_file, tmp_path, changes):
    experiment = tiny_experiment(scenes_root, backbone_file, **changes)
    online, stored = (train(experiment.but(feature_store=kind), runs_dir=tmp_path) for kind in ("online", "full"))
    np.testing.assert_allclose(online.log.to_numpy(), stored.log.to_numpy(), atol=2e-3)
    for name, value in online.model.state_dict().items():
        assert_close(value, stored.model.state_dict()[name], rtol=0, atol=1e-2)
    assert (online.provenance.store, stored.provenance.store) == ("online", "full")
    assert online.provenance.images == stored.provenance.images


@pytest.mark.parametrize("rows", [[5, 2, 9, 2, 11], [4, 4]], ids=["many", "fewer than processes"])
@pytest.mark.parametrize("rank", [0, 2])
def test_processes_share_rows(online, monkeypatch, rows, rank):
    """Three processes, of which this one is real: `gather` returns what the others would send."""
    unique = torch.tensor(rows).unique()

    def gather(own):
        share = unique[rank::3]
        expected = online.rows(share) if len(share) else torch.empty(0, 32, 8, 8)
        assert_close(own, expected, rtol=2e-3, atol=2e-3)
        return online.rows(unique)

    monkeypatch.setattr(devices, "share", lambda items: items[rank::3])
    monkeypatch.setattr(devices, "gather", gather)
    monkeypatch.setattr(devices, "count", lambda: 3)
    shared = copy.copy(online)
    shared.share()
    assert_close(shared.rows(torch.tensor(rows)), online.rows(torch.tensor(rows)), rtol=2e-3, atol=2e-3)
    assert shared.rows(torch.tensor(rows), "meta").device.type == "meta", "the device that asked"
