"""timm's networks by name, from the hub's cache as users have it, and from files; their image sizes; and without a hub.

Weights are stand-ins: the networks as timm initializes them, in float16, with the classifier that the hub's files have.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from common import ROOT, tiny_experiment
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from stego_lib import Backbone, Experiment, StegoError, load_run, train
from stego_lib.backbone import fit_sizes, preset_here
from stego_lib.utils.notices import Notice

EXACT = dict(device="cpu", precision="float32")
# Networks that timm has for tests, with a repository on its hub like any other.
TINY = {"ViT": "test_vit.r160_in1k", "ResNet": "test_resnet.r160_in1k", "ConvNeXt": "test_convnext.r160_in1k"}
HALF = "vit_tiny_patch16_224.augreg_in21k"  # its mean and std are 0.5


def keep_in_cache(name: str, home: Path) -> Path:
    """Writes stand-in weights where the hub's client keeps its downloads; returns the file."""
    config = timm.get_pretrained_cfg(name)
    folder = home / "hub" / ("models--" + config.hf_hub_id.replace("/", "--"))
    file = folder / "snapshots" / ("0" * 40) / "model.safetensors"
    if not file.exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = timm.create_model(name)
        for path in (file, folder / "refs" / "main"):
            path.parent.mkdir(parents=True)
        weights = {key: value.half().contiguous() for key, value in network.state_dict().items()}
        save_file(weights, file, {"format": "pt"})
        (folder / "refs" / "main").write_text("0" * 40)
    return file


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder for HF_HOME."""
    return tmp_path_factory.mktemp("huggingface")


@pytest.fixture
def cache(home, monkeypatch) -> Path:
    """The same, where this process looks."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    return home


def write_network(path: Path, **arguments) -> Path:
    """A .safetensors file of a timm network with random weights."""
    built = dict(arguments)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(built.pop("architecture"), num_classes=0, **built)
    save_file(network.state_dict(), path, {"timm": json.dumps(arguments)})
    return path


def images(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [HALF, TINY["ConvNeXt"], "vit_small_patch16_224.dino"])
def test_the_same_weights_give_the_same_features_by_name_and_from_files(name, cache, tmp_path):
    file = keep_in_cache(name, cache)
    described = tmp_path / "described.safetensors"
    save_file(load_file(file), described, {"timm": json.dumps({"architecture": name})})
    batch = images(96, 160)
    first, *others = [Backbone(source, **EXACT) for source in (name, f"{name}@{file}", str(described))]
    if name.endswith(".dino"):  # a file with metadata is timm's network, which resamples positions differently
        assert torch.equal(Backbone("dino_vits16", **EXACT)(batch), first(batch))
        others.pop()
    for backbone in others:
        assert torch.equal(backbone(batch), first(batch)) and backbone.fingerprint() == first.fingerprint()
        assert_close(backbone.mean.flatten(), torch.tensor(timm.get_pretrained_cfg(name).mean))


def test_a_downloaded_file_says_how_it_is_opened(cache, tmp_path):
    name = TINY["ViT"]
    file = Path(shutil.copy(keep_in_cache(name, cache), tmp_path / "model.safetensors"))
    with pytest.raises(StegoError, match="NAME@FILE"):
        Backbone(str(file))
    assert Backbone(f"{name}@{file}", **EXACT).vit.num_classes == 0
    nowhere = tmp_path / "nowhere.safetensors"
    for wrong, at, word in (("vit_tiny_patch16_224", file, "blocks"), ("test_vi", file, "did you mean"),
                            ("test_vit", nowhere, "nowhere")):  # fmt: skip
        with pytest.raises(StegoError, match=word):
            Backbone(f"{wrong}@{at}")


@pytest.mark.parametrize("wrapped", ["MoCo", "DDP"])
def test_weights_as_their_authors_wrap_them(wrapped, cache, tmp_path):
    """The paper compares MoCo v2, whose file holds two networks and a queue."""
    name = TINY["ResNet"]
    weights = {key: value.float() for key, value in load_file(keep_in_cache(name, cache)).items()}
    queries = {f"module.encoder_q.{key}": value for key, value in weights.items()}
    keys = {f"module.encoder_k.{key}": value + 1 for key, value in weights.items()}
    stored = {
        "MoCo": {"epoch": 200, "state_dict": queries | keys | {"module.queue": torch.zeros(3)}},
        "DDP": {"model": {f"module.{key}": value for key, value in weights.items()}},
    }[wrapped]
    torch.save(stored, tmp_path / "weights.pth.tar")
    batch = images(96, 96)
    assert torch.equal(Backbone(f"{name}@{tmp_path}/weights.pth.tar", **EXACT)(batch), Backbone(name, **EXACT)(batch))


