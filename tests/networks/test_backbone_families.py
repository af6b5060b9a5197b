"""Backbones of every family, each built small and with random weights: nothing is fetched."""

import argparse
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from families import FAMILIES
from torch.testing import assert_close

from stego_lib import Backbone, StegoError
from stego_lib.networks.dino import DinoViT

EXACT = dict(device="cpu", precision="float32")


@pytest.fixture(autouse=True)
def no_hub(small_families):
    """Every test here builds small networks."""


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
    assert backbone(batch).shape == (2, backbone.dim, 4, 6) and backbone.grid(*batch.shape[-2:]) == (4, 6)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_an_earlier_block_is_the_last_of_a_shorter_network(family):
    backbone = open_family(family)
    batch = images(backbone)
    shorter = open_family(family)
    shorter.vit.blocks = shorter.vit.blocks[:2]
    shorter.block = 1
    assert_close(open_family(family, block=-2)(batch), shorter(batch), rtol=1e-4, atol=1e-4)
    assert torch.equal(open_family(family, block=1)(batch), open_family(family, block=-2)(batch))
    assert not torch.allclose(shorter(batch), backbone(batch), atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_keys_are_those_that_the_attention_multiplies(family, monkeypatch):
    """What the attention hands to its product is caught on the way (asked without rotary positions, which come later)."""
    backbone = open_family(family, features="KK", block=1)
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
    right, wrong = open_family("MAE", features="KK"), open_family("MAE", features="KK", published=True)
    batch = images(right)
    keys = right(batch).unflatten(1, (4, 12)).flatten(3).transpose(2, 3)  # (B, heads, positions, channels of a head)
    naive = torch.stack([keys.reshape(2, 6, -1)[:, h].reshape(2, 24, 8) for h in range(6)], 1)
    expected = naive.transpose(2, 3).reshape(2, 48, 4, 6)
    assert torch.equal(wrong(batch), expected) and not torch.allclose(wrong(batch), right(batch))
    assert wrong.fingerprint() != right.fingerprint()
    tokens = [open_family("MAE", published=flag) for flag in (False, True)]
    assert torch.equal(tokens[0](batch), tokens[1](batch)) and tokens[0].fingerprint() == tokens[1].fingerprint()


def test_only_dino_resamples_positions_as_dino_does():
    for family in FAMILIES:
        assert isinstance(open_family(family).vit, DinoViT) == (family == "DINO"), family
    short = Backbone("dino_vits8", **EXACT)
    assert isinstance(short.vit, DinoViT) and short.patch == 8


@torch.inference_mode()
def test_dino_is_timms_network_at_its_own_size_and_another_at_others():
    backbone = open_family("DINO")
    plain = timm.create_model(FAMILIES["DINO"][0], num_classes=0, dynamic_img_size=True)
    for size, same in ((8, True), (6, False)):
        batch = images(backbone, size, size)
        tokens = plain.forward_features(backbone.normalize(batch))[:, 1:].transpose(1, 2).unflatten(2, (size, size))
        assert torch.allclose(backbone(batch), tokens, atol=1e-4) == same


@torch.inference_mode()
def test_whatever_changes_the_features_changes_the_fingerprint():
    made = [
        open_family("DINO"),
        open_family("DINO", block=-2),
        open_family("DINO", features="KK"),
        open_family("DINO", features="KK", block=0),
        open_family("MAE"),
    ]
    other = open_family("DINO")
    other.vit.__class__ = DinoViT.__base__  # the same tensors, timm's resampling
    prints = [backbone.fingerprint() for backbone in [*made, other]]
    assert len(set(prints)) == len(prints)
    assert open_family("DINO", block=2).fingerprint() == prints[0], "the last block, counted from the front"


@pytest.mark.parametrize("block", [3, -4, 100])
def test_a_block_that_is_not_there_is_an_error(block):
    with pytest.raises(StegoError, match=rf"3 blocks: block must be -3 to 2, not {block}"):
        open_family("DINO", block=block)


def test_a_network_without_keys_says_so(monkeypatch):
    vit = open_family("MAE").vit
    vit.blocks[2].attn = torch.nn.Identity()
    monkeypatch.setattr("stego_lib.backbone.load_network", lambda *_: (vit, dict(mean=(0, 0, 0), std=(1, 1, 1))))
    with pytest.raises(StegoError, match="no keys to read; use features='feat'"):
        open_family("MAE", features="KK")


def test_an_unknown_tag_or_name_lists_the_nearest():
    with pytest.raises(StegoError, match=r"did you mean 'vit_small_patch8_224\.dino' or '.*' or '"):
        Backbone("vit_small_patch8_224.dinoo")


# ---------------------------------------------------------------------------------------------- DINO's files


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """A DINO of 128 channels, which are two heads of 64."""
    vit = timm.create_model("vit_small_patch16_224", embed_dim=128, depth=2, num_heads=2, img_size=64, num_classes=0)
    return vit.state_dict()


def test_the_plain_file_gives_the_network_of_its_tensors(weights, tmp_path):
    torch.save(weights, tmp_path / "dino.pth")
    backbone = Backbone(str(tmp_path / "dino.pth"), **EXACT)
    assert (backbone.dim, backbone.patch, len(backbone.vit.blocks), backbone.vit.blocks[0].attn.num_heads) == (
        128,
        16,
        2,
        2,
    )
    assert all(torch.equal(value, weights[name]) for name, value in backbone.vit.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.backbone."])
def test_a_full_checkpoint_gives_its_teacher(weights, tmp_path, prefix):
    teacher = {prefix + name: value for name, value in weights.items()} | {"module.head.mlp.0.weight": torch.zeros(3)}
    student = {name: value + 1 for name, value in teacher.items()}
    stored = dict(student=student, teacher=teacher, epoch=3, args=argparse.Namespace(arch="vit_small"))
    torch.save(stored, tmp_path / "full.pth")
    torch.save(weights, tmp_path / "plain.pth")
    full, plain = (Backbone(str(tmp_path / f"{name}.pth"), **EXACT) for name in ("full", "plain"))
    assert full.fingerprint() == plain.fingerprint()


def changed(weights, **changes):
    return {name: value for name, value in (weights | changes).items() if value is not None}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pos_embed": None}, "pos_embed"),
        ({"blocks.1.norm1.bias": None}, r"blocks\.1\.norm1\.bias is missing"),
        ({"blocks.0.attn.gate.weight": torch.zeros(2)}, r"blocks\.0\.attn\.gate\.weight is unknown"),
        ({"norm.weight": torch.zeros(7)}, r"norm\.weight is \(7,\), not \(128,\)"),
        ({"pos_embed": torch.zeros(1, 12, 128)}, r"pos_embed is \(1, 12, 128\)"),
    ],
    ids=["no positions", "a layer missing", "a layer too many", "a wrong shape", "no square of positions"],
)
def test_a_file_of_another_network_is_named_and_explained(weights, tmp_path, change, message):
    torch.save(changed(weights, **change), tmp_path / "dino.pth")
    with pytest.raises(StegoError, match=rf"dino\.pth holds no DINO ViT: .*{message}"):
        Backbone(str(tmp_path / "dino.pth"))


