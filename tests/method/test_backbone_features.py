"""The frozen backbone, and the store that keeps its features."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from common import TIMM_ARGUMENTS, write_backbone
from PIL import Image
from torch.testing import assert_close

from stego_book.pretraining import PretrainRecipe
from stego_lib import Backbone, StegoError, open_dataset
from stego_lib import backbone as backbone_module
from stego_lib.datasets.transforms import resize_image, resize_label
from stego_lib.features import extraction
from stego_lib.features.opening import open_store

EXACT = dict(device="cpu", precision="float32")


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def backbone(backbone_file) -> Backbone:
    return Backbone(str(backbone_file), **EXACT)


# ---------------------------------------------------------------------------------------------- Backbone


def test_the_tiny_backbone_is_described_as_pretraining_describes_its_own():
    """Same keys and kind of network as `save_backbone` writes; only smaller."""
    assert set(PretrainRecipe().timm_arguments()) <= set(TIMM_ARGUMENTS)
    assert PretrainRecipe().varied(3) == dataclasses.replace(PretrainRecipe(), seed=3)


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (16, 48)])
def test_features_are_maps(backbone, height, width):
    found = backbone(images(2, 3, height, width))
    assert found.shape == (2, 32, height // 8, width // 8) == (2, backbone.dim, *backbone.grid(height, width))
    assert found.dtype == torch.float32 and backbone.patch == 8


def test_features_are_the_last_blocks_patch_tokens_after_the_norm(backbone):
    batch = images(2, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.inference_mode():
        tokens = backbone.vit.forward_features((batch / 255 - mean) / std)[:, 1:]  # without the class token
    expected = torch.stack([tokens[:, row * 4 : row * 4 + 4].transpose(1, 2) for row in range(4)], 2)  # row by row
    assert_close(backbone(batch), expected)


def test_the_backbone_is_frozen_and_stays_in_eval_mode(backbone):
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone(images(1, 3, 32, 32)).requires_grad
    backbone.train()
    assert not backbone.training and not any(module.training for module in backbone.modules())
    torch.nn.Sequential(backbone).train()
    assert not any(module.training for module in backbone.modules())


def test_an_untrained_twin_has_the_same_layers_with_weights_of_chance(backbone):
    """As PyTorch begins each layer; the trained one, and what is drawn elsewhere, stay as they are."""
    before, drawn = {name: value.clone() for name, value in backbone.vit.state_dict().items()}, torch.get_rng_state()
    twin = backbone.untrained(3)
    assert torch.equal(torch.get_rng_state(), drawn)
    weights = twin.vit.state_dict()
    assert {name: value.shape for name, value in weights.items()} == {
        name: value.shape for name, value in before.items()
    }
    for name, value in backbone.vit.state_dict().items():
        assert torch.equal(value, before[name]) and not torch.equal(value, weights[name]), name
    for name, layer in twin.vit.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            bound = layer.weight[0].numel() ** -0.5
            assert 0.9 * bound < layer.weight.abs().max() <= bound and layer.bias.abs().max() <= bound, name
        elif isinstance(layer, torch.nn.LayerNorm):
            assert (layer.weight == 1).all() and (layer.bias == 0).all(), name
    assert 0.01 < twin.vit.pos_embed.std() < 0.03
    batch = images(2, 3, 32, 32)
    assert torch.equal(twin(batch), backbone.untrained(3)(batch)) and not twin(batch).requires_grad
    marks = {one.fingerprint() for one in (backbone, twin, backbone.untrained(3), backbone.untrained(4))}
    assert len(marks) == 3 and "seed 3" in twin.name


def test_bytes_equal_numbers_from_0_to_1(backbone):
    batch = images(2, 3, 32, 32)
    assert torch.equal(backbone(batch), backbone(batch.float() / 255))


def test_features_do_not_depend_on_the_rest_of_the_batch(backbone):
    batch = images(3, 3, 32, 32)
    assert_close(backbone(batch)[1:2], backbone(batch[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("height, width", [(30, 32), (32, 36), (33, 33)])
def test_a_size_that_is_no_multiple_of_the_patch_is_an_error(backbone, height, width):
    with pytest.raises(StegoError, match=rf"{height} x {width}.*multiples of 8"):
        backbone(images(1, 3, height, width))


def test_bfloat16_gives_nearly_the_same_as_float32(backbone, backbone_file):
    half = Backbone(str(backbone_file), device="cpu", precision="bfloat16")
    batch = images(2, 3, 32, 32)
    found = half(batch)
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found, backbone(batch)).min() > 0.99
    assert half.fingerprint() != backbone.fingerprint(), "features of another precision are not taken for these"


def test_the_fingerprint_is_that_of_the_weights(backbone, backbone_file, tmp_path):
    moved = shutil.copy(backbone_file, tmp_path / "moved.safetensors")
    assert Backbone(str(moved), **EXACT).fingerprint() == backbone.fingerprint()
    other = write_backbone(tmp_path / "other.safetensors", seed=1)
    assert Backbone(str(other), **EXACT).fingerprint() != backbone.fingerprint()


def test_an_unknown_name_is_an_error_that_suggests_one():
    with pytest.raises(StegoError, match=r"unknown backbone 'dino_vit8' \(did you mean 'dino_vit"):
        Backbone("dino_vit8")
    with pytest.raises(StegoError, match=r"did you mean 'vit_small_patch16_224"):
        Backbone("vit_smal_patch16_224")  # codespell:ignore smal


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StegoError, match=r"nowhere\.safetensors does not exist"):
        Backbone(str(tmp_path / "nowhere.safetensors"))


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"trained": "long"},
        {"timm": "{}"},
        {"timm": "{"},
        {"timm": "[]"},
        {"timm": json.dumps(TIMM_ARGUMENTS | {"architecture": "no_such_net"})},
    ],
    ids=["none", "no timm", "no architecture", "no JSON", "no object", "unknown architecture"],
)
def test_a_file_without_good_metadata_is_named(tmp_path, metadata):
    path = write_backbone(tmp_path / "vit.safetensors", metadata=metadata)
    with pytest.raises(StegoError, match=r"vit\.safetensors"):
        Backbone(str(path))


def test_weights_of_another_network_are_an_error(tmp_path):
    path = write_backbone(tmp_path / "vit.safetensors", metadata={"timm": json.dumps(TIMM_ARGUMENTS | {"depth": 1})})
    with pytest.raises(StegoError, match=r"vit\.safetensors is not a backbone that timm can build"):
        Backbone(str(path))


def test_more_blocks_than_tensors_are_refused_before_they_are_made(tmp_path, monkeypatch):
    """Ten thousand blocks take minutes to make, even without their weights."""
    metadata = {"timm": json.dumps(TIMM_ARGUMENTS | {"depth": 10_000})}
    path = write_backbone(tmp_path / "vit.safetensors", metadata=metadata)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("they were made"))
    with pytest.raises(
        StegoError, match=r"vit\.safetensors is not a backbone.*10000 blocks cannot be made of \d+ tensors"
    ):
        Backbone(str(path))


@pytest.mark.parametrize("length", [0, 5, 1000, -100])
def test_a_file_that_is_cut_short_is_named(tmp_path, backbone_file, length):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(backbone_file.read_bytes()[:length])
    with pytest.raises(StegoError, match=r"cut\.safetensors"):
        Backbone(str(path))


@pytest.mark.parametrize(
    "error",
    [OSError("no route to host\nand so on"), TimeoutError(), RuntimeError("proxy")],
    ids=["OSError", "no words", "RuntimeError"],
)
def test_a_hub_that_cannot_be_reached_is_explained(monkeypatch, error):
    def fails(*arguments, **options):
        raise error

    monkeypatch.setattr(timm, "create_model", fails)
    with pytest.raises(
        StegoError, match=rf"vit_small_patch8_224\.dino.*could not be fetched.*{type(error).__name__}.*safetensors"
    ):
        Backbone("dino_vits8")


@pytest.mark.parametrize("device", ["cuda:63", "warp drive"])
def test_a_device_that_is_not_there_is_an_error_that_names_it(backbone_file, device):
    with pytest.raises(StegoError, match=rf"device '{device}' cannot be used here.*'auto' or 'cpu'"):
        Backbone(str(backbone_file), device=device)


# ---------------------------------------------------------------------------------------------- FeatureStore


@pytest.fixture
def own_images(tmp_path) -> Path:
    """A root whose folder/imgs/train holds five images of different shapes with labels, 255 among them."""
    folder = tmp_path / "data" / "folder"
    for i, (height, width) in enumerate([(40, 56), (56, 40), (48, 48), (64, 40), (32, 32)]):
        for kind, array in (
            ("imgs", images(height, width, 3, seed=i)),
            ("labels", images(height, width, seed=i + 9) % 4),
        ):
            array = array.numpy().copy()
            if kind == "labels":
                array[: height // 2] = 255
            path = folder / kind / "train" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    (folder / "classes.json").write_text('{"names": ["a", "b", "c", "d"]}')
    return folder.parent


def left(root: Path) -> list[Path]:
    """What lies in a folder of stores, but for their locks and the fingerprints of files."""
    return [path for path in root.iterdir() if path.suffix != ".lock" and path.name != ".contents"]


def train_split(root: Path):
    return open_dataset("folder", root, "train")


@pytest.mark.parametrize("size", [32, (24, 40)], ids=str)
def test_the_store_holds_what_a_direct_computation_gives(own_images, backbone, tmp_path, size):
    dataset = train_split(own_images)
    store = open_store(dataset, backbone, size, tmp_path / "store", batch=2)
    assert len(store) == 5
    rows = torch.tensor([3, 0, 4])
    expected_images = torch.stack([resize_image(dataset.image(i), size) for i in rows])
    expected = backbone(expected_images)
    assert torch.equal(store.image_rows(rows), expected_images)
    assert store.rows(rows).dtype == torch.float32
    assert_close(store.rows(rows), expected, rtol=1e-3, atol=1e-3)  # kept in float16
    assert_close(store.pooled[rows], expected.mean((2, 3)), rtol=1e-4, atol=1e-5)
    assert_close(store.mean, store.pooled.mean(0))
    labels = store.label_rows(rows)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, torch.stack([resize_label(dataset.label(i), size) for i in rows]))
    assert set(labels.unique().tolist()) == {-1, 0, 1, 2, 3}, "ignored pixels stay ignored"


def test_the_mirror_store_holds_features_of_flipped_images(own_images, backbone, tmp_path):
    dataset, rows = train_split(own_images), torch.arange(5)
    plain, mirror = (open_store(dataset, backbone, 32, tmp_path, mirror=flag) for flag in (False, True))
    assert plain.folder != mirror.folder
    assert_close(mirror.rows(rows), backbone(plain.image_rows(rows).flip(-1)), rtol=1e-3, atol=1e-3)
    assert torch.equal(mirror.image_rows(rows), plain.image_rows(rows)) and torch.equal(
        mirror.label_rows(rows), plain.label_rows(rows)
    )


def test_the_second_time_nothing_is_computed(own_images, backbone, tmp_path, monkeypatch):
    first = open_store(train_split(own_images), backbone, 32, tmp_path / "store")
    monkeypatch.setattr(Backbone, "forward", lambda *_: pytest.fail("features were computed again"))
    second = open_store(train_split(own_images), backbone, 32, tmp_path / "store")
    assert first.folder == second.folder and np.array_equal(first.features, second.features)


def test_whatever_changes_the_features_makes_another_store(own_images, backbone, tmp_path):
    def folder(**changes) -> Path:
        options = dict(dataset=train_split(own_images), backbone=backbone, size=32, root=tmp_path / "store") | changes
        return open_store(**options).folder

    seen = [folder()]
    seen.append(folder(size=40))
    seen.append(folder(size=(32, 32)))  # the whole image, not its middle
    seen.append(folder(mirror=True))
    seen.append(folder(backbone=Backbone(str(write_backbone(tmp_path / "other.safetensors", seed=1)), **EXACT)))
    changed = own_images / "folder" / "imgs" / "train" / "0.png"
    Image.fromarray(images(40, 56, 3, seed=77).numpy()).save(changed)
    os.utime(changed, ns=(1, 1))  # as if changed at another time, whatever the clock's resolution
    seen.append(folder())
    label = own_images / "folder" / "labels" / "train" / "0.png"
    Image.fromarray(np.zeros((40, 56), np.uint8)).save(label)
    os.utime(label, ns=(1, 1))
    seen.append(folder())
    assert len(set(seen)) == len(seen) and all(path.is_dir() for path in seen)
    assert folder() == seen[-1]


def test_the_other_split_is_another_store(scenes_root, backbone, tmp_path):
    folders = {
        open_store(open_dataset("scenes", scenes_root, split), backbone, 64, tmp_path).folder
        for split in ("train", "val")
    }
    assert len(folders) == 2


def test_without_labels_the_store_has_none(own_images, backbone, tmp_path):
    shutil.rmtree(own_images / "folder" / "labels")
    store = open_store(train_split(own_images), backbone, 32, tmp_path / "store")
    assert store.labels is None and len(store) == 5


def test_an_extraction_that_breaks_off_leaves_nothing(own_images, backbone, tmp_path, monkeypatch):
    forward, calls = Backbone.forward, []

    def breaks(self, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(self, batch)

    monkeypatch.setattr(Backbone, "forward", breaks)
    with pytest.raises(KeyboardInterrupt):
        open_store(train_split(own_images), backbone, 32, tmp_path / "store", batch=2)
    assert left(tmp_path / "store") == []


def test_an_extraction_that_breaks_off_keeps_its_chunks_and_goes_on(own_images, backbone, tmp_path, monkeypatch):
    """Ctrl-C, an error: what is safe on the disk is not computed again."""
    monkeypatch.setattr(extraction, "CHECKPOINT_EVERY", 0.0)
    expected = open_store(train_split(own_images), backbone, 32, tmp_path / "whole", batch=2)
    forward, calls = Backbone.forward, []

    def breaks(self, batch):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, batch)

    monkeypatch.setattr(Backbone, "forward", breaks)
    with pytest.raises(KeyboardInterrupt):
        open_store(train_split(own_images), backbone, 32, tmp_path / "store", batch=2)
    (part,) = left(tmp_path / "store")
    assert part.name.endswith(".part") and len(list((part / "chunks").iterdir())) == 2
    store = open_store(train_split(own_images), backbone, 32, tmp_path / "store", batch=2)
    assert calls == [2, 2, 1, 1] and np.array_equal(store.features, expected.features)
    assert np.array_equal(store.labels, expected.labels) and left(tmp_path / "store") == [store.folder]


def test_the_size_of_a_store_is_told_before_it_is_made(own_images, backbone, tmp_path, capsys):
    store = open_store(train_split(own_images), backbone, 32, tmp_path / "store")
    said = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "GB" in line]
    assert said == [f"features of folder train: 0.00 GB, to be kept in {store.folder}"]
    open_store(train_split(own_images), backbone, 32, tmp_path / "store")
    assert "GB" not in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_an_error_before_computing(own_images, backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**6, used=10**6 - 1000, free=1000))
    monkeypatch.setattr(Backbone, "forward", lambda *_: pytest.fail("computed all the same"))
    with pytest.raises(StegoError, match=r"folder train.*GB free.*runs_dir"):
        open_store(train_split(own_images), backbone, 32, tmp_path / "store")
    assert left(tmp_path / "store") == []


def test_more_classes_than_a_byte_counts_are_refused_before_computing(own_images, backbone, tmp_path, monkeypatch):
    """Labels are kept as bytes, of which one means "ignored"."""
    monkeypatch.setattr(Backbone, "forward", lambda *_: pytest.fail("computed all the same"))
    for count, expected in ((255, None), (256, r"folder has 256 classes; 255 at most can be stored")):
        (own_images / "folder" / "classes.json").write_text(json.dumps({"names": [str(i) for i in range(count)]}))
        with pytest.raises(
            StegoError if expected else pytest.fail.Exception, match=expected or "computed all the same"
        ):
            open_store(train_split(own_images), backbone, 32, tmp_path / "store")


def test_a_size_that_does_not_fit_the_patch_leaves_nothing(own_images, backbone, tmp_path):
    with pytest.raises(StegoError, match="multiples of 8"):
        open_store(train_split(own_images), backbone, 36, tmp_path / "store")
    assert left(tmp_path / "store") == []


def test_a_label_map_of_another_shape_than_its_image_is_named(own_images, backbone, tmp_path):
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(own_images / "folder" / "labels" / "train" / "3.png")
    with pytest.raises(StegoError, match=r"imgs/train/3\.png is \(64, 40\).*labels/train/3\.png is \(10, 10\)"):
        open_store(train_split(own_images), backbone, 32, tmp_path / "store")


@pytest.mark.parametrize("features", ["feat", "KK"])
def test_on_a_cpu_images_pass_in_pieces_and_give_the_same(backbone_file, monkeypatch, features):
    """16 cells of 32 channels: the hidden layer of an image takes 4 * 32 * 16 numbers of 4 bytes."""
    backbone, batch = (
        Backbone(str(backbone_file), features=features, device="cpu", precision="float32"),
        images(5, 3, 32, 32),
    )
    seen = []
    backbone.vit.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    whole = backbone(batch)
    monkeypatch.setattr(backbone_module, "CPU_BYTES", 2 * 4 * 32 * 16 * 4)
    assert_close(backbone(batch), whole, rtol=0, atol=1e-5)
    monkeypatch.setattr(backbone_module, "CPU_BYTES", 1)
    assert_close(backbone(batch), whole, rtol=0, atol=1e-5)
    assert seen == [5] + [2, 2, 1] + [1] * 5, "never less than one"


def test_on_a_gpu_images_pass_together(backbone, monkeypatch):
    seen = []
    monkeypatch.setattr(backbone, "normalize", lambda batch: Pieces(seen))
    monkeypatch.setattr(backbone, "device", torch.device("cuda"))
    monkeypatch.setattr(backbone, "maps", lambda batch: batch)
    assert backbone(torch.zeros(300, 3, 32, 32)).shape == (300, 1)
    assert len(seen) == 1 and seen[0] >= 300


class Pieces:
    """A batch that notes how many images were asked for at once, and comes back whole."""

    def __init__(self, seen: list[int]):
        self.seen = seen

    def split(self, count: int) -> tuple[torch.Tensor, ...]:
        self.seen.append(count)
        return torch.zeros(300, 1).split(count)
