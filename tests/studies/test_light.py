"""Light: what is taken off the features, what an image tells about clusters, and the records of the study."""

import numpy as np
import pytest
import torch
from common import few_samples, tiny_experiment
from torch.testing import assert_close

from stego_book.studies import light
from stego_book.studies.light import Lightened, dependence, light_records, light_table, run_light
from stego_lib import open_dataset
from stego_lib.backbone import Backbone
from stego_lib.batches import find_neighbors
from stego_lib.evaluation import evaluate
from stego_lib.features import open_features
from stego_lib.model import build_model
from stego_lib.training import train


@pytest.fixture
def experiment(scenes_root, backbone_file):
    return tiny_experiment(scenes_root, backbone_file, probes="after", steps=3)


@pytest.fixture
def store(experiment, tmp_path):
    dataset = open_dataset("scenes", experiment.data_root, "train")
    return open_features(dataset, Backbone.of(experiment), 64, tmp_path / "features")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    few_samples(monkeypatch)


@pytest.mark.parametrize("amount", [0.0, 0.25, 1.0])
def test_a_share_of_each_images_own_shift_is_taken_off(store, amount):
    found, rows = Lightened(store, amount), torch.arange(len(store))
    maps = store.rows(rows).double()
    overall = maps.mean((0, 2, 3))
    for row in rows:
        own = maps[row].mean((1, 2))
        expected = torch.stack(
            [maps[row, channel] - amount * (own - overall)[channel] for channel in range(maps.shape[1])]
        )
        assert_close(found.rows(row[None])[0].double(), expected, rtol=1e-4, atol=1e-4)
    assert_close(found.pooled, found.rows(rows).mean((2, 3)), rtol=1e-3, atol=1e-3)  # stored in half precision
    assert_close(found.mean, store.mean, rtol=1e-4, atol=1e-4)
    if amount == 1:
        assert (found.pooled - found.mean).abs().max() < 1e-3, "images do not differ by their mean any more"
    assert torch.equal(found.label_rows(rows), store.label_rows(rows))


def test_other_images_are_measured_against_the_mean_of_the_training_images(store):
    mean = torch.full((store.shape[1],), 3.0)
    maps = store.rows(torch.tensor([2]))
    expected = maps - 0.5 * (maps.mean((2, 3), keepdim=True) - 3)
    assert_close(Lightened(store, 0.5, mean).rows(torch.tensor([2])), expected)


def test_what_an_image_tells_about_its_clusters():
    assert dependence(torch.tensor([[10, 20, 5], [20, 40, 10]])) == pytest.approx(0, abs=1e-9)
    assert dependence(torch.tensor([[10, 0], [0, 30]])) == pytest.approx(1)
    rng = np.random.default_rng(0)
    table = rng.integers(1, 50, (4, 3))
    joint = table / table.sum()
    shared = sum(
        joint[i, c] * np.log(joint[i, c] / (joint[i].sum() * joint[:, c].sum())) for i in range(4) for c in range(3)
    )
    entropy = -sum(p * np.log(p) for p in joint.sum(0))
    assert dependence(torch.from_numpy(table)) == pytest.approx(shared / entropy)


def test_nothing_taken_off_gives_the_scores_of_an_ordinary_run(experiment, tmp_path):
    record = run_light(experiment, 0.0, tmp_path)
    usual = evaluate(train(experiment, runs_dir=tmp_path / "usual"))
    for name in ("cluster", "linear", "kmeans_features"):
        assert record["scores"][name]["iou"] == usual["scores"][name]["iou"], name
    assert record["shifts"] == usual["shifts"] and record["neighbors"] == 1
    assert (
        record["dark"].keys()
        == record["bright"].keys()
        == record["dependence"].keys()
        == {"cluster", "kmeans_features"}
    )
    assert not list(tmp_path.glob(".light*")), "the run itself is not kept"


def test_the_amount_changes_neighbors_shifts_and_scores(experiment, tmp_path, store):
    whole, most = (run_light(experiment, amount, tmp_path) for amount in (1.0, 0.9))
    half = run_light(
        experiment.but(method="hp", points=11, neighbors=7, negatives=5, shifts="auto", code_dim=8), 0.5, tmp_path
    )
    plain = run_light(experiment, 0.0, tmp_path)
    assert whole["light"] == 1 and half["light"] == 0.5 and half["experiment"]["method"] == "hp"
    assert whole["neighbors"] == 1 and whole["shifts"] != plain["shifts"], "nothing is left to find others by"
    assert whole["scores"]["kmeans_features"]["iou"] != plain["scores"]["kmeans_features"]["iou"]
    model = build_model(experiment, store.shape[1], 8)
    ours, theirs = (find_neighbors(one, model, experiment) for one in (Lightened(store, 0.9), store))
    same = np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)])
    assert most["neighbors"] == pytest.approx(same) and same < 1


def test_dark_images_are_the_darkest_third(experiment, tmp_path, store, monkeypatch):
    """With all images dark there is no other part to be scored, so the dark part has the scores of all."""
    monkeypatch.setattr(light, "DARK", 0.99)
    some = run_light(experiment, 0.0, tmp_path)
    monkeypatch.setattr(light, "DARK", 0.4)
    less = run_light(experiment, 0.0, tmp_path)
    assert some["dark"] != less["dark"] and some["scores"] == less["scores"]


def test_records_are_made_once_and_shown(experiment, tmp_path, monkeypatch):
    made, run = [], light.run_light
    monkeypatch.setattr(
        light, "run_light", lambda one, amount, runs_dir: made.append((one.seed, amount)) or run(one, amount, runs_dir)
    )
    assert light_records(experiment, (0.0, 0.5), (0, 1), tmp_path / "records") == []
    first = light_records(experiment, (0.0, 0.5), (0, 1), tmp_path / "records", None, tmp_path)
    again = light_records(experiment, (0.0, 0.5), (0, 1), tmp_path / "records", None, tmp_path)
    assert first == again and made == [(0, 0.0), (0, 0.5), (1, 0.0), (1, 0.5)]
    table = light_table(again)
    assert list(table.index) == ["0", "0.5"] and list(table["seeds"]) == [2, 2]
    values = [record["scores"]["cluster"]["miou"] for record in again if record["light"] == 0.5]
    assert table.loc["0.5", "clusters"] == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    assert table.loc["0", "same neighbors"] == "1.00"
