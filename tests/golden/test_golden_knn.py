"""Nearest neighbors against the published code's numbers."""

import pytest
import torch
from common import golden_tensors

from stego_lib.neighbors import nearest_neighbors

G = golden_tensors("knn")
POOLED = G["feature_maps"].mean((2, 3))


@pytest.mark.parametrize("chunk", [7, 64, 4096])
def test_neighbors_equal_the_published_ones_without_the_image_itself(chunk):
    assert torch.equal(G["nns"][:, 0], torch.arange(64)), "the published list begins with the image itself"
    assert torch.equal(nearest_neighbors(POOLED, 29, chunk), G["nns"][:, 1:])


def test_the_length_of_features_does_not_matter():
    scale = torch.linspace(0.5, 20, 64)[:, None]
    assert torch.equal(nearest_neighbors(POOLED * scale, 7), G["nns"][:, 1:8])
