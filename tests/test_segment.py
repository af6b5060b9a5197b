"""A folder of pictures in, label maps out."""

import numpy as np
import pandas as pd
import pytest
from common import tiny_experiment
from PIL import Image

from stego_lib import StegoError, evaluate, train
from stego_lib.run_folders import newest_run
from stego_lib.segment import segment_folder


@pytest.fixture(scope="module")
def run(scenes_root, backbone_file, tmp_path_factory):
    made = train(tiny_experiment(scenes_root, backbone_file), runs_dir=tmp_path_factory.mktemp("runs"))
    evaluate(made)
    return made


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures of mine"
    folder.mkdir()
    for name, size in (("wide ü.jpg", (90, 50)), ("tall.png", (40, 71)), ("grey.png", (64, 64))):
        image = Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
        (image.convert("L") if "grey" in name else image).save(folder / name)
    return folder


def test_label_maps_keep_size_and_agree_with_predict_and_table(run, pictures, tmp_path):
    table = segment_folder(run, pictures, tmp_path / "out")
    assert list(table.index) == sorted(path.name for path in pictures.iterdir())
    for path in pictures.iterdir():
        with Image.open(tmp_path / "out" / "labels" / f"{path.stem}.png") as stored, Image.open(path) as picture:
            label = np.array(stored)
            assert stored.size == picture.size
            colors = np.array(stored.getpalette()).reshape(-1, 3)
        assert np.array_equal(label, run.predict(path))
        for i, name in enumerate(run.classes.names):
            assert table.loc[path.name, name] == pytest.approx(100 * (label == i).mean())
            assert tuple(colors[i]) == run.classes.colors[i]
        with Image.open(tmp_path / "out" / "overlays" / f"{path.stem}.jpg") as overlay:
            assert overlay.size == label.shape[::-1]
    written = pd.read_csv(tmp_path / "out" / "areas.csv", index_col="picture")
    assert np.allclose(written.to_numpy(), table.to_numpy(), atol=0.01)


def test_what_cannot_be_done_is_said(run, pictures, tmp_path):
    with pytest.raises(StegoError, match="is not a folder"):
        segment_folder(run, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StegoError, match="holds no pictures"):
        segment_folder(run, tmp_path / "empty", tmp_path / "out")
    Image.new("RGB", (32, 32)).save(pictures / "tall.jpg")
    with pytest.raises(StegoError, match="several pictures are called tall"):
        segment_folder(run, pictures, tmp_path / "out")


def test_newest_run_is_the_last_one_made(run, tmp_path):
    assert newest_run(run.folder.parent) == run.folder
    with pytest.raises(StegoError, match="holds no run"):
        newest_run(tmp_path)
