"""Features computed when they are asked for: the same training as from the store; the choice between both."""

import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import BASELINES, few_samples, tiny_experiment
from PIL import Image
from torch.testing import assert_close

from stego_lib import StegoError, evaluate, open_dataset, train, training
from stego_lib.backbone import Backbone
from stego_lib.datasets import open_training_set
from stego_lib.features.online import OnlineFeatures
from stego_lib.features.opening import open_features, open_store
from stego_lib.features.prefetch import ReadAhead
from stego_lib.features.source import Source
from stego_lib.features.store import FeatureStore
from stego_lib.run import read_checkpoint
from stego_lib.utils.notices import Notice

SAME = dict(rtol=2e-3, atol=2e-3)
"""One unit in the last place of float16, for features of about 1."""


@pytest.fixture(scope="module")
def experiment(scenes_root, backbone_file):
    return tiny_experiment(scenes_root, backbone_file, feature_store="online")


@pytest.fixture(scope="module")
def backbone(experiment) -> Backbone:
    return Backbone.of(experiment)


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(experiment, runs_dir):
    """A run that was trained online. Not to be changed."""
    return train(experiment, runs_dir=runs_dir)


def both(experiment, backbone, root, **options) -> tuple[FeatureStore, OnlineFeatures]:
    asked = (open_training_set(experiment), backbone, experiment.train_size, root)
    return open_store(*asked, **options), open_features(*asked, "online", **options)


def short_of_disk(monkeypatch, free: int = 1000) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**12, used=10**12 - free, free=free))


# ---------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize(
    "changes", [{}, dict(train_size=(32, 48)), dict(crop="five", train_size=32), dict(features="KK", block=0)], ids=str
)
@pytest.mark.parametrize("options", [{}, dict(mirror=True), dict(published=True)], ids=str)
def test_online_features_are_those_of_the_store(experiment, tmp_path, changes, options):
    changed = experiment.but(**changes)
    store, online = both(changed, Backbone.of(changed), tmp_path, **options)
    rows = torch.tensor([5, 2, 9, 2, 11])
    assert len(online) == len(store) and online.shape == store.shape and online.image_size == store.image_size
    assert_close(online.rows(rows), store.rows(rows), **SAME)
    assert torch.equal(online.rows(rows), online.rows(rows).half().float()), "rounded as the store's are"
    assert torch.equal(online.image_rows(rows), store.image_rows(rows))
    assert torch.equal(online.label_rows(rows), store.label_rows(rows)) and online.n_classes == store.n_classes
    assert_close(online.pooled, store.pooled, rtol=1e-4, atol=1e-5)
    assert_close(online.mean, store.mean, rtol=1e-4, atol=1e-5)
    assert online.labels_there() == store.labels_there() != []


def test_without_labels_there_are_none_online_either(experiment, backbone, scenes_root, tmp_path):
    shutil.copytree(scenes_root / "scenes" / "imgs", tmp_path / "folder" / "imgs")
    dataset = open_dataset("folder", tmp_path, "train")
    online = open_features(dataset, backbone, 64, tmp_path / "features", "online")
    assert not online.has_labels and online.labels_there() == []


def test_an_image_goes_through_the_backbone_once_a_batch(experiment, backbone, tmp_path, monkeypatch):
    """Also when it is both an image and a neighbor, and read in the threads beforehand."""
    online, seen, forward = both(experiment, backbone, tmp_path)[1], [], Backbone.forward
    monkeypatch.setattr(Backbone, "forward", lambda self, p: (seen.append(len(p)), forward(self, p))[1])
    rows = torch.tensor([3, 1, 3, 1, 7])
    online.prefetch(rows)
    found = online.rows(rows)
    assert seen == [3] and torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


