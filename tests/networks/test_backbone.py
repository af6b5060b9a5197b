"""The frozen backbone: what it computes, and what identifies it."""

import pytest
import torch
from torch.testing import assert_close

from stego_lib import Backbone, StegoError
from stego_lib import backbone as backbone_module
from stego_lib.backbone import EMBEDDED

EXACT = dict(device="cpu", precision="float32")
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def test_features_are_the_last_blocks_patch_tokens_after_the_norm(backbone):
    batch = images(2, 3, 32, 48)
    tokens = backbone.vit.forward_features((batch / 255 - MEAN) / STD)[:, 1:]  # without the class token
    expected = torch.stack([tokens[:, row * 6 : row * 6 + 6].transpose(1, 2) for row in range(4)], 2)
    features = backbone(batch)
    assert features.shape == (2, 32, 4, 6) == (2, backbone.dim, *backbone.grid(32, 48))
    assert_close(features, expected)
    assert torch.equal(backbone(batch.float() / 255), features), "numbers from 0 to 1 equal bytes"
    assert_close(backbone(batch[1:]), features[1:], rtol=1e-4, atol=1e-5)


def test_the_backbone_is_frozen_and_stays_in_eval_mode(backbone):
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone(images(1, 3, 32, 32)).requires_grad
    torch.nn.Sequential(backbone).train()
    assert not any(module.training for module in backbone.modules())


def test_a_size_that_is_no_multiple_of_the_patch_is_an_error(backbone):
    with pytest.raises(StegoError, match="multiples of 8"):
        backbone(images(1, 3, 32, 36))


def test_images_are_normalized_before_they_are_rounded_to_bfloat16(backbone_file, backbone):
    half = Backbone(str(backbone_file), device="cpu", precision="bfloat16")
    batch = images(2, 3, 32, 32)
    exact = (batch / 255 - MEAN) / STD
    error = (half.normalize(batch).float() - exact).abs()
    assert half.normalize(batch).dtype == torch.bfloat16
    assert (error <= exact.abs() * 2**-8).all(), "no more than bfloat16's own rounding"
    assert half(batch).dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(half(batch), backbone(batch)).min() > 0.99
    assert half.fingerprint() != backbone.fingerprint()


def test_embedded_backbones_are_the_ones_that_records_name():
    identities = {
        "scenes_vit_tiny8": ("31e55aa470443321", "6ee34951620db4c5"),
        "photos_vit_tiny8": ("9a1ee126ec7f35b1", "bdae3ea5ca498695"),
        "photos_vit_tiny8_d6": ("309ace75660b2a26", "8c745346c817b4f9"),
    }
    assert set(EMBEDDED) == set(identities)
    for name, identity in identities.items():
        backbone = Backbone(name, **EXACT)
        assert (backbone.weights_id, backbone.fingerprint()) == identity
        assert_close(backbone.mean[0], MEAN)


def test_an_unknown_name_suggests_known_ones():
    for name, near in (("dino_vit8", "dino_vits8"), ("vit_small_patch8_224.dinoo", r"vit_small_patch8_224\.dino'")):
        with pytest.raises(StegoError, match=near):
            Backbone(name)


@pytest.mark.parametrize("device", ["cuda:63", "warp drive"])
def test_a_device_that_is_not_available_is_named(backbone_file, device):
    with pytest.raises(StegoError, match=device):
        Backbone(str(backbone_file), device=device)


def test_keys_that_do_not_divide_into_the_published_heads_are_an_error(backbone_file):
    with pytest.raises(StegoError, match="6"):
        Backbone(str(backbone_file), keys=True, published=True)


@pytest.mark.parametrize("keys", [False, True])
def test_on_a_cpu_images_are_computed_in_chunks(backbone_file, monkeypatch, keys):
    backbone, batch, sizes = Backbone(str(backbone_file), keys=keys, **EXACT), images(5, 3, 32, 32), []
    backbone.vit.patch_embed.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    whole = backbone(batch)
    for room, expected in ((2 * 4 * 32 * 16 * 4, [2, 2, 1]), (1, [1] * 5)):  # widest layer: 4 * 32 channels, 16 cells
        sizes.clear()
        monkeypatch.setattr(backbone_module, "CPU_BYTES", room)
        assert_close(backbone(batch), whole, rtol=0, atol=1e-5)
        assert sizes == expected
