"""Stored features: the right numbers, computed once, by any number of processes, and again where files have changed."""

import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from common import write_backbone
from killing import CONTEXT
from torch.testing import assert_close

from stego_lib import Backbone, StegoError, open_dataset
from stego_lib.datasets.crops import FiveCrop
from stego_lib.datasets.transforms import resize_image, resize_label
from stego_lib.features import open_features
from stego_lib.features import store as store_module


def extract(data, backbone_file, root, rank=0, size=1, die_after=-1):
    """In a process of its own, one of `size` as torchrun starts them; counts the images that the backbone sees."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ |= dict(zip(names, map(str, (rank, rank, size, size)), strict=True)) | {"TORCHELASTIC_RUN_ID": "1"}
    torch.set_num_threads(1)
    store_module.SHARD, forward, seen = 4, Backbone.forward, []

    def counted(self, images):
        if len(seen) == die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(len(images))
        return forward(self, images)

    Backbone.forward = counted
    opened(data, Backbone(str(backbone_file), device="cpu", precision="float32"), root)
    (root / f"count-{rank}").write_text(str(sum(seen)))


def start(*arguments, **options):
    process = CONTEXT.Process(target=extract, args=arguments, kwargs=options)
    process.start()
    return process


@pytest.fixture
def data(scenes_root, tmp_path):
    """A copy of the scenes that may be changed: 12 images to train on, in shards of four."""
    return shutil.copytree(scenes_root, tmp_path / "data")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(store_module, "SHARD", 4)


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Numbers of images that go through the backbone."""
    seen, forward = [], Backbone.forward
    monkeypatch.setattr(Backbone, "forward", lambda self, images: (seen.append(len(images)), forward(self, images))[1])
    return seen


def opened(data, backbone, root, size=64, **options):
    return open_features(open_dataset("scenes", data, "train"), backbone, size, root, **options)


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("store", ["full", "online"])
@pytest.mark.parametrize("crops", [False, True])
@pytest.mark.parametrize(
    ("size", "options"), [(64, {}), ((32, 48), dict(mirror=True)), (32, dict(published=True))], ids=str
)
def test_rows_are_what_backbone_and_dataset_give(
    scenes_root, backbone, tmp_path, monkeypatch, store, crops, size, options
):
    monkeypatch.setattr(store_module, "SHARD", 21)  # 20 rows with crops
    whole = open_dataset("scenes", scenes_root, "train")
    dataset = FiveCrop(whole) if crops else whole
    features = open_features(dataset, backbone, size, tmp_path, store, **options)
    rows = torch.tensor([5, 2, 11, 2])
    published = options.get("published", False)
    images = torch.stack([resize_image(dataset.image(row), size, published) for row in range(len(dataset))])
    labels = torch.stack([resize_label(dataset.label(row), size) for row in range(len(dataset))])
    expected = backbone(images.flip(-1) if options.get("mirror") else images)
    found = features.rows(rows)
    assert features.shape == expected.shape and features.image_size == images.shape[2:] and features.kind == store
    assert_close(found, expected[rows], rtol=2e-3, atol=2e-3)
    assert torch.equal(found, found.half().float()) and torch.equal(found[1], found[3])
    assert torch.equal(features.image_rows(rows), images[rows]) and torch.equal(features.label_rows(rows), labels[rows])
    assert_close(features.pooled, expected.mean((2, 3)), rtol=1e-4, atol=1e-5)
    assert_close(features.mean, expected.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert features.class_pixels == [int((labels == class_).sum()) for class_ in range(features.n_classes)]
    assert features.fingerprints == store_module.content_fingerprints(dataset, tmp_path / "other")


def test_features_are_kept_on_a_device_with_room(scenes_root, backbone, tmp_path):
    """The CPU stands for a GPU."""
    features, rows, cpu = opened(scenes_root, backbone, tmp_path), torch.tensor([3, 0, 3]), torch.device("cpu")
    expected, size = features.rows(rows), 12 * 32 * 8 * 8 * 2
    assert not features.keep_on(cpu) and not features.keep_on(cpu, free=size)
    assert features.keep_on(cpu, free=2 * size)
    for path in features.folder.rglob("features.npy"):
        path.unlink()
    assert torch.equal(features.rows(rows, cpu), expected)


def test_two_processes_share_the_shards_of_the_same_store(scenes_root, backbone_file, backbone, tmp_path):
    processes = [start(scenes_root, backbone_file, tmp_path / "two", rank, size=2) for rank in (0, 1)]
    alone = opened(scenes_root, backbone, tmp_path / "one").folder
    for process in processes:
        process.join()
    assert [int((tmp_path / "two" / f"count-{rank}").read_text()) for rank in (0, 1)] == [8, 4]
    assert contents(tmp_path / "two" / alone.name) == contents(alone)


def test_after_a_kill_only_missing_shards_are_computed(scenes_root, backbone_file, backbone, tmp_path, computed):
    process = start(scenes_root, backbone_file, tmp_path, die_after=2)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (folder,) = tmp_path.glob("scenes-*")
    left = {path: content for path, content in contents(folder).items() if not path.startswith(".")}
    assert {path.split("/")[0] for path in left} == {"shard-00000", "shard-00001"}
    opened(scenes_root, backbone, tmp_path)
    assert sum(computed) == 4 and contents(folder).items() >= left.items()
    assert not list(folder.glob(".*")), "what the killed process left is removed"


def test_a_broken_image_is_named_and_finished_shards_are_kept(data, backbone, tmp_path):
    image = open_dataset("scenes", data, "train").images[9]
    image.write_bytes(image.read_bytes()[:100])
    with pytest.raises(StegoError, match=image.name):
        opened(data, backbone, tmp_path / "features")
    (folder,) = (tmp_path / "features").glob("scenes-*")
    assert sorted(path.name for path in folder.iterdir()) == ["shard-00000", "shard-00001"]


def test_a_disk_without_room_is_named_before_the_work(scenes_root, backbone, tmp_path, monkeypatch, computed):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=200_000))
    with pytest.raises(StegoError, match="feature_store='compact'"):
        opened(scenes_root, backbone, tmp_path)
    assert not computed


