"""Subtracting the image mean, dependence of clusters on the image, and the table of the records."""

import numpy as np
import pytest
import torch
from common import tiny_experiment
from records import study_record
from torch.testing import assert_close

from stego_book.studies.light import AMOUNTS, Lightened, dependence, light_records, light_table
from stego_book.studies.study import Variant
from stego_lib import Experiment, open_dataset
from stego_lib.backbone import Backbone
from stego_lib.features import open_features
from stego_lib.utils.files import write_json


@pytest.fixture
def store(scenes_root, backbone_file, tmp_path):
    experiment = tiny_experiment(scenes_root, backbone_file)
    dataset = open_dataset("scenes", experiment.data_root, "train")
    return open_features(dataset, Backbone.of(experiment), 64, tmp_path / "features")


@pytest.mark.parametrize("amount", [0.0, 0.25, 1.0])
def test_a_share_of_each_images_own_shift_is_taken_off(store, amount):
    lightened, rows = Lightened(store, amount), torch.arange(len(store))
    maps = store.rows(rows).double()
    overall = maps.mean((0, 2, 3))
    for row in rows:
        shift = maps[row].mean((1, 2)) - overall
        expected = torch.stack([maps[row, channel] - amount * shift[channel] for channel in range(maps.shape[1])])
        assert_close(lightened.rows(row[None])[0].double(), expected, rtol=1e-4, atol=1e-4)
    assert_close(lightened.pooled, lightened.rows(rows).mean((2, 3)), rtol=1e-3, atol=1e-3)  # stored in half precision
    assert_close(lightened.mean, store.mean, rtol=1e-4, atol=1e-4)
    assert torch.equal(lightened.label_rows(rows), store.label_rows(rows))
    other = Lightened(store, amount, torch.full((store.shape[1],), 3.0)).rows(rows[:1])
    expected = store.rows(rows[:1]) - amount * (store.rows(rows[:1]).mean((2, 3), keepdim=True) - 3)
    assert_close(other, expected)


def test_what_an_image_tells_about_its_clusters():
    assert dependence(torch.tensor([[10, 20, 5], [20, 40, 10]])) == pytest.approx(0, abs=1e-9)
    assert dependence(torch.tensor([[10, 0], [0, 30]])) == pytest.approx(1)
    table = np.random.default_rng(0).integers(1, 50, (4, 3))
    joint = table / table.sum()
    pairs = np.ndindex(*joint.shape)
    shared = sum(joint[i, c] * np.log(joint[i, c] / (joint[i].sum() * joint[:, c].sum())) for i, c in pairs)
    entropy = -sum(p * np.log(p) for p in joint.sum(0))
    assert dependence(torch.from_numpy(table)) == pytest.approx(shared / entropy)


def test_the_table_has_means_and_spreads_of_each_amount(tmp_path):
    base = Experiment.preset("scenes", data_root="nowhere", crf=False)
    for amount in AMOUNTS[:2]:
        for seed in range(2):
            record = study_record(Variant("", "", base, light=amount), seed, 40.0 + 10 * amount + seed)
            scores = record["scores"] | {"kmeans_features": {"miou": 30.0}}
            shares = {"dependence": {"cluster": 0.5, "kmeans_features": 0.25}, "neighbors": 1 - amount}
            record |= {"scores": scores, "dark": scores, "bright": scores} | shares
            write_json(tmp_path / f"{amount}-{seed}.json", record)
    assert light_table([]).empty
    table = light_table(light_records(base, [0, 1], tmp_path))
    assert list(table.index) == ["0", "0.25"] and list(table["seeds"]) == [2, 2]
    assert table.loc["0.25", "clusters"] == "43.0 ± 0.7" and table.loc["0", "k-means, dark images"] == "30.0 ± 0.0"
    assert table.loc["0.25", "same neighbors"] == "0.75" and table.loc["0", "dependence (clusters)"] == "0.50"
