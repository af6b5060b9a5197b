"""Files from strangers: checkpoints, stores, archives, images that try to run code, to write elsewhere or to fill the memory.

Each attack is refused with an error that names the file, runs nothing, writes nothing outside its folder and takes little
memory.
"""

import html
import io
import pickle
import re
import resource
import shutil
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attacks import ATTACKS, ROOM, Lair, dino, rezipped, with_pickle
from common import tiny_experiment, write_backbone
from PIL import Image
from project_code import calls, sources
from released import OPTIONS, tensors, write_ckpt

from stego_book.plots import grids
from stego_lib import StegoError, load_run, open_dataset, train
from stego_lib.backbone import Backbone
from stego_lib.networks.pickles import load_inert
from stego_lib.segment import segment_folder
from stego_lib.utils.notices import Notice


@pytest.fixture(scope="module")
def good(scenes_root, backbone_file, tmp_path_factory) -> Path:
    """A run and its store. Not to be changed."""
    return train(tiny_experiment(scenes_root, backbone_file, steps=1), runs_dir=tmp_path_factory.mktemp("good")).folder


@pytest.fixture
def lair(good, backbone_file, tmp_path) -> Lair:
    (store,) = (path for path in (good.parent / "features").iterdir() if not path.name.startswith("."))
    run = shutil.copytree(good, tmp_path / "in" / "run")
    return Lair(
        tmp_path / "in", tmp_path / "ran", run, shutil.copytree(store, tmp_path / "in" / "store"), backbone_file
    )


@contextmanager
def little_memory() -> Any:
    """Lets the process take `ROOM` more address space than it has, so that an attack which succeeds harms nobody."""
    if sys.platform != "linux":
        yield
        return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused(lair, name):
    path, use = ATTACKS[name](lair)
    before = {found for found in lair.folder.parent.rglob("*") if "target" not in found.parts}
    with little_memory(), pytest.raises(StegoError) as caught:
        use()
    message = str(caught.value)
    assert path.name in message, message
    assert not re.search("MemoryError|allocate", message), f"it was let in as far as the memory reached: {message}"
    assert not lair.marker.exists(), "code of the file was run"
    after = {found for found in lair.folder.parent.rglob("*") if "target" not in found.parts}
    assert after == before and not Path("/tmp/stego-escaped").exists(), "something was written outside"
    assert not [found for found in lair.folder.rglob("target/**/*") if found.is_file() or found.is_symlink()]


def test_the_attacks_work_where_nobody_prevents_them(lair):
    """Else they would show nothing."""
    pickle.loads(pickle.dumps(lair.call))
    assert lair.marker.exists()
    lair.marker.unlink()
    path, _ = ATTACKS["a store with a pickle for features"](lair)
    np.load(lair.store / path.name, allow_pickle=True)
    assert lair.marker.exists()


def test_good_files_pass(lair):
    """The same guards let files through that are as they should be."""
    assert load_run(lair.run).step == 1
    assert load_run(write_ckpt(lair.folder / "good.ckpt", tensors(), options=OPTIONS), device="cpu").step == 7000
    torch.save(dino(), lair.folder / "good.pth")
    assert Backbone(str(lair.folder / "good.pth"), device="cpu").dim == 64
    assert Backbone(str(write_backbone(lair.folder / "good.safetensors")), device="cpu").dim == 32


def test_a_tensor_larger_than_its_file_is_refused(tmp_path):
    """One number may say that it is a billion; whoever copies it would find out."""
    torch.save({"a": torch.zeros(1).expand(10**9)}, tmp_path / "swollen.ckpt")
    with pytest.raises(StegoError, match=r"swollen\.ckpt .*its tensors claim 4,000,000,000 bytes, the file has"):
        load_inert(tmp_path / "swollen.ckpt")