def test_features_that_float16_cannot_hold_are_an_error(scenes_root, tmp_path):
    spoilt = Backbone(str(write_backbone(tmp_path / "spoilt.safetensors")), device="cpu", precision="float32")
    with torch.no_grad():
        spoilt.vit.norm.weight.mul_(1e30)
    with pytest.raises(StegoError, match="float16"):
        opened(scenes_root, spoilt, tmp_path / "features")


@pytest.mark.parametrize("changed", ["images", "labels"])
def test_a_changed_file_is_never_served_from_an_old_store(data, backbone, tmp_path, computed, changed):
    before = opened(data, backbone, tmp_path / "features")
    paths = getattr(open_dataset("scenes", data, "train"), changed)
    shutil.copy(paths[1], paths[0])
    computed.clear()
    after = opened(data, backbone, tmp_path / "features")
    assert sum(computed) == 12 and after.folder != before.folder
    assert [key for key in after.fingerprints if after.fingerprints[key] != before.fingerprints[key]] == [changed]
    rows = torch.tensor([0, 1])
    values = after.image_rows(rows) if changed == "images" else after.label_rows(rows)
    assert torch.equal(values[0], values[1])


def test_moved_and_touched_files_are_not_extracted_again(data, backbone, tmp_path, computed):
    first = opened(data, backbone, tmp_path / "features")
    computed.clear()
    moved = data.rename(tmp_path / "elsewhere")
    assert opened(moved, backbone, tmp_path / "features").folder == first.folder
    for path in moved.rglob("*.png"):
        os.utime(path, ns=(1, 1))
    again = opened(moved, backbone, tmp_path / "features")
    assert again.folder == first.folder and again.fingerprints == first.fingerprints and not computed


def test_all_that_changes_features_gives_another_store(scenes_root, backbone, backbone_file, tmp_path):
    other = Backbone(str(write_backbone(tmp_path / "other.safetensors", seed=1)), device="cpu", precision="float32")
    block = Backbone(str(backbone_file), block=0, device="cpu", precision="float32")
    half = Backbone(str(backbone_file), device="cpu", precision="bfloat16")
    root = tmp_path / "features"
    stores = [opened(scenes_root, network, root).folder for network in (backbone, other, block, half)]
    stores += [opened(scenes_root, backbone, root, **options).folder for options in (dict(mirror=True), dict(size=32))]
    stores.append(open_features(open_dataset("scenes", scenes_root, "val"), backbone, 64, root).folder)
    assert len(set(stores)) == 7


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("harm", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_shard_is_named(scenes_root, backbone, tmp_path, harm):
    features = opened(scenes_root, backbone, tmp_path)
    harm(features.folder / "shard-00001" / "features.npy")
    with pytest.raises(StegoError, match="shard-00001"):
        features.rows(torch.arange(12))
