"""The precision of backbone and head, and the order in memory that makes the head fast."""

import pytest
import torch
from common import few_samples, tiny_experiment

from stego_lib import Backbone, open_dataset, train, training
from stego_lib.backbone import choose_precision
from stego_lib.batches import draw_batch, find_neighbors
from stego_lib.features import open_features
from stego_lib.model import build_model


@pytest.mark.parametrize("amx, avx512, expected", [
    (False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16),
    (True, True, torch.bfloat16),
])  # fmt: skip
def test_auto_is_bfloat16_where_the_processor_multiplies_it(monkeypatch, amx, avx512, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) is expected
    assert choose_precision("float32", cpu) is torch.float32 and choose_precision("bfloat16", cpu) is torch.bfloat16


def test_stored_features_have_their_channels_last_in_memory(scenes_root, backbone, tmp_path):
    features = open_features(open_dataset("scenes", scenes_root, "train"), backbone, 64, tmp_path)
    found = features.rows(torch.tensor([3, 1, 3]))
    assert found.dtype is torch.float32 and found.is_contiguous(memory_format=torch.channels_last)


def test_a_step_in_bfloat16_is_that_in_float32_but_for_rounding(scenes_root, backbone_file, tmp_path):
    experiment = tiny_experiment(scenes_root, backbone_file, dropout=0.0)
    backbone = Backbone.of(experiment.but(precision="float32"))
    store = open_features(
        open_dataset("scenes", scenes_root, "train"), backbone, experiment.train_size, tmp_path, "full"
    )
    moved, values = {}, {}
    for precision in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = build_model(experiment, backbone.dim, store.n_classes)
        before = {name: weight.clone() for name, weight in model.head.named_parameters()}
        batch = draw_batch(store, find_neighbors(store, model, experiment), model, experiment, 0, backbone)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # whose step is the gradient itself
        values[precision] = training.train_step(model, optimizer, batch, experiment, (0.1, 0.1, 0.1), precision)
        moved[precision] = {name: weight - before[name] for name, weight in model.head.named_parameters()}
        assert all(weight.dtype is torch.float32 for weight in model.parameters())
    for name, expected in values[torch.float32].items():
        assert values[torch.bfloat16][name] == pytest.approx(expected, rel=0.03, abs=0.01), name
    for name, expected in moved[torch.float32].items():
        found = moved[torch.bfloat16][name]
        assert torch.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.99, name
        assert not torch.equal(found, expected), "it was computed in the precision that was asked for"


@pytest.mark.parametrize("published, expected", [(False, torch.bfloat16), (True, torch.float32)])
def test_the_head_is_trained_in_the_precision_of_the_backbone_and_published_numbers_in_float32(
    scenes_root, backbone_file, tmp_path, monkeypatch, published, expected
):
    few_samples(monkeypatch)
    step, seen = training.train_step, []
    monkeypatch.setattr(training, "train_step", lambda *arguments: (seen.append(arguments[-1]), step(*arguments))[1])
    experiment = tiny_experiment(scenes_root, backbone_file, steps=2, precision="bfloat16", published=published)
    train(experiment, runs_dir=tmp_path)
    assert seen == [expected] * 2


def test_training_in_bfloat16_follows_training_in_float32(scenes_root, backbone_file, tmp_path, monkeypatch):
    few_samples(monkeypatch)
    experiment = tiny_experiment(scenes_root, backbone_file, steps=12, dropout=0.0, lr_head=0.02)
    logs = [
        train(experiment.but(precision=precision), runs_dir=tmp_path / precision).log["code_self"]
        for precision in ("float32", "bfloat16")
    ]
    changed = abs(logs[0].iloc[-1] - logs[0].iloc[0])
    assert changed > 0.05 and abs(logs[1].iloc[-1] - logs[0].iloc[-1]) < 0.25 * changed
