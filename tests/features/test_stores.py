"""Feature stores that are damaged, stale, or cannot be written: noticed, and computed anew or refused."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from common import write_backbone

from stego_lib import StegoError, open_dataset
from stego_lib.backbone import Backbone
from stego_lib.features.opening import open_store
from stego_lib.utils.notices import Notice

EXACT = dict(device="cpu", precision="float32")


@pytest.fixture(scope="module")
def backbone(backbone_file) -> Backbone:
    return Backbone(str(backbone_file), **EXACT)


@pytest.fixture(scope="module")
def whole(scenes_root, backbone, tmp_path_factory):
    """A store that is good. Not to be changed."""
    return open_store(open_dataset("scenes", scenes_root, "val"), backbone, 64, tmp_path_factory.mktemp("whole"))


def flip(path: Path, where: float, keep_time: bool = False) -> None:
    """Turns one bit round, `where` of the way through the file."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 4
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut(path: Path, part: float) -> None:
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])


DAMAGE = {
    "features cut short": lambda f: cut(f / "features.npy", 0.5),
    "features cut by a byte": lambda f: (f / "features.npy").write_bytes((f / "features.npy").read_bytes()[:-1]),
    "features empty": lambda f: cut(f / "features.npy", 0),
    "features longer": lambda f: (f / "features.npy").write_bytes((f / "features.npy").read_bytes() + b"x"),
    "features missing": lambda f: (f / "features.npy").unlink(),
    "a bit of the features": lambda f: flip(f / "features.npy", 0.5),
    "the last bit of the features": lambda f: flip(f / "features.npy", 1),
    "a bit of the header": lambda f: flip(f / "features.npy", 0.0005),
    "a bit of the images": lambda f: flip(f / "images.npy", 0.3),
    "a bit of the labels": lambda f: flip(f / "labels.npy", 0.7),
    "a bit of what neighbors are found by": lambda f: flip(f / "pooled.npy", 0.9),
    "other features": lambda f: np.save(f / "features.npy", np.load(f / "features.npy")[::-1]),
    "features of another type": lambda f: np.save(f / "features.npy", np.load(f / "features.npy").astype(np.float32)),
    "features of fewer images": lambda f: np.save(f / "features.npy", np.load(f / "features.npy")[:-1]),
    "images swapped with labels": lambda f: shutil.copy(f / "labels.npy", f / "images.npy"),
    "no about.json": lambda f: (f / "about.json").unlink(),
    "half of about.json": lambda f: cut(f / "about.json", 0.5),
    "about.json of another kind": lambda f: (f / "about.json").write_text("[]"),
    "an empty folder": lambda f: [path.unlink() for path in f.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_store_is_noticed_and_computed_anew(whole, scenes_root, backbone, tmp_path, damage):
    folder = shutil.copytree(whole.folder, tmp_path / whole.folder.name)
    damage(folder)
    with pytest.warns(Notice, match=rf"{folder.name} is damaged \(.+\); its features are computed anew"):
        again = open_store(open_dataset("scenes", scenes_root, "val"), backbone, 64, tmp_path)
    assert again.folder == folder
    for name in ("features", "images", "pooled", "labels"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
    open_store(open_dataset("scenes", scenes_root, "val"), backbone, 64, tmp_path)  # and no notice a second time


def test_a_bit_that_rots_on_the_disk_is_noticed_by_the_next_process(whole, scenes_root, backbone_file, tmp_path):
    """Rot changes no time of change: size and time alone would not tell."""
    import subprocess

    folder = shutil.copytree(whole.folder, tmp_path / whole.folder.name)
    flip(folder / "features.npy", 0.4, keep_time=True)
    code = (
        "import sys, numpy as np; from stego_lib.features import extraction;"
        "print(extraction.problem(__import__('pathlib').Path(sys.argv[1]),"
        f"{{'features': (np.float16, {whole.features.shape})}}))"
    )
    found = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "features.npy is not what was written"


def test_what_a_killed_extraction_left_is_removed(whole, scenes_root, backbone, tmp_path):
    """Its folder is named after the store, and never taken for it."""
    left = tmp_path / f".{whole.folder.name}.part"
    left.mkdir()
    (left / "features.npy").write_bytes(b"half")
    store = open_store(open_dataset("scenes", scenes_root, "val"), backbone, 64, tmp_path)
    np.testing.assert_array_equal(store.features, whole.features)
    assert not left.exists()


def test_a_stale_store_is_not_used(scenes_root, backbone, tmp_path):
    """An image that changed, were it by a touch, makes another store."""
    root = shutil.copytree(scenes_root, tmp_path / "data")
    stores = [open_store(open_dataset("scenes", root, "val"), backbone, 64, tmp_path / "s").folder]
    image = open_dataset("scenes", root, "val").images[0]
    shutil.copy(open_dataset("scenes", root, "val").images[1], image)
    stores.append(open_store(open_dataset("scenes", root, "val"), backbone, 64, tmp_path / "s").folder)
    assert stores[0] != stores[1]


def test_features_that_are_no_numbers_are_refused(scenes_root, tmp_path):
    """Weights that overflow would else spoil every run that uses the store."""
    spoilt = Backbone(str(write_backbone(tmp_path / "spoilt.safetensors")), **EXACT)
    with torch.no_grad():
        spoilt.vit.norm.weight.mul_(1e30)
    with pytest.raises(StegoError, match=r"spoilt.*features that are not finite numbers, or too large"):
        open_store(open_dataset("scenes", scenes_root, "val"), spoilt, 64, tmp_path / "s")
    assert [path.name for path in (tmp_path / "s").iterdir() if path.suffix != ".lock"] == [".contents"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_data_folder_that_cannot_be_written_serves_with_the_store_elsewhere(scenes_root, backbone):
    """As an ordinary user: root may write anywhere. And a store elsewhere that cannot be written is named."""
    base = Path(tempfile.mkdtemp(prefix="stego-"))  # pytest's folders are closed to other users
    try:
        data = shutil.copytree(scenes_root, base / "data")
        (base / "out").mkdir()
        (base / "closed").mkdir()
        for path in [base, data, *data.rglob("*"), base / "closed"]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        (base / "out").chmod(0o777)
        base.chmod(0o755)
        if (pid := os.fork()) == 0:
            status = 1
            try:
                if os.getuid() == 0:
                    os.setgid(65534)
                    os.setuid(65534)
                torch.set_num_threads(1)
                dataset = open_dataset("scenes", data, "val")
                store = open_store(dataset, backbone, 64, base / "out")
                try:
                    open_store(dataset, backbone, 64, base / "closed" / "features")
                except StegoError as error:
                    said = str(error)
                assert len(store) == 6 and "closed" in said and "cannot be written (Permission denied)" in said
                assert not os.access(data, os.W_OK), "else this test shows nothing"
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert len(list((base / "out").glob("scenes-val-*"))) == 1
    finally:
        for path in [base, *base.rglob("*")]:
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(base)
