"""What users do wrong, and what their data are like: one clear error each, before any training, that says what to do.

The cases stand in bad_input.py: each breaks one thing in a small dataset, a run or a call that was good. Parameters of
`Experiment` out of range have a table of their own in test_experiment.py. Odd but valid input works.
"""

import re
import shutil

import numpy as np
import pytest
from bad_input import CASES, SIDE, TRAIN, VAL, VALID, World, noise
from PIL import Image
from standins import flat_png

from stego_lib import StegoError, load_run, open_dataset, train, training
from stego_lib.utils.notices import Notice


@pytest.fixture(scope="module")
def template(tmp_path_factory, backbone_file) -> World:
    root = tmp_path_factory.mktemp("template")
    for split, count in (("train", TRAIN), ("val", VAL)):
        for kind in ("imgs", "labels"):
            (root / "folder" / kind / split).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(noise(SIDE, SIDE, 3, seed=i)).save(root / "folder" / "imgs" / split / f"{i}.png")
            Image.fromarray(noise(SIDE, SIDE, high=3, seed=i)).save(root / "folder" / "labels" / split / f"{i}.png")
    (root / "folder" / "classes.json").write_text('{"names": ["road", "tree", "car"]}')
    world = World(root, backbone_file, None)
    world.finished = world.train()
    return world


@pytest.fixture
def world(template, tmp_path) -> World:
    shutil.copytree(template.folder, tmp_path / "folder")
    run = shutil.copytree(template.finished.folder, tmp_path / "runs" / "finished")
    return World(tmp_path, template.backbone, load_run(run))


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_clear_error(world, monkeypatch, name):
    """It is raised before training begins, and names the place, the fault and the remedy."""
    use, said = CASES[name]
    monkeypatch.setattr(training, "train_step", lambda *_: pytest.fail("training began"))
    with pytest.raises(StegoError) as caught:
        use(world)
    message = str(caught.value)
    missing = [pattern for pattern in said if not re.search(pattern, message)]
    assert not missing, f"the error does not say {missing}: {message}"
    assert "Traceback" not in message and len(message) < 1500
    left = [path for path in world.root.rglob("*") if path.name.endswith(".part")]
    assert not left and not [path for path in world.root.glob("runs/*/log.csv") if "finished" not in str(path)]


def test_there_are_enough_cases():
    """The number stands in the report of `make torture`."""
    assert len(CASES) >= 60 and len(VALID) >= 12


@pytest.mark.parametrize("name", VALID)
def test_odd_input_works(world, name):
    VALID[name](world)
    assert [path for path in world.root.rglob("checkpoint.pt") if "finished" not in str(path)]


def test_a_turned_image_agrees_with_its_upright_label_map(world):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(SIDE, 2 * SIDE, 3)).save(world.image(), exif=exif)
    Image.fromarray(noise(2 * SIDE, SIDE, high=3)).save(world.label())
    image, label = open_dataset("folder", world.root, "train")[2]
    assert image.shape[1:] == label.shape == (2 * SIDE, SIDE)
    with pytest.warns(Notice, match=r"1 of 5 images are turned upright.*orientation 6: 1.*\"exif\": \"ignore\""):
        world.train()


def test_sixteen_bits_become_eight(world):
    """Pillow's own conversion would make every value above 255 white."""
    Image.fromarray(np.array([[0, 256 * 10, 256 * 128 + 255, 65_535]], np.uint16)).save(world.image())
    assert open_dataset("folder", world.root, "train").image(2)[0].tolist() == [[0, 10, 128, 255]]
    Image.fromarray(np.full((SIDE, SIDE), 40_000, np.uint16)).save(world.image())
    with pytest.warns(Notice, match="1 of 5 images hold 16-bit grayscale; 0 to 65,535 become 8 bits"):
        world.train()


def test_a_image_of_a_hundred_megapixels_can_be_read(world):
    """Aerial images are as large; Pillow warns, and refuses above 179."""
    flat_png(world.image(), 10_000)
    with pytest.warns(Image.DecompressionBombWarning):
        assert open_dataset("folder", world.root, "train").image(2).shape == (3, 10_000, 10_000)


def test_what_is_passed_over_is_said(world):
    """A run that cannot be read does not stop another one from being resumed."""
    (world.finished.folder / "experiment.json").write_text("{")
    with pytest.warns(Notice, match=r"finished/experiment\.json is passed over"):
        train(world.experiment(), runs_dir=world.root / "runs", resume=True)
