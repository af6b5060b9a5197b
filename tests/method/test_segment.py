"""A folder of images in, label maps out."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest
from common import tiny_experiment
from PIL import Image

from stego_lib import StegoError, evaluate, load_run, open_dataset, train
from stego_lib.datasets import Classes
from stego_lib.segment import segment_folder
from stego_lib.utils.notices import Notice


@pytest.fixture(scope="module")
def run(scenes_root, backbone_file, tmp_path_factory):
    """A scored run with three clusters more than classes."""
    experiment = tiny_experiment(scenes_root, backbone_file, steps=2, extra_clusters=3)
    made = train(experiment, runs_dir=tmp_path_factory.mktemp("runs"))
    evaluate(made, baselines=False)
    return made


@pytest.fixture
def unscored(run, tmp_path):
    return load_run(shutil.copytree(run.folder, tmp_path / "unscored", ignore=shutil.ignore_patterns("metrics*")))


def stored(path):
    """The ids of a label map, and its palette."""
    with Image.open(path) as file:
        return np.array(file), [tuple(color) for color in np.array(file.getpalette()).reshape(-1, 3).tolist()]


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "images of mine"
    folder.mkdir()
    for name, size in (("wide ü.jpg", (90, 50)), ("tall.png", (40, 71)), ("gray.png", (64, 64))):
        image = Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
        (image.convert("L") if "gray" in name else image).save(folder / name)
    return folder


def test_label_maps_are_those_of_predict_and_areas_count_them(run, images, tmp_path):
    table = segment_folder(run, images, tmp_path / "out")
    assert list(table.index) == sorted(path.name for path in images.iterdir())
    assert list(table.columns) == list(run.segments.names) and len(table.columns) == 11
    np.testing.assert_allclose(table.sum(axis=1), 100)
    for path in images.iterdir():
        label, colors = stored(tmp_path / "out" / "labels" / f"{path.stem}.png")
        np.testing.assert_array_equal(label, run.predict(path))
        assert colors[:11] == list(run.segments.colors)
        np.testing.assert_allclose(table.loc[path.name], [100 * (label == i).mean() for i in range(11)])
        with Image.open(path) as image, Image.open(tmp_path / "out" / "overlays" / f"{path.stem}.jpg") as overlay:
            assert overlay.size == image.size == label.shape[::-1]
    written = pd.read_csv(tmp_path / "out" / "areas.csv", index_col="image")
    np.testing.assert_allclose(written.to_numpy(), table.to_numpy(), atol=0.01)


def test_clusters_without_a_class_keep_ids_of_their_own(run, unscored, images, tmp_path):
    matching = run.metrics["matching"]
    others = [cluster for cluster, class_ in enumerate(matching) if class_ < 0]
    ids = np.array([8 + others.index(c) if class_ < 0 else class_ for c, class_ in enumerate(matching)])
    for path in images.iterdir():
        np.testing.assert_array_equal(run.predict(path), ids[unscored.predict(path)])
    with pytest.warns(Notice, match="clusters without names"):
        table = segment_folder(unscored, images, tmp_path / "out")
    assert list(table.columns) == [f"cluster {i}" for i in range(11)]
    assert not set(unscored.segments.colors) & set(run.classes.colors)


def test_bad_folders_are_refused(run, images, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("nowhere", "empty"):
        with pytest.raises(StegoError, match=r"no image|does not exist"):
            segment_folder(run, tmp_path / folder, tmp_path / "out")
    with pytest.raises(StegoError, match="format"):
        segment_folder(run, images, tmp_path / "out", format="coco")
    with pytest.raises(StegoError, match="opacity"):
        segment_folder(run, images, tmp_path / "out", opacity=55)
    assert not (tmp_path / "out").exists()


def test_transparent_pixels_belong_to_no_segment(run, images, tmp_path):
    layered = Image.open(images / "tall.png").convert("RGBA")
    clear = np.zeros((71, 40), np.uint8)
    clear[:30] = 255
    layered.putalpha(Image.fromarray(255 - clear))
    layered.save(images / "layered.png")
    Image.new("LA", (20, 20), (128, 0)).save(images / "nothing.png")
    table = segment_folder(run, images, tmp_path / "out")
    ids, _ = stored(tmp_path / "out" / "labels" / "layered.png")
    assert ((ids == 255) == (clear == 255)).all()
    np.testing.assert_allclose(table.loc["layered.png"], [100 * (ids[30:] == i).mean() for i in range(11)])
    assert table.loc["nothing.png"].isna().all()
    for image in (images / "layered.png", layered):
        np.testing.assert_array_equal(run.predict(image), ids)


def test_images_are_turned_by_exif_unless_classes_json_says_otherwise(run, images, tmp_path):
    image = Image.open(images / "wide ü.jpg")
    exif = image.getexif()
    exif[274] = 6
    image.save(images / "turned.jpg", exif=exif)
    segment_folder(run, images, tmp_path / "out")
    assert stored(tmp_path / "out" / "labels" / "turned.png")[0].shape == (90, 50)
    (images / "classes.json").write_text('{"exif": "ignore"}')
    segment_folder(run, images, tmp_path / "again")
    assert stored(tmp_path / "again" / "labels" / "turned.png")[0].shape == (50, 90)


def test_a_broken_image_is_left_out_and_named(run, images, tmp_path):
    (images / "broken.png").write_bytes(b"no image")
    with pytest.warns(Notice, match=r"1 of 4 images .*broken\.png"):
        table = segment_folder(run, images, tmp_path / "out")
    assert len(table) == 3 and not (tmp_path / "out" / "labels" / "broken.png").exists()


def test_columns_differ_whatever_classes_are_called(run, images, tmp_path):
    renamed = load_run(run.folder)
    renamed.classes = Classes(("cluster 9", "image", "Cluster 10", *"defgh"), run.classes.colors)
    table = segment_folder(renamed, images, tmp_path / "out")
    written = pd.read_csv(tmp_path / "out" / "areas.csv", index_col="image")
    assert len(set(table.columns)) == 11 and list(written.columns) == list(table.columns)


def test_an_interrupted_call_goes_on_where_it_stopped(run, images, tmp_path, monkeypatch, capsys):
    whole = segment_folder(run, images, tmp_path / "whole")
    predict, calls = run.predict, []

    def until_killed(image, **how):
        calls.append(image)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict(image, **how)

    monkeypatch.setattr(run, "predict", until_killed)
    with pytest.raises(KeyboardInterrupt):
        segment_folder(run, images, tmp_path / "out")
    assert len(list((tmp_path / "out" / "labels").glob("*.png"))) == 1
    with open(tmp_path / "out" / "origin.jsonl", "a") as log:
        log.write('\n["0123", "half of a li')
    capsys.readouterr()
    table = segment_folder(run, images, tmp_path / "out")
    assert len(calls) == 2 + 2, "the first is not predicted again"
    assert re.search("2 images segmented .* 1 were up to date", capsys.readouterr().err)
    pd.testing.assert_frame_equal(table, whole)
    for path in (tmp_path / "whole").glob("*/*"):
        assert (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


def test_only_results_of_the_same_file_run_and_settings_are_kept(run, unscored, images, tmp_path, capsys):
    def kept(*arguments, **how):
        capsys.readouterr()
        segment_folder(*arguments, **how)
        match = re.search(r"(\d+) were up to date", capsys.readouterr().err)
        return int(match[1]) if match else 0

    out = tmp_path / "out"
    assert kept(run, images, out) == 0 and kept(run, images, out) == 3
    Image.new("RGB", (40, 71), "red").save(images / "tall.png")
    assert kept(run, images, out) == 2, "another image of the same name"
    np.testing.assert_array_equal(stored(out / "labels" / "tall.png")[0], run.predict(images / "tall.png"))
    (out / "overlays" / "tall.jpg").unlink()
    assert kept(run, images, out) == 2, "a missing overlay"
    assert kept(run, images, out, 0.2) == 0
    for how in ({"refine": "crf"}, {"size": 32}, {"tile": 32}):
        assert kept(run, images, out, **how) == 0 and kept(run, images, out, **how) == 3
        expected = run.predict(images / "wide ü.jpg", **how)
        np.testing.assert_array_equal(stored(out / "labels" / "wide ü.png")[0], expected)
    unscored.name_segments({"cluster 1": "tree", "cluster 2": "tree"})
    assert kept(unscored, images, out) == 0 and kept(unscored, images, out) == 3
    unscored.name_segments({"cluster 1": None, "cluster 2": "tree"})
    assert kept(unscored, images, out) == 0
    scribbles = np.full((71, 40), 255, np.uint8)
    scribbles[:20], scribbles[50:] = 0, 1
    for labels in (scribbles, np.where(scribbles == 255, 255, 1 - scribbles)):
        unscored.teach([images / "tall.png"], [labels], names=["a", "b"])
        assert kept(unscored, images, out) == 0 and kept(unscored, images, out) == 3


@pytest.mark.parametrize("name", ["labels/tall.png", "instances.json"])
def test_files_of_others_and_files_changed_since_are_not_overwritten(run, images, tmp_path, name):
    formats = ("png", "coco-instances")
    (tmp_path / "foreign" / name).parent.mkdir(parents=True)
    (tmp_path / "foreign" / name).write_bytes(b"mine")
    with pytest.raises(StegoError, match=name):
        segment_folder(run, images, tmp_path / "foreign", format=formats)
    assert [path.name for path in (tmp_path / "foreign").rglob("*.*")] == [name.split("/")[-1]]

    segment_folder(run, images, tmp_path / "out", format=formats)
    corrected = (tmp_path / "out" / name).read_bytes() + b" "
    (tmp_path / "out" / name).write_bytes(corrected)
    with pytest.raises(StegoError, match=name):
        segment_folder(run, images, tmp_path / "out", format=formats)
    assert (tmp_path / "out" / name).read_bytes() == corrected
    segment_folder(run, images, tmp_path / "out", format=formats, overwrite=True)
    assert (tmp_path / "out" / name).read_bytes() != corrected
    segment_folder(run, images, tmp_path / "out", format=formats)


def test_names_of_any_kind_are_known_again(run, images, tmp_path, capsys):
    for name in ("price$HOME.png", "a b  c.png", "two\nlines.png", "two\u2028lines.png", "sur\udce4.png"):
        Image.new("RGB", (20, 20), "red").save(images / name)
    table = segment_folder(run, images, tmp_path / "out")
    written = {path.stem for path in (tmp_path / "out" / "labels").iterdir()}
    assert written == {path.stem for path in images.iterdir()} and len(table) == 8
    segment_folder(run, images, tmp_path / "out")
    assert "8 were up to date" in capsys.readouterr().err


@pytest.mark.parametrize("names", [("tall.png", "tall.jpg"), ("tall.png", "TALL.jpg"), ("\u00fc.png", "u\u0308.png")])
def test_names_that_would_collide_are_refused_before_work(run, images, tmp_path, names):
    for name in names:
        Image.new("RGB", (32, 32)).save(images / name)
    with pytest.raises(StegoError, match="same file name"):
        segment_folder(run, images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_was_segmented_into_itself_can_be_trained_on(run, images, tmp_path):
    for image in images.iterdir():
        (tmp_path / "data" / "imgs" / "train").mkdir(parents=True, exist_ok=True)
        image.rename(tmp_path / "data" / "imgs" / "train" / image.name)
    for folder in (tmp_path / "data" / "imgs" / "train", tmp_path / "data"):
        segment_folder(run, tmp_path / "data" / "imgs" / "train", folder, format=("coco-panoptic", "labelme"))
        dataset = open_dataset("folder", tmp_path / "data", "train")
        assert len(dataset) == 3 and not dataset.has_labels


def test_an_input_is_never_an_output(run, images, tmp_path):
    images.rename(tmp_path / "labels")
    before = {path: path.read_bytes() for path in (tmp_path / "labels").iterdir()}
    with pytest.raises(StegoError, match="labels"):
        segment_folder(run, tmp_path / "labels", tmp_path, overwrite=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "labels").iterdir()}
