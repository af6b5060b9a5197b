"""Nearest neighbors against a table of all cosines."""

import pytest
import torch
from common import tiny_experiment
from torch import Tensor

from stego_lib import StegoError, open_dataset
from stego_lib.batches import find_neighbors
from stego_lib.features import open_features
from stego_lib.model import Stego
from stego_lib.neighbors import nearest_neighbors


def by_hand(features: Tensor, k: int) -> Tensor:
    unit = torch.nn.functional.normalize(features, dim=1)
    return (unit @ unit.T).fill_diagonal_(-2).topk(k, dim=1).indices


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
def test_blocks_are_compared_on_a_gpu():
    features = torch.randn(150, 16, generator=torch.Generator().manual_seed(0))
    neighbors = nearest_neighbors(features, 5, 7, device="cuda")
    assert not neighbors.is_cuda and torch.equal(neighbors, by_hand(features, 5))


@pytest.mark.parametrize("k", [0, 64, 100])
def test_more_neighbors_than_other_images_are_an_error(k):
    with pytest.raises(StegoError, match="1 to 63"):
        nearest_neighbors(torch.rand(64, 3), k)


def test_training_compares_features_minus_the_mean(scenes_root, backbone_file, backbone, tmp_path):
    features = open_features(open_dataset("scenes", scenes_root, "train"), backbone, 64, tmp_path)
    model = Stego(32, 8, 7)
    model.feature_mean.copy_(features.mean.view(1, -1, 1, 1))
    experiment = tiny_experiment(scenes_root, backbone_file, neighbors=3)
    expected = by_hand(features.rows(torch.arange(12)).mean((2, 3)) - features.mean, 3)
    assert torch.equal(find_neighbors(features, model, experiment), expected)