@pytest.mark.parametrize(
    "architecture", ["test_resnet", "test_convnext", "swin_tiny_patch4_window7_224"], ids=["ResNet", "ConvNeXt", "Swin"]
)
@torch.inference_mode()
def test_features_of_a_network_with_stages_are_its_last_stages(architecture, tmp_path):
    size = dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)) if "swin" in architecture else {}
    backbone = Backbone(str(write_network(tmp_path / "own.safetensors", architecture=architecture, **size)), **EXACT)
    batch = images(64, 96)
    expected = backbone.vit.forward_features(backbone.normalize(batch))
    if "swin" in architecture:  # which keeps channels last
        expected = expected.movedim(-1, 1)
    if "convnext" in architecture:  # DINOv3's authors apply the norm of the pooled feature to every position
        expected = backbone.vit.head.norm(expected)
    assert backbone.patch == 32 and backbone(batch).shape == (2, backbone.dim, 2, 3)
    assert_close(backbone(batch), expected, rtol=1e-4, atol=1e-5)
    for options in (dict(keys=True), dict(block=-2), dict(block=0)):
        with pytest.raises(StegoError, match="blocks"):
            Backbone(str(tmp_path / "own.safetensors"), **options)


@pytest.fixture(scope="module")
def patch14(tmp_path_factory) -> Path:
    """A tiny ViT with patches of 14 pixels."""
    arguments = dict(architecture="vit_small_patch14_dinov2", depth=1, embed_dim=32, num_heads=2, img_size=56)
    return write_network(tmp_path_factory.mktemp("patch14") / "own.safetensors", **arguments)


@pytest.mark.parametrize(
    "sizes, fitted, notices",
    [
        ((224, 320), (224, 322), 1),
        ((225, (240, 320)), (224, (238, 322)), 1),
        ((8, 8192), (14, 8190), 1),
        ((224, (28, 42)), (224, (28, 42)), 0),
    ],
    ids=str,
)
def test_sizes_follow_the_patch_with_one_notice(sizes, fitted, notices, patch14, recwarn):
    experiment = Experiment(backbone=str(patch14), train_size=sizes[0], eval_size=sizes[1])
    assert fit_sizes(experiment) == experiment.but(train_size=fitted[0], eval_size=fitted[1])
    assert len([warning for warning in recwarn if warning.category is Notice]) == notices


def test_a_run_records_the_sizes_it_used_and_is_found_by_those_requested(patch14, scenes_root, tmp_path):
    requested = tiny_experiment(scenes_root, patch14, train_size=64, eval_size=60, steps=2, crop="five")
    with pytest.warns(Notice, match="train_size=70 instead of 64"):
        run = train(requested, runs_dir=tmp_path)
    assert (run.experiment.train_size, run.experiment.eval_size) == (70, 56)
    assert load_run(run.folder).experiment == run.experiment
    with pytest.warns(Notice, match="train_size"):
        assert train(requested, runs_dir=tmp_path, resume=True).folder == run.folder


@pytest.fixture
def no_hub(monkeypatch):
    """timm builds networks and finds no weights."""
    build = timm.create_model

    def create(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no route to host")
        return build(name, **options)

    monkeypatch.setattr(timm, "create_model", create)


@pytest.mark.parametrize("name", ["camvid", "labelmefacade", "folder"])
def test_recipes_for_photographs_fall_back_to_the_embedded_backbone(no_hub, name):
    with pytest.warns(Notice, match="photos_vit_tiny8_d6"):
        experiment = preset_here(name, seed=3)
    assert experiment == Experiment.preset(name, seed=3, backbone="photos_vit_tiny8_d6")


def test_the_papers_recipes_and_named_backbones_are_never_replaced(no_hub):
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        for name, changes in [
            ("scenes", {}),
            ("cocostuff27-vitb8", {}),
            ("potsdam3-vits8", {"dataset": "camvid"}),
            ("camvid", {"backbone": "dino_vits8"}),
            ("camvid", {"official": {"published": True}}),
        ]:
            experiment = preset_here(name, **changes)
            assert experiment == Experiment.preset(name, **changes)
    with pytest.raises(StegoError, match="could not be downloaded"):
        Backbone.of(experiment)


@pytest.mark.parametrize("code, answers", [(f"Backbone({TINY['ViT']!r})\n", True), ("", False)])
def test_without_a_hub_the_cache_is_used_or_it_is_given_up_within_seconds(cache, code, answers):
    """With one notice, in a process of its own, whose connections are refused or never answered."""
    keep_in_cache(TINY["ViT"], cache)
    before = "import time\nfrom stego_lib.backbone import Backbone, preset_here\nt = time.time()\n"
    after = "assert preset_here('folder').backbone == 'photos_vit_tiny8_d6'\nprint(time.time() - t)"
    here = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    here |= {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        here["HF_ENDPOINT"] = f"http://127.0.0.1:{9 if answers else silent.getsockname()[1]}"
        command = [sys.executable, "-c", before + code + after]
        done = subprocess.run(command, env=here, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 15 and done.stderr.count("Notice: ") == 1 and "Retrying" not in done.stderr