@pytest.mark.parametrize("changes", [{}, dict(crop="five", train_size=32, subtract_mean=True)], ids=str)
def test_training_online_is_training_from_the_store(experiment, runs_dir, changes):
    changed = experiment.but(**changes)
    online, stored = (train(changed.but(feature_store=way), runs_dir=runs_dir) for way in ("online", "store"))
    np.testing.assert_allclose(online.log.to_numpy(), stored.log.to_numpy(), atol=2e-3)
    assert online.shifts == pytest.approx(stored.shifts, abs=1e-3)
    for name, value in online.model.state_dict().items():
        assert_close(value, stored.model.state_dict()[name], rtol=0, atol=1e-2)
    assert [read_checkpoint(one.folder)["feature_store"] for one in (online, stored)] == ["online", "store"]


def test_nothing_but_means_is_kept(experiment, tmp_path):
    train(experiment.but(steps=1), runs_dir=tmp_path)
    (folder,) = (path for path in (tmp_path / "features").glob("scenes*") if path.is_dir())
    assert {path.name for path in folder.iterdir()} == {"about.json", "pooled.npy"}
    assert np.load(folder / "pooled.npy").shape == (12, 32)


def test_a_run_online_is_scored_as_one_from_the_store(experiment, runs_dir, monkeypatch):
    few_samples(monkeypatch)
    found = {}
    for way in ("online", "store"):
        where = runs_dir / way
        found[way] = evaluate(train(experiment.but(steps=2, feature_store=way), runs_dir=where))["scores"]
        stores = [path for path in (where / "features").glob("[!.]*") if "mean" not in path.name]
        assert len(stores) == (3 if way == "store" else 0)
    assert found["online"].keys() == found["store"].keys() == {"cluster", "linear", *BASELINES}
    for name, scores in found["store"].items():
        assert found["online"][name]["miou"] == pytest.approx(scores["miou"], abs=0.5), name


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_that_read_changes_nothing(experiment, run, tmp_path, monkeypatch, threads):
    monkeypatch.setattr(os, "cpu_count", lambda: threads)
    again = train(experiment, runs_dir=tmp_path)
    assert (again.folder / "log.csv").read_bytes() == (run.folder / "log.csv").read_bytes()


# ---------------------------------------------------------------------------------------------- the choice


def test_auto_stores_where_there_is_room_and_says_nothing(experiment, backbone, tmp_path):
    dataset = open_training_set(experiment)
    assert isinstance(open_features(dataset, backbone, 64, tmp_path), FeatureStore)


def test_auto_goes_online_where_there_is_no_room_and_says_so(experiment, backbone, tmp_path, monkeypatch):
    dataset = open_training_set(experiment)
    short_of_disk(
        monkeypatch, 5_000
    )  # twelve images of 64 pixels take 247,000 bytes, their features on fewer components 7,680
    with pytest.warns(Notice, match=r"features of scenes train are computed anew .*0\.0 GB.*runs_dir"):
        assert isinstance(open_features(dataset, backbone, 64, tmp_path), OnlineFeatures)
    short_of_disk(monkeypatch, 400_000)
    assert isinstance(open_features(dataset, backbone, 64, tmp_path), FeatureStore)
    short_of_disk(monkeypatch)
    assert isinstance(open_features(dataset, backbone, 64, tmp_path), FeatureStore), "one that is there takes no room"


def test_a_store_that_was_asked_for_and_has_no_room_is_an_error(experiment, backbone, tmp_path, monkeypatch):
    short_of_disk(monkeypatch)
    with pytest.raises(StegoError, match=r"name a larger disk.*feature_store='compact'.*'online'"):
        open_features(open_training_set(experiment), backbone, 64, tmp_path, "store")


def test_a_resumed_run_keeps_its_feature_store(experiment, tmp_path, monkeypatch):
    """What began online for want of room goes on online when there is room: to the same weights, bit for bit."""
    auto = experiment.but(feature_store="auto")
    with monkeypatch.context() as patch:
        short_of_disk(patch, 5_000)
        with pytest.warns(Notice, match="computed anew"):
            whole = train(auto, runs_dir=tmp_path / "whole")
        step = training.train_step
        calls = []

        def breaks(*arguments):
            calls.append(arguments)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return step(*arguments)

        patch.setattr(training, "train_step", breaks)
        with pytest.warns(Notice), pytest.raises(KeyboardInterrupt):
            train(auto, runs_dir=tmp_path / "broken")
    resumed = train(auto, runs_dir=tmp_path / "broken", resume=True)
    assert (resumed.folder / "log.csv").read_bytes() == (whole.folder / "log.csv").read_bytes()
    assert resumed.feature_store == "online" and len(list((tmp_path / "broken").glob("*/experiment.json"))) == 1


