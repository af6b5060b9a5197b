"""Weight files: the layouts that are read, and files that are broken, hostile or of another network."""

import argparse
import json
import os
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import timm
import torch
from common import TIMM_ARGUMENTS, write_backbone
from released import tensors, write_ckpt
from safetensors.torch import save_file
from torch.testing import assert_close

from stego_lib import Backbone, StegoError

EXACT = dict(device="cpu", precision="float32")


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """A DINO of 128 channels, which are two heads of 64."""
    vit = timm.create_model("vit_small_patch16_224", embed_dim=128, depth=2, num_heads=2, img_size=64, num_classes=0)
    return vit.state_dict()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_the_network_of_a_pth_file_is_inferred_from_its_tensors(weights, tmp_path, zipped):
    torch.save(weights, tmp_path / "dino.pth", _use_new_zipfile_serialization=zipped)
    backbone = Backbone(str(tmp_path / "dino.pth"), **EXACT)
    assert (backbone.dim, backbone.patch, len(backbone.vit.blocks)) == (128, 16, 2)
    assert backbone.vit.blocks[0].attn.num_heads == 2
    assert all(torch.equal(value, weights[name]) for name, value in backbone.vit.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "module.backbone."])
def test_a_checkpoint_of_dinos_training_gives_its_teacher(weights, tmp_path, prefix):
    teacher = {prefix + name: value for name, value in weights.items()} | {"module.head.mlp.0.weight": torch.zeros(3)}
    student = {name: value + 1 for name, value in teacher.items()}
    stored = dict(student=student, teacher=teacher, epoch=3, args=argparse.Namespace(arch="vit_small"))
    torch.save(stored, tmp_path / "full.pth")
    torch.save(weights, tmp_path / "plain.pth")
    full, plain = (Backbone(str(tmp_path / f"{name}.pth"), **EXACT) for name in ("full", "plain"))
    assert full.fingerprint() == plain.fingerprint()


@pytest.mark.parametrize(
    "changes",
    [
        {"pos_embed": None},
        {"blocks.1.norm1.bias": None},
        {"blocks.0.attn.gate.weight": torch.zeros(2)},
        {"norm.weight": torch.zeros(7)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_missing_unknown_or_misshapen_tensor_is_named(weights, tmp_path, changes):
    torch.save({k: v for k, v in (weights | changes).items() if v is not None}, tmp_path / "dino.pth")
    (name,) = changes
    with pytest.raises(StegoError, match=rf"dino\.pth.*{name}"):
        Backbone(str(tmp_path / "dino.pth"))


def test_heads_that_cannot_be_inferred_must_be_given(tmp_path):
    vit = timm.create_model("vit_small_patch16_224", embed_dim=96, depth=1, num_heads=6, img_size=64, num_classes=0)
    torch.save(vit.state_dict(), tmp_path / "dino.pth")
    for heads in (None, 5):
        with pytest.raises(StegoError, match="heads"):
            Backbone(str(tmp_path / "dino.pth"), heads=heads)
    assert Backbone(str(tmp_path / "dino.pth"), heads=6, **EXACT).vit.blocks[0].attn.num_heads == 6


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("kind", ["missing", "text", "cut short", "other content"])
def test_a_broken_file_is_named(tmp_path, weights, suffix, kind):
    path = tmp_path / f"broken{suffix}"
    if kind == "text":
        path.write_text("not weights")
    elif kind == "other content":
        torch.save([1, 2], path)
    elif kind == "cut short":
        write = {".pth": lambda: torch.save(weights, path), ".ckpt": lambda: write_ckpt(path, tensors())}
        write.get(suffix, lambda: write_backbone(path))()
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(StegoError, match="broken"):
        Backbone(str(path))


class Call:
    """Pickles as a call of any function, whose result may be called in turn."""

    def __init__(self, function: Any, *arguments: Any):
        self.what = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.what

    def __call__(self) -> None:
        """Pickle requires it."""


def attacks(marker: Path) -> dict[str, object]:
    """Objects whose unpickling would create the file `marker`, by mechanism."""
    touch = f"touch '{marker}'"
    return {
        "shell": Call(os.system, touch),
        "eval": Call(eval, f"open({str(marker)!r}, 'w')"),
        "getattr": Call(Call(getattr, Call(__import__, "os"), "system"), touch),
        "foreign class": PurePosixPath("x"),
    }


@pytest.mark.parametrize("name", attacks(Path("x")))
@pytest.mark.parametrize("layout", ["zip", "legacy", "bare pickle"])
@pytest.mark.parametrize("suffix", [".pth", ".ckpt"])
def test_a_pickle_cannot_run_code(tmp_path, weights, name, layout, suffix):
    marker, path = tmp_path / "ran", tmp_path / f"evil{suffix}"
    evil = attacks(marker)[name]
    stored = (weights if suffix == ".pth" else {"state_dict": tensors()}) | {"evil": evil}
    if layout == "bare pickle":
        path.write_bytes(pickle.dumps(stored))
    else:
        torch.save(stored, path, _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(StegoError, match="evil"):
        Backbone(str(path))
    assert not marker.exists()
    if name != "foreign class":
        pickle.loads(pickle.dumps(evil))
        assert marker.exists(), "the attack works where nothing prevents it"


@pytest.mark.parametrize(
    "arguments",
    [
        {"architecture": "hf-hub:evil/model"},
        {"checkpoint_path": "other.pth"},
        {"pretrained": True, "pretrained_cfg": {"file": "other.pth"}},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_metadata_cannot_make_timm_load_other_files(tmp_path, arguments):
    write_backbone(tmp_path / "evil.safetensors", metadata={"timm": json.dumps(TIMM_ARGUMENTS | arguments)})
    with pytest.raises(StegoError, match="evil"):
        Backbone(str(tmp_path / "evil.safetensors"))


@pytest.mark.parametrize(
    "metadata", [{}, {"timm": "{}"}, {"timm": "{"}, {"timm": '{"architecture": "no_such_net"}'}], ids=str
)
def test_metadata_that_describe_no_network_are_an_error_with_the_remedy(tmp_path, metadata):
    path = write_backbone(tmp_path / "vit.safetensors", metadata=metadata)
    with pytest.raises(StegoError, match=r"vit\.safetensors.*NAME@FILE"):
        Backbone(str(path))


@pytest.mark.parametrize(
    "arguments, mean",
    [
        (dict(architecture="vit_tiny_patch16_224"), 0.5),
        (dict(architecture="vit_tiny_patch16_224", depth=1), 0.485),  # not the network that timm has weights for
        (dict(architecture="vit_tiny_patch16_224.augreg_in21k", depth=1), 0.5),
        (dict(architecture="vit_tiny_patch16_224", depth=1, mean=[0.3, 0.2, 0.1], std=[1, 1, 2]), 0.3),
    ],
    ids=["the architecture itself", "another depth", "a tag", "stated"],
)
def test_normalization_is_the_networks_own(arguments, mean, tmp_path):
    built = {key: value for key, value in arguments.items() if key not in ("architecture", "mean", "std")}
    network = timm.create_model(arguments["architecture"].partition(".")[0], num_classes=0, **built)
    path = tmp_path / "own.safetensors"
    save_file(network.state_dict(), path, {"timm": json.dumps(arguments)})
    backbone = Backbone(str(path), **EXACT)
    assert_close(backbone.mean[0, 0, 0, 0], torch.tensor(mean))
    assert (backbone.std[0, 2, 0, 0] == 2) == ("std" in arguments)
    assert backbone(torch.zeros(1, 3, 32, 320)).shape == (1, 192, 2, 20), "any multiple of the patch, as by name"
