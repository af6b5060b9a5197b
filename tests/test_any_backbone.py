"""Networks of every family by name, from the hub's cache as a user has it, and from files: each through train.ipynb.

Weights are stand-ins: the networks as timm begins them, in float16, with the classifier that the hub's files have.
"""

import json
import os
import shutil
import subprocess
import sys
import time
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

from stego_lib import Backbone, Experiment, StegoError, load_run, train
from stego_lib.backbone import fit_sizes
from stego_lib.fallback import preset_here
from stego_lib.notebooks import run_notebook
from stego_lib.notices import Notice

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
        save_file({key: value.half().contiguous() for key, value in network.state_dict().items()}, blob, {"format": "pt"})
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
        dataset="folder", data_root=str(own_images), backbone=backbone, steps=2, crf=False, runs_dir=str(tmp_path / "runs")
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
    assert ("eval_size 322 in place of 320" in text) == (eval_size == 322)
    (about,) = (tmp_path / "runs" / "features").glob("folder-train-*/about.json")
    features = np.load(about.with_name("features.npy"), mmap_mode="r")
    assert features.shape[2:] == (train_size // patch, train_size // patch) and features.std() > 0
