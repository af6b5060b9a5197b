"""The segmentation head against the published code's numbers."""

import pytest
import torch
from common import golden_tensors
from torch.testing import assert_close

from stego_lib.model import SegmentationHead

G = golden_tensors("head")
# The published names of the layers -> ours.
LAYERS = {"cluster1.0": "linear", "cluster2.0": "nonlinear.0", "cluster2.2": "nonlinear.2"}


def head(kind: str, dropout: float = 0.1) -> SegmentationHead:
    """A head with the golden weights, in eval mode."""
    made = SegmentationHead(96, 10, kind, dropout)
    weights = {
        f"{ours}.{part}": G[f"head.{theirs}.{part}"] for theirs, ours in LAYERS.items() for part in ("weight", "bias")
    }
    made.load_state_dict({key: value for key, value in weights.items() if key in made.state_dict()})
    return made.eval()


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
@torch.inference_mode()
def test_codes_equal_the_published_ones(kind):
    assert_close(head(kind)(G["head_in"]), G[f"head_out_{kind}"], rtol=1e-4, atol=2e-5)


def test_head_none_passes_the_features_on():
    made = SegmentationHead(96, 10, "none")
    assert made.code_dim == 96 and not list(made.parameters())
    assert torch.equal(made(G["head_in"]), G["head_in"])


@torch.inference_mode()
def test_dropout_drops_whole_channels_of_the_branches_while_training_alone():
    torch.manual_seed(0)
    made = head("nonlinear", dropout=0.5)
    features = G["head_in"]
    assert torch.equal(made(features), made(features)), "eval mode is deterministic"
    made.train()
    assert not torch.equal(made(features), made(features))
    dropped = made.dropout(torch.ones(2, 96, 7, 9)).flatten(2)
    assert ((dropped == 0).all(2) | (dropped == 2).all(2)).all(), "a channel goes as a whole, the others are scaled up"
    assert (dropped == 0).any() and (dropped == 2).any()
