"""Checkpoints in the layout of the released ones: read without the packages that wrote them, used like our own runs."""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import SHARED, tiny_experiment
from released import OPTIONS, tensors, write_ckpt
from torch.testing import assert_close

from stego_lib import Run, StegoError, crf, evaluate, load_run, open_dataset, train
from stego_lib.networks.checkpoint import read_published
from stego_lib.networks.dino import DinoViT
from stego_lib.predict import probe_scores
from stego_lib.utils.notices import Notice

pytestmark = pytest.mark.usefixtures("few_samples")


@pytest.fixture(autouse=True)
def without_their_packages(monkeypatch):
    """Importing Lightning or OmegaConf fails in every test here."""
    for name in ("omegaconf", "pytorch_lightning", "lightning"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    return write_ckpt(tmp_path_factory.mktemp("published") / "tiny.ckpt", tensors())


@pytest.fixture(scope="module")
def golden_run() -> tuple[Run, dict[str, np.ndarray]]:
    path = SHARED / "golden" / "published_format.ckpt"
    if not path.is_file():
        pytest.skip("shared/golden/published_format.ckpt is not beside the project")
    with np.load(path.with_name("published_checkpoint.npz")) as file:
        return load_run(path, device="cpu"), dict(file)


@pytest.fixture(scope="module")
def golden_maps(golden_run):
    run, expected = golden_run
    with torch.inference_mode():
        code = run.code(torch.from_numpy(expected["images_rgb_uint8"]).movedim(-1, 1))
        scores = probe_scores(run.model, code)
        return code, {name: found.logits((320, 320)).log_softmax(1) for name, found in scores.items()}


def test_golden_codes(golden_run, golden_maps):
    assert_close(golden_maps[0], torch.from_numpy(golden_run[1]["code"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["cluster", "linear"])
def test_golden_classes_and_their_probabilities(golden_run, golden_maps, name):
    found, expected = golden_maps[1][name], golden_run[1]
    assert (found.argmax(1).numpy() == expected[f"{name}_argmax"]).mean() >= 0.999
    logprobs = torch.from_numpy(expected[f"{name}_logprobs_8th"])
    assert_close(found[:, :, ::8, ::8], logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["cluster", "linear"])
def test_golden_classes_after_the_crf(golden_run, golden_maps, name):
    expected = golden_run[1]
    found = crf.dense_crf(expected["images_rgb_uint8"][0], golden_maps[1][name][0]).argmax(0)
    assert (found.numpy() == expected[f"{name}_crf_argmax_image0"]).mean() >= 0.995


def test_golden_predictions_are_the_clusters(golden_run):
    run, expected = golden_run
    for image, clusters in zip(expected["images_rgb_uint8"], expected["cluster_argmax"], strict=True):
        assert (run.predict(image, refine="none") == clusters).mean() >= 0.999


def test_the_architecture_comes_from_the_tensors_and_the_recipe_from_the_options(ckpt):
    published = read_published(ckpt)
    vit, experiment = published.vit, published.experiment
    assert (vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads) == (48, 2, 6)
    assert vit.patch_embed.patch_size == (8, 8)
    expected = dict(
        dataset="cityscapes", backbone=str(ckpt), code_dim=6, crop="five", steps=7000, batch_size=32, points=9,
        negatives=4, centering=False, weights=(1.0, 0.5, 0.9), shifts=(0.4, 0.2, 0.3), lr_head=1e-3, dropout=0.1,
        head="nonlinear", precision="float32",
    )  # fmt: skip
    assert {key: getattr(experiment, key) for key in expected} == expected
    official = dict(stabilize=True, zero_clamp=True, extra_clusters=0, keys=False, published=False)
    assert {key: getattr(experiment.official, key) for key in official} == official
    assert published.step == 7000 and published.classes.names == tuple(f"class {i}" for i in range(8))


@torch.inference_mode()
def test_its_codes_and_classes_are_those_of_its_tensors(ckpt):
    run, weights = load_run(ckpt, mirror=False, device="cpu"), tensors()
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    vit = DinoViT(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=6, num_classes=0, dynamic_img_size=True)
    vit.load_state_dict(
        {key.removeprefix("net.model."): value for key, value in weights.items() if key.startswith("net.model.")}
    )
    tokens = vit.eval().forward_features(run.backbone.normalize(image))[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    hidden = F.conv2d(tokens, weights["net.cluster2.0.weight"], weights["net.cluster2.0.bias"]).relu()
    code = F.conv2d(tokens, weights["net.cluster1.0.weight"], weights["net.cluster1.0.bias"])
    code += F.conv2d(hidden, weights["net.cluster2.2.weight"], weights["net.cluster2.2.bias"])
    assert_close(run.code(image), code, rtol=1e-4, atol=1e-4)
    assert_close(
        run.model.linear_probe(code), F.conv2d(code, weights["linear_probe.weight"], weights["linear_probe.bias"])
    )
    assert torch.equal(run.model.cluster_probe.clusters, weights["cluster_probe.clusters"]), "not the unused ones"


@pytest.mark.parametrize(
    "theirs, ours, count, names",
    [
        ("cityscapes", "cityscapes", 27, {0: "road"}),
        ("cocostuff27", "cocostuff27", 27, {1: "appliance (things)", 26: "water (stuff)"}),
        ("potsdam", "potsdam3", 3, {0: "road and car", 2: "vegetation and tree"}),
    ],
)
def test_published_names_of_datasets_are_translated(tmp_path, theirs, ours, count, names):
    options = OPTIONS | {"dataset_name": theirs}
    published = read_published(write_ckpt(tmp_path / "c.ckpt", tensors(count, extra=3), options=options))
    assert published.experiment.dataset == ours and published.experiment.official.extra_clusters == 3
    assert len(published.classes) == count and {i: published.classes.names[i] for i in names} == names


def test_a_linear_head_and_missing_options(tmp_path):
    state = {key: value for key, value in tensors().items() if not key.startswith("net.cluster2")}
    options = {"model_type": "vit_small", "dataset_name": "own"}
    experiment = read_published(write_ckpt(tmp_path / "b.ckpt", state, options=options)).experiment
    assert (experiment.head, experiment.dataset, experiment.dropout) == ("linear", "scenes", 0.1)


@pytest.mark.parametrize(
    "name, value",
    [
        ("net.novelty.weight", torch.zeros(1)), ("net.model.blocks.0.ls1.gamma", torch.zeros(48)),
        ("linear_probe.bias", None), ("net.cluster2.2.bias", None), ("net.model.norm.bias", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_every_tensor_is_accounted_for(tmp_path, name, value):
    state = {key: tensor for key, tensor in (tensors() | {name: value}).items() if tensor is not None}
    with pytest.raises(StegoError, match=rf"odd\.ckpt.*{name.removeprefix('net.model.')}"):
        load_run(write_ckpt(tmp_path / "odd.ckpt", state))


@pytest.fixture
def on_scenes(scenes_root) -> dict[str, Any]:
    return dict(dataset="scenes", data_root=str(scenes_root), eval_size=64, device="cpu", crf=False)


def test_it_evaluates_and_then_predicts_classes(ckpt, on_scenes, tmp_path):
    run = load_run(ckpt, runs_dir=tmp_path, **on_scenes)
    run.experiment = run.experiment.but(crop="none", train_size=64)  # the baselines look at training images
    image = open_dataset("scenes", on_scenes["data_root"], "val").image(0)
    clusters = run.predict(image)
    record = evaluate(run)
    assert record["step"] == 7000 and set(record["scores"]) >= {"cluster", "linear", "kmeans_features"}
    assert record["experiment"]["backbone"] == "tiny.ckpt" and str(tmp_path) not in str(record)
    again = load_run(ckpt, runs_dir=tmp_path, **on_scenes)
    np.testing.assert_array_equal(again.predict(image), np.array(record["matching"])[clusters])
    with pytest.raises(StegoError, match=r"no metrics\.json"):
        _ = load_run(ckpt, runs_dir=tmp_path, **on_scenes | {"eval_size": 32}).metrics
    assert sorted(path.name for path in ckpt.parent.iterdir()) == ["tiny.ckpt"], "nothing is left beside the checkpoint"


def test_what_is_evaluated_lies_by_weights_and_way_of_evaluating(ckpt, on_scenes, tmp_path):
    """Records of other weights or settings are never reused; the places of data and checkpoint do not matter."""
    other = write_ckpt(tmp_path / "tiny.ckpt", tensors(seed=1))
    (tmp_path / "moved").mkdir()
    moved = shutil.copy(ckpt, tmp_path / "moved" / "tiny.ckpt")
    folders = [
        load_run(path, runs_dir=tmp_path, **on_scenes | changes).folder
        for path, changes in [(ckpt, {}), (other, {}), (ckpt, {"mirror": False}), (ckpt, {"dataset": "folder"})]
    ]
    assert len(set(folders)) == 4 and all(folder.parent == tmp_path for folder in folders)
    assert load_run(moved, runs_dir=tmp_path, **on_scenes | {"data_root": str(tmp_path)}).folder == folders[0]
    assert load_run(ckpt).shifts == (0.4, 0.2, 0.3), "of self, neighbors and random images"


def fine_tuning(scenes_root, backbone, **changes) -> Any:
    values = dict(code_dim=6, steps=1, start_from=str(backbone), lr_head=1e-9, lr_probes=1e-9)
    return tiny_experiment(scenes_root, backbone, **values | changes)


def test_training_goes_on_from_it(ckpt, scenes_root, tmp_path):
    """With hardly any learning rate the weights after a step are those of the checkpoint."""
    run, source = train(fine_tuning(scenes_root, ckpt), runs_dir=tmp_path), load_run(ckpt)
    for name, value in source.model.state_dict().items():
        assert_close(run.model.state_dict()[name], value, rtol=0, atol=1e-7)
    moved = train(fine_tuning(scenes_root, ckpt, lr_head=1e-3, steps=3), runs_dir=tmp_path)
    assert not torch.allclose(moved.model.head.linear.weight, source.model.head.linear.weight, atol=1e-4)
    again = train(fine_tuning(scenes_root, ckpt, start_from=str(run.folder)), runs_dir=tmp_path)
    assert_close(again.model.state_dict()["head.linear.weight"], source.model.head.linear.weight, rtol=0, atol=1e-7)
    assert load_run(moved.folder).experiment.start_from == str(ckpt)
    centered = train(fine_tuning(scenes_root, ckpt, subtract_mean=True), runs_dir=tmp_path)
    assert not centered.model.feature_mean.any(), "the mean that it was trained with goes with the head"


def test_probes_for_other_classes_begin_anew_and_a_head_that_does_not_fit_is_refused(scenes_root, tmp_path):
    path = write_ckpt(tmp_path / "c.ckpt", tensors(27))
    with pytest.warns(Notice, match="cluster_probe.clusters"):
        run = train(fine_tuning(scenes_root, path), runs_dir=tmp_path)
    assert run.model.cluster_probe.clusters.shape == (8, 6)
    assert_close(run.model.head.linear.weight, tensors(27)["net.cluster1.0.weight"], rtol=0, atol=1e-7)
    for change in (dict(code_dim=7), dict(head="linear")):
        with pytest.raises(StegoError, match="head"):
            train(fine_tuning(scenes_root, path, **change), runs_dir=tmp_path)
