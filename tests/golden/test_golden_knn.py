"""Nearest neighbors against the published code's numbers."""

import pytest
import torch
from common import golden_tensors
from torch.utils._python_dispatch import TorchDispatchMode

from stego_lib import StegoError
from stego_lib.neighbors import nearest_neighbors, shared_content

G = golden_tensors("knn")
POOLED = G["feature_maps"].mean((2, 3))


def test_neighbors_equal_the_published_ones_without_the_image_itself():
    assert torch.equal(G["nns"][:, 0], torch.arange(64)), "the published list begins with the image itself"
    assert torch.equal(nearest_neighbors(POOLED, 29), G["nns"][:, 1:])


@pytest.mark.parametrize("chunk", [1, 7, 63, 64, 1000])
def test_the_chunk_does_not_matter(chunk):
    assert torch.equal(nearest_neighbors(POOLED, 29, chunk), G["nns"][:, 1:])


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor holds that is made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tensors = made if isinstance(made, tuple | list) else [made]
        self.numbers = max([self.numbers, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return made


def test_memory_does_not_grow_with_images_times_the_chunk():
    many = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0))
    with Largest() as largest:
        found = nearest_neighbors(many, 2, chunk=128)
    assert largest.numbers <= max(many.numel(), 128 * 128)
    assert torch.equal(found, nearest_neighbors(many, 2, chunk=3000))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
def test_on_a_gpu_too():
    found = nearest_neighbors(POOLED.cuda(), 29, chunk=7)
    assert found.is_cuda and torch.equal(found.cpu(), G["nns"][:, 1:])


def test_fewer_neighbors_are_the_first_of_more():
    assert torch.equal(nearest_neighbors(POOLED, 7), G["nns"][:, 1:8])


def test_lengths_do_not_matter():
    """Cosine similarity: an image's features may be as long as they like."""
    scale = torch.linspace(0.5, 20, 64)[:, None]
    assert torch.equal(nearest_neighbors(POOLED * scale, 7), G["nns"][:, 1:8])


@pytest.mark.parametrize("k", [0, 64, 100])
def test_more_neighbors_than_there_are_is_an_error_that_says_how_many(k):
    with pytest.raises(StegoError, match=r"neighbors must be 1 to 63"):
        nearest_neighbors(POOLED, k)


def test_a_image_twice_is_its_own_neighbor_only_as_the_other_copy():
    found = nearest_neighbors(torch.cat([POOLED[:5], POOLED[:5]]), 3)
    assert (found[:, 0] == (torch.arange(10) + 5) % 10).all()
    assert (found != torch.arange(10)[:, None]).all()


def test_shared_content_is_the_overlap_of_two_histograms():
    shares = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    shares = shares / shares.sum(1, keepdim=True)
    shares[5] = torch.tensor([0.0, 0, 0, 1])
    shares[4] = torch.tensor([1.0, 0, 0, 0])
    partners = torch.tensor([[1, 0], [2, 3], [0, 1], [5, 4], [5, 4], [0, 4]])
    found = shared_content(shares, partners)
    for i, row in enumerate(partners.tolist()):
        for j, other in enumerate(row):
            expected = sum(min(a, b) for a, b in zip(shares[i].tolist(), shares[other].tolist(), strict=True))
            assert found[i, j].item() == pytest.approx(expected, abs=1e-6)
    assert found[4].tolist() == [0.0, 1.0] and found[0, 1].item() == pytest.approx(1), "nothing in common; the same"