def test_a_reference_to_anything_but_bytes_of_the_file_is_refused(tmp_path):
    class Referring(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return value if isinstance(value, tuple) else None

    for number, reference in enumerate(
        [("file", torch.FloatStorage, "0", "cpu", 1), ("storage", "float", "0", "cpu", 1)]
    ):
        with io.BytesIO() as buffer:
            Referring(buffer, 2).dump({"a": reference})
            path = with_pickle(tmp_path / f"{number}.ckpt", buffer.getvalue())
        with pytest.raises(StegoError, match=r"\.ckpt cannot be read .*is no storage"):
            load_inert(path)


def test_numbers_of_other_machines_and_empty_tensors(tmp_path):
    values = {"none": torch.empty(0, 3), "some": torch.arange(3.0)}
    torch.save(values, tmp_path / "good.ckpt")
    found = load_inert(tmp_path / "good.ckpt")
    assert found["none"].shape == (0, 3) and torch.equal(found["some"], values["some"])
    rezipped(tmp_path / "good.ckpt", lambda name, content: b"big" if name.endswith("byteorder") else content)
    with pytest.raises(StegoError, match=r"good\.ckpt cannot be read .*big-endian"):
        load_inert(tmp_path / "good.ckpt")


def without_order(path: Path, folders: tuple[str, ...] = ("archive",)) -> Path:
    """A file as PyTorch wrote it before it named the order of bytes; with each of the folders in it."""
    torch.save({"a": torch.arange(3.0)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for folder in folders:
            for name in members.keys() - {"byteorder"}:
                archive.writestr(f"{folder}/{name}", members[name])
    return path


def test_files_of_earlier_versions_are_read_and_two_in_one_are_refused(tmp_path):
    assert torch.equal(load_inert(without_order(tmp_path / "old.ckpt"))["a"], torch.arange(3.0))
    with pytest.raises(StegoError, match=r"two\.ckpt cannot be read"):
        load_inert(without_order(tmp_path / "two.ckpt", ("archive", "other")))


# ---------------------------------------------------------------------------------------------- what stands in the code


MAKING = {"tests/attacks.py", "tests/robustness/test_hostile.py", "tests/published/test_published.py"}
"""They make attacks, and show that they work."""


def test_no_code_loads_pickles():
    """`torch.load` stands nowhere without weights_only=True, nor any other way to have a file run code."""
    seen = 0
    for name, tree in sources().items():
        for called, words in calls(tree):
            if called in ("torch.load", "load") and "weights_only" in words:
                seen += 1
            if called == "torch.load":
                assert words.get("weights_only") == "True", f"{name}: torch.load without weights_only=True"
            if name in MAKING:
                continue
            assert words.get("allow_pickle") in (None, "False"), f"{name}: allow_pickle"
            assert called not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "os.system"), f"{name}: {called}"
            assert called not in ("eval", "exec") or name.startswith("tests/"), f"{name}: {called}"
            assert not called.endswith((".extractall", ".extract")), f"{name}: {called} (use stego_lib.datasets.unpack)"
            assert called not in ("yaml.load", "joblib.load", "pd.read_pickle", "torch.jit.load", "torch.hub.load"), (
                f"{name}: {called}"
            )
            assert words.get("shell") in (None, "False"), f"{name}: a shell"
    assert seen > 3, "the test looks at calls of torch.load"


# ---------------------------------------------------------------------------------------------- names that hold HTML


NAMES = ("<img src=x onerror=alert(1)>", "$\\frac{$ & <b>", "a\nb")


def test_names_of_files_are_text_in_tables_and_figures(lair, good):
    """A name may hold HTML, which a notebook would run, or TeX, which a figure would fail on."""
    folder = lair.folder / "images"
    folder.mkdir()
    for name in NAMES:
        Image.new("RGB", (32, 32)).save(folder / f"{name.replace('/', '')}.png")
    run = load_run(good)
    with pytest.warns(Notice, match="was not scored with labels"):
        areas = segment_folder(run, folder, lair.folder / "out")
    shown = areas._repr_html_()
    assert "<img" not in shown and "<b>" not in shown and html.escape("<img src=x") in shown
    for figure in (
        grids.image_grid({NAMES[0]: [np.zeros((8, 8, 3), np.uint8)]}, titles=[NAMES[1]]),
        grids.examples(open_folder_of(lair, folder), range(len(NAMES))),
    ):
        with io.BytesIO() as buffer:
            figure.savefig(buffer, format="svg")
            assert b"<img" not in buffer.getvalue()


def open_folder_of(lair: Lair, images: Path) -> Any:
    (lair.folder / "data" / "imgs").mkdir(parents=True)
    shutil.copytree(images, lair.folder / "data" / "imgs" / "train")
    return open_dataset("folder", lair.folder / "data", "train")
