"""Networks of every family by name, from the hub's cache as a user has it, and from files: each through train.ipynb.

Weights are stand-ins: the networks as timm begins them, in float16, with the classifier that the hub's files have.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import papermill
import pytest
import timm
import torch
from common import ROOT, tiny_experiment, write_backbone
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from stego_book.notebooks import run_notebook
from stego_book.studies.seeds import run_seeds
from stego_lib import Backbone, Experiment, StegoError, load_run, train
from stego_lib.backbone import fit_sizes, geometry_of, preset_here
from stego_lib.utils.notices import Notice

EXACT = dict(device="cpu", precision="float32")
# Family -> name, patch or stride, sizes at training and evaluation after rounding.
FAMILIES = {
    "DINO": ("dino_vits16", 16, 224, 320),
    "DINOv2": ("vit_small_patch14_dinov2.lvd142m", 14, 224, 322),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2.lvd142m", 14, 224, 322),
    "DINOv3": ("vit_small_patch16_dinov3.lvd1689m", 16, 224, 320),
    "DINOv3 ConvNeXt": ("convnext_tiny.dinov3_lvd1689m", 32, 224, 320),
    "MAE": ("vit_base_patch16_224.mae", 16, 224, 320),
    "CLIP": ("vit_base_patch32_clip_224.openai", 32, 224, 320),
    "SigLIP": ("vit_base_patch32_siglip_256.v2_webli", 32, 224, 320),
    "augreg": ("vit_tiny_patch16_224.augreg_in21k", 16, 224, 320),
    "ResNet": ("resnet18.a1_in1k", 32, 224, 320),
    "ConvNeXt": ("convnext_atto.d2_in1k", 32, 224, 320),
}


def keep_in_cache(name: str, home: Path) -> Path:
    """Writes stand-in weights of a timm network where its hub's client keeps those that it fetched; returns the file."""
    name = {"dino_vits16": "vit_small_patch16_224.dino"}.get(name, name)
    config = timm.get_pretrained_cfg(name)
    folder = home / "hub" / ("models--" + config.hf_hub_id.replace("/", "--"))
    file = folder / "snapshots" / ("0" * 40) / "model.safetensors"
    if not file.exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = timm.create_model(name)
        blob = folder / "blobs" / "weights"
        for path in (file, blob, folder / "refs" / "main"):
            path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {key: value.half().contiguous() for key, value in network.state_dict().items()}, blob, {"format": "pt"}
        )
        (folder / "refs" / "main").write_text("0" * 40)
        file.symlink_to(blob)
    return file


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder for HF_HOME."""
    return tmp_path_factory.mktemp("huggingface")


@pytest.fixture
def cache(home, monkeypatch) -> Path:
    """The same, where this process and its children look."""
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    return home


@pytest.fixture(scope="module")
def own_images(tmp_path_factory) -> Path:
    """A data root whose folder/ holds six images to train on and two to score, with labels of three classes."""
    root = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for i in range(count):
            label = np.kron(rng.integers(0, 3, (3, 4)), np.ones((24, 24), int)).astype(np.uint8)
            image = np.clip(label[..., None] * 80 + rng.integers(0, 90, (*label.shape, 3)), 0, 255).astype(np.uint8)
            for kind, array in (("imgs", image), ("labels", label)):
                path = root / "folder" / kind / split / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    (root / "folder" / "classes.json").write_text('{"names": ["a", "b", "c"]}')
    return root


def through_the_notebook(backbone: str, own_images: Path, tmp_path: Path, **more: object) -> tuple[dict, str]:
    """The run record that train.ipynb leaves, and the notebook's text."""
    given = dict(
        dataset="folder",
        data_root=str(own_images),
        backbone=backbone,
        steps=2,
        crf=False,
        runs_dir=str(tmp_path / "runs"),
    )
    run_notebook(ROOT / "notebooks" / "train.ipynb", tmp_path / "out.ipynb", given | more)
    (path,) = (tmp_path / "runs").glob("*/metrics.json")
    return json.loads(path.read_text()), (tmp_path / "out.ipynb").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_from_its_name_to_scores(family, cache, own_images, tmp_path):
    name, patch, train_size, eval_size = FAMILIES[family]
    keep_in_cache(name, cache)
    record, text = through_the_notebook(name, own_images, tmp_path)
    assert record["experiment"]["backbone"] == name
    assert (record["experiment"]["train_size"], record["experiment"]["eval_size"]) == (train_size, eval_size)
    assert {"cluster", "linear", "kmeans_features"} <= record["scores"].keys()
    assert text.count("eval_size 322 in place of 320") == (eval_size == 322), "one line, or none"
    (about,) = (tmp_path / "runs" / "features").glob("folder-train-*/about.json")
    features = np.load(about.with_name("features.npy"), mmap_mode="r")
    assert features.shape[2:] == (train_size // patch, train_size // patch) and features.astype(np.float32).std() > 0


def test_i_jepa_goes_through_the_notebook_from_a_file(own_images, tmp_path):
    """Its smallest network has 631 million weights, so that the stand-in has two of the 32 blocks."""
    arguments = dict(architecture="vit_huge_patch14_gap_224.in1k_ijepa", depth=2)
    file = write_network(tmp_path / "ijepa.safetensors", arguments)
    record, text = through_the_notebook(str(file), own_images, tmp_path)
    assert record["experiment"]["eval_size"] == 322 and "eval_size 322 in place of 320" in text
    assert {"cluster", "linear", "kmeans_features"} <= record["scores"].keys()


# ---------------------------------------------------------------------------------------------- by name and from files

TINY = {"ViT": "test_vit.r160_in1k", "ResNet": "test_resnet.r160_in1k", "ConvNeXt": "test_convnext.r160_in1k"}
"""Networks that timm has for tests, with a hub's repository like any other."""
HALF = "vit_tiny_patch16_224.augreg_in21k"
"""A network whose mean and std are 0.5."""


def write_network(path: Path, arguments: dict, **changes: object) -> Path:
    """A .safetensors file of a timm network with random weights; `changes` stand in its metadata beside the arguments."""
    built = dict(arguments)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(built.pop("architecture"), **{"num_classes": 0} | built)
    save_file(network.state_dict(), path, {"timm": json.dumps(arguments | changes)})
    return path


def images(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [HALF, *TINY.values(), "dino_vits16"])
def test_the_same_weights_give_the_same_features_by_name_and_from_files(name, cache, tmp_path):
    file = keep_in_cache(name, cache)
    full = {"dino_vits16": "vit_small_patch16_224.dino"}.get(name, name)
    described = tmp_path / "described.safetensors"
    save_file(load_file(file), described, {"timm": json.dumps({"architecture": full})})
    batch = images(96, 160)
    found = [Backbone(one, **EXACT) for one in (name, f"{name}@{file}", str(described))]
    assert torch.equal(found[1](batch), found[0](batch)) and found[1].fingerprint() == found[0].fingerprint()
    if name != "dino_vits16":  # what its metadata describe is timm's network, which resamples positions in its own way
        assert torch.equal(found[2](batch), found[0](batch)) and found[2].fingerprint() == found[0].fingerprint()
    config = timm.get_pretrained_cfg(full)
    for backbone in found:
        assert_close(backbone.mean.flatten(), torch.tensor(config.mean))
        assert_close(backbone.std.flatten(), torch.tensor(config.std))


@pytest.mark.parametrize(
    "arguments, mean",
    [
        (dict(architecture="vit_tiny_patch16_224"), 0.5),
        (dict(architecture="vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True), 0.5),
        (dict(architecture="vit_tiny_patch16_224", depth=1), 0.485),  # not the network whose weights timm has
        (dict(architecture="vit_tiny_patch16_224.augreg_in21k", depth=1), 0.5),
        (dict(architecture="vit_tiny_patch16_224", depth=1, mean=[0.3, 0.2, 0.1], std=[1, 1, 2]), 0.3),
        (dict(architecture="vit_base_patch32_clip_224.openai", depth=1), 0.48145466),
    ],
    ids=["the architecture itself", "as by name", "another depth", "a tag", "stated", "CLIP"],
)
def test_normalization_is_the_networks_own(arguments, mean, tmp_path):
    stated = {key: arguments.pop(key) for key in ("mean", "std") if key in arguments}
    backbone = Backbone(str(write_network(tmp_path / "own.safetensors", arguments, **stated)), **EXACT)
    assert backbone.mean[0, 0, 0, 0] == pytest.approx(mean)
    assert backbone.std.flatten()[2] == (2 if stated else pytest.approx(backbone.std.flatten()[2]))


@pytest.mark.parametrize("stated", [[0.5], 0.5, [1, 2, "x"], [1, 2, float("nan")], None, [[1], 2, 3]], ids=str)
def test_a_mean_that_is_none_is_named(stated, tmp_path):
    file = write_network(tmp_path / "own.safetensors", dict(architecture="test_vit"), mean=stated)
    with pytest.raises(StegoError, match=r"own\.safetensors.*mean .* three numbers"):
        Backbone(str(file))


def test_a_std_of_zero_is_refused(tmp_path):
    file = write_network(tmp_path / "own.safetensors", dict(architecture="test_vit"), std=[0, 1, 1])
    with pytest.raises(StegoError, match=r"own\.safetensors.*std .* three numbers"):
        Backbone(str(file))


@pytest.mark.parametrize("name", ["scenes_vit_tiny8", "photos_vit_tiny8", "photos_vit_tiny8_d6"])
def test_embedded_backbones_keep_the_normalization_they_were_trained_with(name):
    assert Backbone(name, **EXACT).mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_a_file_takes_images_of_any_size_as_the_network_does_by_name(tmp_path):
    """Case 10."""
    file = write_network(tmp_path / "own.safetensors", dict(architecture=HALF, num_classes=0))
    assert Backbone(str(file), **EXACT)(images(96, 320)).shape == (2, 192, 6, 20)


def test_the_ending_of_a_file_may_be_in_capitals(backbone_file, tmp_path):
    loud = shutil.copy(backbone_file, tmp_path / "TINY.SAFETENSORS")
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    features = [
        Backbone.of(Experiment(backbone=name, device="cpu", precision="float32"))(images)
        for name in (str(loud), str(backbone_file))
    ]
    assert_close(*features, rtol=0, atol=0)


def test_a_file_that_was_downloaded_says_how_it_is_opened_and_opens_so(cache, tmp_path):
    name = TINY["ViT"]
    file = Path(shutil.copy(keep_in_cache(name, cache), tmp_path / "model.safetensors"))
    assert "head.weight" in load_file(file), "with its classifier, as the hub has it"
    with pytest.raises(StegoError, match=rf"does not say which network.*lvd142m@{file}"):
        Backbone(str(file))
    assert Backbone(f"{name}@{file}", **EXACT).vit.num_classes == 0


def test_weights_of_another_network_are_refused_by_name(cache):
    file = keep_in_cache(TINY["ViT"], cache)
    with pytest.raises(StegoError, match=r"does not hold the weights of 'vit_tiny_patch16_224'.*tensors"):
        Backbone(f"vit_tiny_patch16_224@{file}")
    with pytest.raises(StegoError, match=r"unknown backbone 'test_vi'.*did you mean"):
        Backbone(f"test_vi@{file}")
    with pytest.raises(StegoError, match=r"nowhere\.safetensors does not exist"):
        Backbone(f"{TINY['ViT']}@nowhere.safetensors")


def test_a_weight_that_is_missing_is_never_left_to_chance(cache, tmp_path):
    weights = load_file(keep_in_cache(TINY["ViT"], cache))
    del weights["blocks.1.attn.proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(StegoError, match=r"blocks\.1\.attn\.proj\.weight"):
        Backbone(f"{TINY['ViT']}@{tmp_path / 'model.safetensors'}")


def test_a_cache_that_holds_another_network_is_no_missing_network(tmp_path, monkeypatch):
    """Else the embedded backbone would step in."""
    file = keep_in_cache(TINY["ViT"], tmp_path)
    weights = load_file(file) | {"cls_token": torch.zeros(1, 1, 7)}
    save_file(weights, file.resolve())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(StegoError, match=r"cache of timm's hub are not those of 'test_vit\.r160_in1k'") as caught:
        Backbone(TINY["ViT"])
    assert type(caught.value) is StegoError


@pytest.mark.parametrize("wrapped", ["MoCo", "DDP", "plain"])
def test_weights_as_their_authors_wrap_them(wrapped, cache, tmp_path):
    """The paper compares MoCo v2, whose file is a dictionary of two networks and much else."""
    name = TINY["ResNet"]
    weights = {key: value.float() for key, value in load_file(keep_in_cache(name, cache)).items()}
    stored = {
        "MoCo": {
            "epoch": 200,
            "state_dict": {f"module.encoder_q.{key}": value for key, value in weights.items()}
            | {f"module.encoder_k.{key}": value + 1 for key, value in weights.items()}
            | {"module.queue": torch.zeros(3)},
        },
        "DDP": {"model": {f"module.{key}": value for key, value in weights.items()}},
        "plain": weights,
    }[wrapped]
    torch.save(stored, tmp_path / "weights.pth.tar")
    batch = images(96, 96)
    assert torch.equal(Backbone(f"{name}@{tmp_path}/weights.pth.tar", **EXACT)(batch), Backbone(name, **EXACT)(batch))


def test_a_stranger_s_file_runs_no_code_by_name_either(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(StegoError, match=r"evil\.pth cannot be read"):
        Backbone(f"{TINY['ViT']}@{tmp_path}/evil.pth")
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("family", ["ResNet", "ConvNeXt"])
@torch.inference_mode()
def test_features_of_a_network_with_stages_are_its_last_stages(family, cache):
    keep_in_cache(TINY[family], cache)
    backbone = Backbone(TINY[family], **EXACT)
    assert backbone.patch == backbone.vit.feature_info[-1]["reduction"] == 32
    batch = images(64, 96)
    expected = backbone.vit.forward_features(backbone.normalize(batch))
    if family == "ConvNeXt":  # DINOv3's authors norm every position as the pooled feature is normed
        expected = backbone.vit.head.norm(expected)
        assert_close(expected.mean(1), torch.zeros(2, 2, 3), atol=1e-4, rtol=0)
    assert_close(backbone(batch), expected)
    assert (
        backbone(batch).shape == (2, backbone.dim, 2, 3)
        and backbone.fingerprint() != backbone.untrained().fingerprint()
    )


def test_a_run_on_a_network_with_stages_predicts(cache, scenes_root, tmp_path):
    keep_in_cache(TINY["ResNet"], cache)
    run = train(tiny_experiment(scenes_root, TINY["ResNet"], steps=2, probes="after"), runs_dir=tmp_path)
    found = run.predict(images(50, 70)[0])
    assert np.shape(found)[-2:] == (50, 70)


@pytest.mark.parametrize("change", [dict(features="KK"), dict(block=-2), dict(block=0)], ids=str)
def test_what_only_a_vit_has_is_an_error_in_words(change, cache):
    keep_in_cache(TINY["ResNet"], cache)
    with pytest.raises(StegoError, match=r"'test_resnet\.r160_in1k' has stages.*last stage.*block at -1.*'feat'"):
        Backbone(TINY["ResNet"], **change)


def test_a_network_without_a_map_says_so(tmp_path):
    file = write_network(tmp_path / "own.safetensors", dict(architecture="crossvit_tiny_240"))
    with pytest.raises(StegoError, match=r"gives no map of features .*choose a ViT or a convolutional network"):
        Backbone(str(file))


# ---------------------------------------------------------------------------------------------- sizes


@pytest.fixture(scope="module")
def patch14(tmp_path_factory) -> Path:
    """A tiny ViT with patches of 14 pixels."""
    arguments = dict(architecture="vit_small_patch14_dinov2", depth=1, embed_dim=32, num_heads=2, img_size=56)
    return write_network(tmp_path_factory.mktemp("patch14") / "own.safetensors", arguments)


@pytest.mark.parametrize(
    "asked, taken, told",
    [
        ((224, 320), (224, 322), "eval_size 322 in place of 320"),
        (
            (225, (240, 320)),
            (224, (238, 322)),
            "train_size 224 in place of 225 and eval_size 238 x 322 in place of 240 x 320",
        ),
        ((8, 8192), (14, 8190), "train_size 14 in place of 8 and eval_size 8190 in place of 8192"),
        ((224, (28, 42)), (224, (28, 42)), None),
    ],
    ids=str,
)
def test_sizes_follow_the_patch_with_one_line(asked, taken, told, patch14, recwarn):
    experiment = Experiment(backbone=str(patch14), train_size=asked[0], eval_size=asked[1])
    fitted = fit_sizes(experiment) if told is None else None
    if told:
        with pytest.warns(Notice) as said:
            fitted = fit_sizes(experiment)
        assert len(said) == 1 and told in str(said[0].message) and "14 pixels" in str(said[0].message)
    assert fitted == experiment.but(train_size=taken[0], eval_size=taken[1])


def test_a_run_records_the_sizes_it_used_and_is_found_by_those_asked_for(patch14, scenes_root, tmp_path):
    asked = tiny_experiment(scenes_root, patch14, train_size=64, eval_size=60, steps=2, crop="five")
    with pytest.warns(Notice, match="train_size 70 in place of 64 and eval_size 56 in place of 60"):
        run = train(asked, runs_dir=tmp_path)
    assert (run.experiment.train_size, run.experiment.eval_size) == (70, 56)
    assert load_run(run.folder).experiment == run.experiment
    with pytest.warns(Notice, match="train_size 70"):
        assert train(asked, runs_dir=tmp_path, resume=True).folder == run.folder


def test_a_finished_seed_is_found_by_the_sizes_that_were_asked_for(patch14, scenes_root, tmp_path):
    asked = tiny_experiment(scenes_root, patch14, train_size=64, eval_size=64, steps=1)
    with pytest.warns(Notice, match="train_size 70"):
        (first,) = run_seeds(asked, [3], tmp_path / "records", runs_dir=tmp_path, resume=True)
    assert run_seeds(asked, [3], tmp_path / "records", runs_dir=tmp_path, resume=True) == [first]
    assert first["experiment"]["train_size"] == 70


@pytest.mark.parametrize("name", ["cocostuff27-vits8", "cocostuff27-vitb8", "cityscapes-vitb8", "potsdam3-vits8"])
def test_the_papers_recipes_keep_their_sizes(name):
    experiment = Experiment.preset(name, published=True)
    assert fit_sizes(experiment) == experiment == preset_here(name, published=True)


def test_a_network_that_knows_positions_up_to_its_own_size_gets_that_size():
    """MViT takes smaller images, and breaks with an index out of range on larger ones."""
    assert geometry_of("mvitv2_tiny").nearest(320) == (224, 224)
    assert geometry_of("resnet18").nearest(320) == 320


def test_a_network_of_one_size_gets_it(scenes_root, tmp_path):
    """BEiT takes no images but those of the size that it was made for."""
    arguments = dict(architecture="beit_base_patch16_224", depth=1, embed_dim=32, num_heads=2, img_size=32)
    file = write_network(tmp_path / "beit.safetensors", arguments)
    with pytest.warns(Notice, match="train_size 32 x 32 in place of 64.*it takes no other size"):
        run = train(tiny_experiment(scenes_root, file, steps=1), runs_dir=tmp_path)
    assert run.experiment.train_size == run.experiment.eval_size == (32, 32)
    with pytest.raises(StegoError, match="takes images of 32 x 32 pixels only, not of 32 x 48"):
        run.backbone(images(32, 48))


# ---------------------------------------------------------------------------------------------- parameters


def told_of() -> set[str]:
    """Fields of an experiment that errors and notices of the library speak of by their names."""
    found = set()
    for path in (ROOT / "stego_lib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            says = isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                "StegoError",
                "notice",
                "enough_memory",
            )
            if says or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "knobs"):
                text = " ".join(str(one.value) for one in ast.walk(node) if isinstance(one, ast.Constant))
                found |= {
                    one.name
                    for one in fields(Experiment)
                    if re.search(rf"\b{one.name}{'' if '_' in one.name else ' ?='}", text)
                }
    return found


NOT_TYPED = {
    "train": {"devices"},  # an error about it is raised by it, from Python alone
    "seeds": {
        "devices",
        "start_from",
        "head",
        "validate_every",
        "published",
    },  # of one run, or of methods that start from one
    "reproduce": {
        "devices",
        "start_from",
        "head",
        "method",
        "validate_every",
        "dataset",
        "n_classes",
        "extra_clusters",
        "code_dim",
    },  # a row's own
}


@pytest.mark.parametrize("notebook", NOT_TYPED)
def test_what_errors_recommend_can_be_typed(notebook):
    known = papermill.inspect_notebook(str(ROOT / "notebooks" / f"{notebook}.ipynb"))
    assert {"train_size", "eval_size", "neighbors", "features", "block", "probes", "feature_store"} <= known.keys()
    spoken = told_of()
    assert {"train_size", "feature_store", "lr_head", "crop", "precision"} <= spoken
    assert spoken - known.keys() <= NOT_TYPED[notebook]


def test_sizes_and_the_rest_are_typed_in_train(patch14, own_images, tmp_path):
    record, _ = through_the_notebook(
        str(patch14), own_images, tmp_path, train_size="56", eval_size="28 42", neighbors=2, features="KK", block=0,
        probes="joint", feature_store="online", lr_head=1e-3,
    )  # fmt: skip
    kept = record["experiment"]
    assert (kept["train_size"], kept["eval_size"], kept["neighbors"]) == (56, [28, 42], 2)
    assert (kept["features"], kept["block"], kept["probes"], kept["lr_head"]) == ("KK", 0, "joint", 1e-3)
    assert not list((tmp_path / "runs" / "features").glob("folder-train-*/features.npy")), "online"


# ---------------------------------------------------------------------------------------------- without a network


def alone(code: str, endpoint: str, home: Path) -> tuple[float, str]:
    """Seconds that `code` took in a process whose hub is at `endpoint`, and what it printed."""
    here = {
        name: value for name, value in os.environ.items() if "proxy" not in name.lower() and name != "HF_HUB_OFFLINE"
    }
    here |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
    code = f"import time\nfrom stego_lib.backbone import preset_here\nfrom stego_lib import Backbone\nt = time.time()\n{code}\nprint(time.time() - t)"
    done = subprocess.run([sys.executable, "-c", code], env=here, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    *_, seconds = done.stdout.split()
    return float(seconds), done.stderr


def test_without_a_network_the_embedded_backbone_steps_in_at_once_with_one_line(tmp_path):
    """Case 24."""
    code = "assert preset_here('folder').backbone == 'photos_vit_tiny8_d6'"
    seconds, said = alone(code, "http://127.0.0.1:9", tmp_path)
    assert seconds < 10 and said.count("Notice: ") == 1 and "out of reach" in said
    assert "Retrying" not in said and "thrown while" not in said


def test_a_hub_that_never_answers_is_given_up_after_seconds(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        code = "assert preset_here('folder').backbone == 'photos_vit_tiny8_d6'"
        seconds, said = alone(code, f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path)
    assert seconds < 12 and said.count("Notice: ") == 1 and "out of reach" in said


def test_without_a_network_what_is_in_the_cache_is_used(cache):
    keep_in_cache(TINY["ViT"], cache)
    seconds, said = alone(f"Backbone({TINY['ViT']!r})", "http://127.0.0.1:9", cache)
    assert seconds < 10 and "Notice" not in said


# ---------------------------------------------------------------------------------------------- a run whose files move


def test_paths_are_kept_absolute(tmp_path, monkeypatch, backbone_file, scenes_root):
    """Case 22: a run is opened from any working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(backbone_file, tmp_path / "own.safetensors")
    experiment = tiny_experiment(scenes_root, Path("own.safetensors"), steps=1)
    assert experiment.backbone == str(tmp_path / "own.safetensors")
    assert experiment.but(data_root="data", start_from="runs/a").to_dict().items() >= {
        "data_root": str(tmp_path / "data"), "start_from": str(tmp_path / "runs" / "a"),
    }.items()  # fmt: skip
    assert experiment.but(backbone="test_vit@own.safetensors").backbone == f"test_vit@{tmp_path / 'own.safetensors'}"
    assert [experiment.but(backbone=name).backbone for name in ("dino_vits8", HALF)] == ["dino_vits8", HALF]
    run = train(experiment, runs_dir=tmp_path / "runs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_run(run.folder).backbone.weights_id == run.backbone.weights_id


def test_a_backbone_file_that_moved_is_taken_from_its_new_place(tmp_path, backbone_file, scenes_root):
    old, new = Path(shutil.copy(backbone_file, tmp_path / "old.safetensors")), tmp_path / "new.safetensors"
    run = train(tiny_experiment(scenes_root, old, steps=1), runs_dir=tmp_path / "runs")
    old.rename(new)
    with pytest.raises(
        StegoError, match=r"old\.safetensors does not exist.*put it into the run's folder.*backbone=FILE"
    ):
        _ = load_run(run.folder).backbone
    moved = load_run(run.folder, backbone=str(new))
    assert moved.backbone.weights_id == run.backbone.weights_id
    other = write_backbone(tmp_path / "other.safetensors", seed=5)
    with pytest.raises(StegoError, match="trained on other weights"):
        load_run(run.folder, backbone=str(other))
    new.rename(run.folder / "old.safetensors")
    assert load_run(run.folder).backbone.weights_id == run.backbone.weights_id


def test_a_run_that_does_not_tell_its_weights_takes_no_others(tmp_path, backbone_file, scenes_root):
    run = train(tiny_experiment(scenes_root, backbone_file, steps=1), runs_dir=tmp_path)
    state = torch.load(run.folder / "checkpoint.pt", weights_only=True)
    del state["backbone_weights"]
    torch.save(state, run.folder / "checkpoint.pt")
    with pytest.raises(StegoError, match="does not tell which weights"):
        load_run(run.folder, backbone=str(tmp_path / "any.safetensors"))
    assert load_run(run.folder).backbone.dim == 32


def test_a_name_and_a_file_are_one_backbone_in_names_and_records(cache, scenes_root, tmp_path):

    file = keep_in_cache(TINY["ViT"], cache)
    experiment = tiny_experiment(scenes_root, f"{TINY['ViT']}@{file}")
    assert "test_vit" in experiment.name and "model" not in experiment.name
    assert experiment.to_record()["backbone"] == TINY["ViT"]