def test_heads_that_cannot_be_guessed_must_be_given(tmp_path):
    vit = timm.create_model("vit_small_patch16_224", embed_dim=96, depth=1, num_heads=6, img_size=64, num_classes=0)
    torch.save(vit.state_dict(), tmp_path / "dino.pth")
    with pytest.raises(StegoError, match=r"96 channels wide.*heads=N"):
        Backbone(str(tmp_path / "dino.pth"))
    assert Backbone(str(tmp_path / "dino.pth"), heads=6, **EXACT).vit.blocks[0].attn.num_heads == 6
    with pytest.raises(StegoError, match="cannot have 5 attention heads"):
        Backbone(str(tmp_path / "dino.pth"), heads=5)


@pytest.mark.parametrize("content", [b"", b"no weights", None], ids=["empty", "text", "missing"])
def test_a_broken_or_missing_file_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "dino.pth").write_bytes(content)
    with pytest.raises(StegoError, match=r"dino\.pth (cannot be read|does not exist)"):
        Backbone(str(tmp_path / "dino.pth"))


def test_a_file_that_holds_something_else(tmp_path):
    for stored in ({"epoch": 3}, [1, 2], {"teacher": {"a": 1}}):
        torch.save(stored, tmp_path / "dino.pth")
        with pytest.raises(StegoError, match="must be a dictionary of tensors"):
            Backbone(str(tmp_path / "dino.pth"))


def test_code_in_a_file_is_refused(tmp_path):
    torch.save({"teacher": SimpleNamespace()}, tmp_path / "dino.pth")
    with pytest.raises(StegoError, match=r"dino\.pth cannot be read"):
        Backbone(str(tmp_path / "dino.pth"))
