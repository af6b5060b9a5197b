"""The precision of backbone and head, and the order in memory that makes the head fast."""

import pytest
import torch
from common import tiny_experiment

from stego_lib import open_dataset, train, training
from stego_lib.backbone import choose_precision
from stego_lib.features import open_features

pytestmark = pytest.mark.usefixtures("few_samples")


@pytest.mark.parametrize("amx, avx512", [(False, False), (True, False), (False, True)])
def test_auto_is_bfloat16_where_the_processor_multiplies_it(monkeypatch, amx, avx512):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert choose_precision("auto", torch.device("cpu")) is (torch.bfloat16 if amx or avx512 else torch.float32)


def test_stored_features_have_their_channels_last_in_memory(scenes_root, backbone, tmp_path):
    features = open_features(open_dataset("scenes", scenes_root, "train"), backbone, 64, tmp_path)
    found = features.rows(torch.tensor([3, 1, 3]))
    assert found.dtype is torch.float32 and found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("published, expected", [(False, torch.bfloat16), (True, torch.float32)])
def test_the_head_is_trained_in_the_precision_of_the_backbone_and_published_numbers_in_float32(
    scenes_root, backbone_file, tmp_path, monkeypatch, published, expected
):
    step, seen = training.train_step, []
    monkeypatch.setattr(training, "train_step", lambda *arguments: (seen.append(arguments[-1]), step(*arguments))[1])
    experiment = tiny_experiment(scenes_root, backbone_file, steps=2, precision="bfloat16", published=published)
    train(experiment, runs_dir=tmp_path)
    assert seen == [expected] * 2


def test_training_in_bfloat16_follows_training_in_float32(scenes_root, backbone_file, tmp_path):
    experiment = tiny_experiment(scenes_root, backbone_file, steps=12, dropout=0.0, lr_head=0.02)
    logs = [
        train(experiment.but(precision=precision), runs_dir=tmp_path / precision).log["code_self"]
        for precision in ("float32", "bfloat16")
    ]
    changed = abs(logs[0].iloc[-1] - logs[0].iloc[0])
    assert changed > 0.05 and abs(logs[1].iloc[-1] - logs[0].iloc[-1]) < 0.25 * changed
