"""Segmentation head and backbone against the published code's numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from common import SHARED, golden_tensors
from torch.testing import assert_close

from stego_lib import Backbone
from stego_lib.model import SegmentationHead
from stego_lib.networks.dino import resample_positions

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


CLOSE = dict(rtol=0, atol=2e-5)
SIZES = ["64x64", "64x96", "96x64", "224x224"]


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    """All golden arrays of the head, from the folder beside the project."""
    path = SHARED / "golden" / "head.npz"
    if not path.is_file():
        pytest.skip("shared/golden/head.npz is not beside the project")
    with np.load(path) as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


def write_pth(path: Path, arrays: dict[str, torch.Tensor]) -> str:
    """The golden ViT as one of DINO's files."""
    torch.save({key.removeprefix("vit."): value for key, value in arrays.items() if key.startswith("vit.")}, path)
    return str(path)


def features(path: str, arrays: dict[str, torch.Tensor], size: str, **options) -> torch.Tensor:
    """Features of the golden images, which are normalized already, by the project's backbone."""
    backbone = Backbone(path, heads=6, device="cpu", precision="float32", **options)
    backbone.mean.zero_(), backbone.std.fill_(1)
    images = arrays[f"img_{size}"]
    return backbone(images.repeat_interleave(4, 2).repeat_interleave(4, 3) if size == "224x224" else images)


@pytest.fixture(scope="module")
def kept_pth(tmp_path_factory) -> str:
    return write_pth(tmp_path_factory.mktemp("kept") / "dino.pth", G)


@pytest.fixture(scope="module")
def whole_pth(tmp_path_factory, whole) -> str:
    return write_pth(tmp_path_factory.mktemp("whole") / "dino.pth", whole)


def test_features_of_the_second_last_block_equal_the_published_ones(kept_pth):
    assert_close(features(kept_pth, G, "64x64", block=-2), G["feat_feats_64x64_n2"], **CLOSE)
    assert_close(features(kept_pth, G, "64x64", block=1), G["feat_feats_64x64_n2"], **CLOSE)


@pytest.mark.parametrize("kind", ["feat", "KK"])
@torch.inference_mode()
def test_features_and_keys_of_the_last_block_and_their_codes_equal_the_published_ones(kept_pth, kind):
    found = features(kept_pth, G, "64x64", keys=kind == "KK")
    assert_close(found, G[f"{kind}_feats_64x64"], **CLOSE)
    assert_close(head("nonlinear")(found), G[f"{kind}_code_64x64"], **CLOSE)


def test_position_embeddings_are_resampled_as_published_here_too():
    assert_close(resample_positions(G["vit.pos_embed"], 8, 12), G["posenc_64x96"], **CLOSE)
    assert torch.equal(resample_positions(G["vit.pos_embed"], 28, 28), G["vit.pos_embed"]), "its own grid is left alone"


@pytest.mark.parametrize("size", SIZES[:3])
def test_position_embeddings_of_every_size(whole, size):
    height, width = (int(side) // 8 for side in size.split("x"))
    assert_close(resample_positions(whole["vit.pos_embed"], height, width), whole[f"posenc_{size}"], **CLOSE)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["feat", "KK"])
@torch.inference_mode()
def test_features_and_codes_of_every_size(whole, whole_pth, kind, size):
    found = features(whole_pth, whole, size, keys=kind == "KK")
    if size == "224x224":
        assert_close(found[:, :, ::4, ::4], whole[f"{kind}_feats_224x224_every4th"], **CLOSE)
    else:
        assert_close(found, whole[f"{kind}_feats_{size}"], **CLOSE)
    assert_close(head("nonlinear")(found), whole[f"{kind}_code_{size}"], **CLOSE)


@torch.inference_mode()
def test_the_linear_branch_alone_and_the_class_token(whole, whole_pth):
    found = features(whole_pth, whole, "64x64")
    assert_close(head("linear")(found), whole["feat_code_64x64_projection_linear"], **CLOSE)
    vit = Backbone(whole_pth, heads=6, device="cpu", precision="float32").vit
    assert_close(vit.forward_features(whole["img_64x64"])[:, 0], whole["cls_feat_64x64"], **CLOSE)
