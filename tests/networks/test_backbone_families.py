"""ViTs of every family, each built small and with random weights, against timm's own forward pass."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from stego_lib import Backbone, StegoError
from stego_lib.networks.dino import DinoViT

EXACT = dict(device="cpu", precision="float32")
SMALL = dict(embed_dim=48, depth=3, num_heads=4)
# Family -> timm's name, and what makes it small; each keeps the family's own tokens, positions and norms.
FAMILIES = {
    "DINO": ("vit_small_patch8_224.dino", SMALL | dict(img_size=64)),
    "DINOv2": ("vit_small_patch14_dinov2.lvd142m", SMALL | dict(img_size=70)),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2.lvd142m", SMALL | dict(img_size=70)),
    "DINOv3": ("vit_small_patch16_dinov3.lvd1689m", SMALL | dict(img_size=64)),
    "DINOv3 with biases": ("vit_small_patch16_dinov3_qkvb.lvd1689m", SMALL | dict(img_size=64)),
    "MAE": ("vit_base_patch16_224.mae", SMALL | dict(img_size=64)),
    "CLIP": ("vit_base_patch16_clip_224.openai", SMALL | dict(img_size=64)),
    "EVA-02": ("eva02_tiny_patch14_224.mim_in22k", SMALL | dict(img_size=70)),
    "EVA-02 with keys apart": ("eva02_base_patch14_224.mim_in22k", SMALL | dict(img_size=70)),
}
# One family for each kind of prefix tokens, positions and attention.
KINDS = ["DINO", "DINOv2 with registers", "DINOv3 with biases", "MAE", "EVA-02 with keys apart"]


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    """timm builds small networks with random weights, large enough that features differ from place to place."""
    small, create_model = dict(FAMILIES.values()), timm.create_model

    def build(name, pretrained=False, **options):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            vit = create_model(name, pretrained=False, **options, **small.get(name, {}))
            vit.load_state_dict({key: value + 0.2 * torch.randn_like(value) for key, value in vit.state_dict().items()})
        return vit.eval()

    monkeypatch.setattr(timm, "create_model", build)


def images(backbone: Backbone, height: int = 4, width: int = 6) -> torch.Tensor:
    shape = (2, 3, height * backbone.patch, width * backbone.patch)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def open_family(family: str, **options) -> Backbone:
    return Backbone(FAMILIES[family][0], **EXACT, **options)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_features_are_the_patch_tokens_and_no_others(family):
    backbone = open_family(family)
    batch = images(backbone)
    tokens = backbone.vit.forward_features(backbone.normalize(batch))
    prefix = tokens.shape[1] - 4 * 6
    assert prefix == {"DINOv2 with registers": 5, "DINOv3": 5, "DINOv3 with biases": 5}.get(family, 1)
    expected = tokens[:, prefix:].transpose(1, 2).unflatten(2, (4, 6))
    assert_close(backbone(batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", KINDS)
@torch.inference_mode()
def test_an_earlier_block_is_the_last_of_a_shorter_network(family):
    earlier, shorter = open_family(family, block=-2), open_family(family).vit
    batch = images(earlier)
    shorter.blocks = shorter.blocks[:2]
    expected = shorter.forward_features(earlier.normalize(batch))[:, shorter.num_prefix_tokens :]
    assert_close(earlier(batch), expected.transpose(1, 2).unflatten(2, (4, 6)), rtol=1e-4, atol=1e-4)
    assert torch.equal(open_family(family, block=1)(batch), earlier(batch))


@pytest.mark.parametrize("family", KINDS[:-1])
@torch.inference_mode()
def test_keys_are_those_that_the_attention_multiplies(family, monkeypatch):
    """The keys are caught where the attention multiplies them, before rotary positions are applied."""
    backbone = open_family(family, keys=True, block=1)
    attention, tokens, caught = backbone.vit.blocks[1].attn, [], []
    batch = images(backbone)
    with attention.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0])):
        backbone.vit.forward_features(backbone.normalize(batch))

    def attend(q, k, v, **options):
        caught.append(k)
        return torch.zeros_like(v)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        attention.fused_attn = True
        attention(tokens[0])
    keys = caught[0][:, :, backbone.vit.num_prefix_tokens :]  # (B, heads, positions, channels of a head)
    expected = torch.cat([keys[:, h].transpose(1, 2) for h in range(4)], 1).unflatten(2, (4, 6))
    assert expected.shape == (2, 48, 4, 6)
    assert_close(backbone(batch), expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_published_keys_assume_six_heads():
    right, wrong = open_family("MAE", keys=True), open_family("MAE", keys=True, published=True)
    batch = images(right)
    keys = right(batch).unflatten(1, (4, 12)).flatten(3).transpose(2, 3)  # (B, heads, positions, channels of a head)
    naive = torch.stack([keys.reshape(2, 6, -1)[:, h].reshape(2, 24, 8) for h in range(6)], 1)
    expected = naive.transpose(2, 3).reshape(2, 48, 4, 6)
    assert torch.equal(wrong(batch), expected) and not torch.allclose(wrong(batch), right(batch))
    assert wrong.fingerprint() != right.fingerprint()
    tokens = [open_family("MAE", published=flag) for flag in (False, True)]
    assert torch.equal(tokens[0](batch), tokens[1](batch)) and tokens[0].fingerprint() == tokens[1].fingerprint()


@torch.inference_mode()
def test_only_dino_resamples_positions_as_dino_does():
    for family in FAMILIES:
        assert isinstance(open_family(family).vit, DinoViT) == (family == "DINO"), family
    backbone = Backbone("dino_vits8", **EXACT)
    plain = timm.create_model(FAMILIES["DINO"][0], num_classes=0, dynamic_img_size=True)
    for size, same in ((8, True), (6, False)):
        batch = images(backbone, size, size)
        tokens = plain.forward_features(backbone.normalize(batch))[:, 1:].transpose(1, 2).unflatten(2, (size, size))
        assert torch.allclose(backbone(batch), tokens, atol=1e-4) == same


def test_whatever_changes_the_features_changes_the_fingerprint():
    options = [dict(), dict(block=-2), dict(keys=True), dict(keys=True, block=0)]
    prints = [open_family("DINO", **changes).fingerprint() for changes in options]
    other = open_family("DINO")
    other.vit.__class__ = DinoViT.__base__  # the same tensors, timm's resampling
    prints += [other.fingerprint(), open_family("MAE").fingerprint()]
    assert len(set(prints)) == len(prints)
    assert open_family("DINO", block=2).fingerprint() == prints[0], "the last block, counted from the front"


@pytest.mark.parametrize("block", [3, -4])
def test_a_block_that_does_not_exist_is_an_error(block):
    with pytest.raises(StegoError, match="3 blocks"):
        open_family("DINO", block=block)
