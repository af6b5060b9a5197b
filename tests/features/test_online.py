"""Features computed when they are needed: the same training as from the store, and rows shared by processes."""

import copy

import numpy as np
import pytest
import torch
from common import tiny_experiment
from torch.testing import assert_close

from stego_lib import Backbone, StegoError, open_dataset, train
from stego_lib.features import open_features
from stego_lib.features.store import Reader
from stego_lib.utils import devices


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


class Elsewhere:
    """Rows on another device, of which nothing but a copy can be taken: torch computes only what lies on one device."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows

    def half(self) -> "Elsewhere":
        return Elsewhere(self.rows.half())

    def to(self, device: torch.device | str) -> torch.Tensor:
        return self.rows.to(device)


@pytest.mark.parametrize("rows", [[5, 2, 9, 2, 11], [4, 4]], ids=["many", "fewer than processes"])
@pytest.mark.parametrize("rank", [0, 2])
def test_processes_share_rows(online, monkeypatch, rows, rank):
    """Three processes, of which this one is real: `gather` returns what the others would send, on another device."""
    unique = torch.tensor(rows).unique()

    def gather(own):
        share = unique[rank::3]
        expected = online.rows(share) if len(share) else torch.empty(0, 32, 8, 8)
        assert_close(own, expected, rtol=2e-3, atol=2e-3) and own.device == online.source.backbone.device
        return Elsewhere(online.rows(unique))

    monkeypatch.setattr(devices, "share", lambda items: items[rank::3])
    monkeypatch.setattr(devices, "gather", gather)
    monkeypatch.setattr(devices, "count", lambda: 3)
    shared = copy.copy(online)
    shared.share()
    assert_close(shared.rows(torch.tensor(rows)), online.rows(torch.tensor(rows)), rtol=2e-3, atol=2e-3)
    assert shared.rows(torch.tensor(rows), "meta").device.type == "meta", "the device that asked"


def test_an_unreadable_row_raises_when_it_is_needed():
    def read(row: int) -> int:
        if row == 2:
            raise StegoError("image 2")
        return 10 * row

    reader = Reader(read, pieces=1)
    reader.prefetch([0, 1, 2, 3])
    assert reader.take([3, 0]) == [30, 0]
    with pytest.raises(StegoError, match="image 2"):
        reader.take([1, 2])
    assert reader.take([1, 1]) == [10, 10]
    reader.close()