def test_another_feature_store_on_resuming_is_a_notice(experiment, run, tmp_path):
    shutil.copytree(run.folder, tmp_path / run.folder.name)
    with pytest.warns(Notice, match="resumes with feature_store='store'; up to here it was 'online'"):
        again = train(experiment.but(feature_store="store"), runs_dir=tmp_path, resume=True)
    assert again.folder == tmp_path / run.folder.name


# ---------------------------------------------------------------------------------------------- fingerprints


def test_whatever_changes_features_changes_the_fingerprint(experiment, scenes_root, tmp_path):
    def key(**changes) -> str:
        changed = experiment.but(**changes)
        return Source(
            open_training_set(changed), Backbone.of(changed), changed.train_size, published=changed.published
        ).fingerprint(tmp_path)

    copied = shutil.copytree(scenes_root, tmp_path / "data")
    first = open_dataset("scenes", copied, "train").images[0]
    keys = [
        key(), key(crop="five"), key(crop="random"), key(precision="bfloat16"), key(block=0), key(features="KK"),
        key(train_size=32), key(published=True),
    ]  # fmt: skip
    os.utime(first, ns=(1, 1))
    assert key(data_root=str(copied)) == keys[0], "neither path nor time of a copy matters"
    Image.open(first).transpose(Image.Transpose.ROTATE_180).save(first)
    keys.append(key(data_root=str(copied)))
    assert len(set(keys)) == len(keys)
    assert key(seed=3, steps=9, batch_size=2, feature_store="store", device="cpu") == keys[0]


# ---------------------------------------------------------------------------------------------- reading, the GPU


def test_the_crops_of_an_image_are_cut_from_one_reading(experiment, backbone, tmp_path, monkeypatch):
    crops, read = open_training_set(experiment.but(crop="five")), []
    image = type(crops.whole).image
    monkeypatch.setattr(type(crops.whole), "image", lambda self, row: (read.append(row), image(self, row))[1])
    found = ReadAhead(crops.image, crops.images, threads=3)
    numbers = [*range(10), 7, 3]
    taken = found.take(numbers)
    assert sorted(read) == [0, 1], "five crops each"
    assert all(torch.equal(crop, crops.image(row)) for row, crop in zip(numbers, taken, strict=True))


def test_what_cannot_be_read_is_told_when_it_is_asked_for(tmp_path):
    def read(row: int) -> int:
        if row == 2:
            raise StegoError("image 2 cannot be read")
        return 10 * row

    ahead = ReadAhead(read, [tmp_path / str(row) for row in range(4)], threads=2)
    ahead.prefetch([0, 1, 2, 3])
    assert ahead.take([3, 0]) == [30, 0]
    with pytest.raises(StegoError, match="image 2"):
        ahead.take([1, 2])
    assert ahead.take([1]) == [10]
    ahead.close()


def test_features_that_fit_live_on_the_device(experiment, backbone, tmp_path, monkeypatch):
    """No GPU here: the CPU stands for one, and numbers of free bytes for its memory."""
    store, rows, cpu = both(experiment, backbone, tmp_path)[0], torch.tensor([3, 0, 3]), torch.device("cpu")
    expected = store.rows(rows)
    assert not store.keep_on(cpu) and not store.keep_on(cpu, free=store.features.nbytes)
    with monkeypatch.context() as patch:
        patch.setattr(
            torch, "empty", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
        )
        assert not store.keep_on(cpu, free=10**9)
    assert store.keep_on(cpu, free=2 * store.features.nbytes)
    (store.folder / "features.npy").unlink()
    assert torch.equal(store.rows(rows, cpu), expected)
