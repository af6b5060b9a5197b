"""A folder of images in, label maps out."""

import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from common import ROOT, tiny_experiment
from PIL import Image

from stego_lib import StegoError, evaluate, load_run, train
from stego_lib.datasets import Classes
from stego_lib.run import newest_run
from stego_lib.segment import segment_folder
from stego_lib.utils.notices import Notice


@pytest.fixture(scope="module")
def run(scenes_root, backbone_file, tmp_path_factory):
    made = train(tiny_experiment(scenes_root, backbone_file), runs_dir=tmp_path_factory.mktemp("runs"))
    evaluate(made, baselines=False)
    return made


@pytest.fixture(scope="module")
def wide(scenes_root, backbone_file, tmp_path_factory):
    """A run with three clusters more than classes, scored."""
    experiment = tiny_experiment(scenes_root, backbone_file, steps=2, extra_clusters=3)
    made = train(experiment, runs_dir=tmp_path_factory.mktemp("wide"))
    evaluate(made, baselines=False)
    return made


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


def test_label_maps_keep_size_and_agree_with_predict_and_table(run, images, tmp_path):
    table = segment_folder(run, images, tmp_path / "out")
    assert list(table.index) == sorted(path.name for path in images.iterdir())
    for path in images.iterdir():
        with Image.open(tmp_path / "out" / "labels" / f"{path.stem}.png") as stored, Image.open(path) as image:
            label = np.array(stored)
            assert stored.size == image.size
            colors = np.array(stored.getpalette()).reshape(-1, 3)
        assert np.array_equal(label, run.predict(path))
        for i, name in enumerate(run.classes.names):
            assert table.loc[path.name, name] == pytest.approx(100 * (label == i).mean())
            assert tuple(colors[i]) == run.classes.colors[i]
        with Image.open(tmp_path / "out" / "overlays" / f"{path.stem}.jpg") as overlay:
            assert overlay.size == label.shape[::-1]
    written = pd.read_csv(tmp_path / "out" / "areas.csv", index_col="image")
    assert np.allclose(written.to_numpy(), table.to_numpy(), atol=0.01)


def test_what_cannot_be_done_is_said(run, images, tmp_path):
    with pytest.raises(StegoError, match="is not a folder"):
        segment_folder(run, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StegoError, match="holds no images"):
        segment_folder(run, tmp_path / "empty", tmp_path / "out")
    Image.new("RGB", (32, 32)).save(images / "tall.jpg")
    with pytest.raises(StegoError, match="several images are called tall"):
        segment_folder(run, images, tmp_path / "out")


def test_newest_run_is_the_last_one_made(run, tmp_path):
    assert newest_run(run.folder.parent) == run.folder
    with pytest.raises(StegoError, match="holds no run"):
        newest_run(tmp_path)


def test_segments_of_a_run_that_was_not_scored_are_clusters(run, images, tmp_path):
    """Neither names nor colors of classes: a cluster has the number of some class, and nothing else of it."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("experiment.json", "classes.json", "checkpoint.safetensors"):
        (folder / name).write_bytes((run.folder / name).read_bytes())
    bare = load_run(folder)
    with pytest.warns(Notice, match=r"was not scored with labels, so its segments are clusters .* evaluate\(run\)"):
        table = segment_folder(bare, images, tmp_path / "out")
    assert list(table.columns) == [f"cluster {i}" for i in range(8)] == list(bare.segments.names) and not bare.matched
    np.testing.assert_allclose(table.sum(axis=1), 100)
    ids, colors = stored(tmp_path / "out" / "labels" / "tall.png")
    assert not set(bare.segments.colors) & set(run.classes.colors) and len(set(bare.segments.colors)) == 8
    assert colors[:8] == list(bare.segments.colors)
    for i in range(8):
        assert table.loc["tall.png", f"cluster {i}"] == pytest.approx(100 * (ids == i).mean())
    matching = np.array(run.metrics["matching"])
    np.testing.assert_array_equal(matching[ids], run.predict(images / "tall.png"))


def test_a_record_of_other_weights_names_nothing(run, tmp_path):
    """Such as that of an earlier step, before training went on."""
    folder = tmp_path / "run"
    folder.mkdir()
    for path in run.folder.glob("*.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    record = (folder / "metrics.json").read_text()
    (folder / "metrics.json").write_text(re.sub(r'"step": 7\b', '"step": 5', record))
    assert load_run(run.folder).matched and not load_run(folder).matched


def test_clusters_without_a_class_have_ids_names_and_colors_of_their_own(wide, images, tmp_path):
    table = segment_folder(wide, images, tmp_path / "out")
    matching = wide.metrics["matching"]
    others = [cluster for cluster, class_ in enumerate(matching) if class_ < 0]
    assert list(table.columns) == [*wide.classes.names, *(f"cluster {cluster}" for cluster in others)]
    assert len(others) == 3 and table.iloc[:, 8:].to_numpy().sum() > 0, "else this test shows nothing"
    np.testing.assert_allclose(table.sum(axis=1), 100)
    assert len(set(wide.segments.colors)) == 11 and wide.segments.colors[:8] == wide.classes.colors
    bare = load_run(wide.folder)
    bare.folder = tmp_path  # without a record: clusters as they are
    for path in images.iterdir():
        ids, colors = stored(tmp_path / "out" / "labels" / f"{path.stem}.png")
        clusters = bare.predict(path)
        for cluster, class_ in enumerate(matching):
            id_ = class_ if class_ >= 0 else 8 + others.index(cluster)
            assert ((ids == id_) == (clusters == cluster)).all()
            assert table.loc[path.name].iloc[id_] == pytest.approx(100 * (ids == id_).mean())
        assert colors[:11] == list(wide.segments.colors)


def test_transparent_pixels_belong_to_no_segment(run, images, tmp_path):
    layered = Image.open(images / "tall.png").convert("RGBA")
    clear = np.zeros((71, 40), np.uint8)
    clear[:30] = 255
    layered.putalpha(Image.fromarray(255 - clear))
    layered.save(images / "layered.png")
    Image.new("LA", (20, 20), (128, 0)).save(images / "nothing.png")
    with pytest.warns(Notice, match="2 of 5 images have transparent pixels, which belong to no segment"):
        table = segment_folder(run, images, tmp_path / "out")
    ids, _ = stored(tmp_path / "out" / "labels" / "layered.png")
    assert ((ids == 255) == (clear == 255)).all()
    shares = [100 * (ids[30:] == i).mean() for i in range(8)]
    np.testing.assert_allclose(table.loc["layered.png"], shares)
    assert sum(shares) == pytest.approx(100) and table.loc["nothing.png"].isna().all()
    for form in (images / "layered.png", layered):
        np.testing.assert_array_equal(run.predict(form), ids)


def test_deep_images_are_taken_the_same_way_from_files_and_from_memory(run, tmp_path):
    """Pillow itself would cut 16 bits off at 255."""
    deep = np.random.default_rng(0).integers(0, 65535, (40, 56), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    expected = run.predict(Image.fromarray((deep >> 8).astype(np.uint8)))
    np.testing.assert_array_equal(run.predict(tmp_path / "deep.png"), expected)
    np.testing.assert_array_equal(run.predict(Image.fromarray(deep)), expected)
    with pytest.raises(StegoError, match="nothing says which are black and white"):
        run.predict(Image.fromarray(deep >> 4))


def test_images_that_exif_turns_are_said_and_can_be_left_as_stored(run, images, tmp_path):
    image = Image.open(images / "wide ü.jpg")
    exif = image.getexif()
    exif[274] = 6
    image.save(images / "turned.jpg", exif=exif)
    with pytest.warns(Notice, match=r"1 of 4 images are turned upright .* write \{\"exif\": \"ignore\"\} into"):
        segment_folder(run, images, tmp_path / "out")
    assert stored(tmp_path / "out" / "labels" / "turned.png")[0].shape == (90, 50)
    (images / "classes.json").write_text('{"exif": "ignore"}')
    segment_folder(run, images, tmp_path / "again")
    assert stored(tmp_path / "again" / "labels" / "turned.png")[0].shape == (50, 90)


def test_what_is_left_out_of_a_folder_is_said_in_one_line(run, images, tmp_path):
    (images / "a.heic").write_bytes(b"x")
    (images / "more").mkdir()
    Image.new("RGB", (8, 8)).save(images / "more" / "b.png")
    (images / "._tall.png").write_bytes(b"x")
    with pytest.warns(Notice, match=r"left out of .*: 1 \.heic .*, images in subfolders: 1 \(more;") as told:
        table = segment_folder(run, images, tmp_path / "out")
    assert len(table) == 3 and len(told) == 1


@pytest.mark.parametrize("names", [("cluster 9", "image", "c", "d", "e", "f", "g", "h"), (*"abcdefg", "Cluster 10")])
def test_no_column_is_lost_whatever_classes_are_called(wide, images, tmp_path, names):
    run = load_run(wide.folder)
    run.classes = Classes(names, run.classes.colors)
    table = segment_folder(run, images, tmp_path / "out")
    written = pd.read_csv(tmp_path / "out" / "areas.csv", index_col="image")
    assert len(table.columns) == len(set(table.columns)) == 11 and list(written.columns) == list(table.columns)
    np.testing.assert_allclose(written.sum(axis=1), 100, atol=0.1)


def test_a_strip_longer_than_a_jpeg_can_be(run, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("L", (66_000, 3), 90).save(tmp_path / "in" / "line.png")
    with pytest.warns(Notice, match="more than 4 times as long"):
        table = segment_folder(run, tmp_path / "in", tmp_path / "out")
    assert stored(tmp_path / "out" / "labels" / "line.png")[0].shape == (3, 66_000)
    assert table.sum(axis=1).item() == pytest.approx(100)
    with Image.open(tmp_path / "out" / "overlays" / "line.jpg") as overlay:
        assert overlay.width <= 65_500


MEASURED = """
import re, sys
from pathlib import Path
from stego_lib import load_run
from stego_lib.segment import segment_folder

run, small, large, out = load_run(sys.argv[1]), *map(Path, sys.argv[2:])


def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])


segment_folder(run, small, out)
before = peak()
segment_folder(run, large, out)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_large_image_takes_the_memory_of_its_pixels_and_no_more(run, tmp_path):
    """Four bytes per pixel in Pillow, three as an array, one of the label map; in place of four for each cluster."""
    for name, size in (("small", (80, 60)), ("large", (3000, 3000))):
        (tmp_path / name).mkdir()
        Image.radial_gradient("L").resize(size).convert("RGB").save(tmp_path / name / "a.jpg")
    arguments = [run.folder, tmp_path / "small", tmp_path / "large", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 0 < int(done.stdout.split()[-1]) * 1024 / 3000**2 < 16


def test_label_maps_of_others_are_not_overwritten(run, images, tmp_path):
    (tmp_path / "labels").mkdir()
    Image.new("L", (40, 71), 3).save(tmp_path / "labels/tall.png")
    with pytest.raises(
        StegoError, match=r"labels holds tall\.png already, which was not made by segmenting; name another output"
    ):
        segment_folder(run, images, tmp_path)
    assert stored_ids(tmp_path / "labels/tall.png") == {3}
    segment_folder(run, images, tmp_path / "out")
    segment_folder(run, images, tmp_path / "out")


def stored_ids(path):
    with Image.open(path) as file:
        return set(np.unique(np.array(file)).tolist())


@pytest.mark.parametrize("opacity", [-0.1, 2, float("nan"), "0.5", True, None], ids=str)
def test_an_opacity_out_of_range_is_refused_before_anything_is_written(tmp_path, opacity):
    with pytest.raises(StegoError, match=r"opacity = .*a number from 0"):
        segment_folder(None, tmp_path, tmp_path / "out", opacity)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_broken_image_is_left_out_and_the_others_are_segmented(run, images, tmp_path):
    (images / "broken.png").write_bytes(b"no image")
    with pytest.warns(Notice, match=r"1 of \d+ images are left out, for they cannot be read; the first: .*broken\.png"):
        areas = segment_folder(run, images, tmp_path / "out")
    assert len(areas) == len(list((tmp_path / "out" / "labels").iterdir())) > 0 and "broken.png" not in areas.index


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4, 3), object), np.float32(1), np.zeros((4, 4)), np.zeros((0, 4, 3), np.uint8), None],
    ids=str,
)
def test_what_is_no_image_is_refused_in_words(run, image):
    with pytest.raises(StegoError, match="must be uint8 with three channels"):
        run.predict(image)


def test_what_was_segmented_is_kept_after_a_kill_and_the_rest_is_as_in_one_go(
    run, images, tmp_path, monkeypatch, capsys
):
    """A kill in the middle is an exception here; files are written atomically, so both leave the same."""
    for i in range(9):
        Image.radial_gradient("L").resize((40 + i, 60)).convert("RGB").save(images / f"more{i}.png")
    whole = segment_folder(run, images, tmp_path / "whole")
    predict, calls = run.predict, []

    def until_killed(image):
        calls.append(image)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return predict(image)

    monkeypatch.setattr(run, "predict", until_killed)
    with pytest.raises(KeyboardInterrupt):
        segment_folder(run, images, tmp_path / "out")
    assert not (tmp_path / "out" / "areas.csv").exists()
    done = len(list((tmp_path / "out" / "labels").glob("*.png")))
    assert done == 5
    calls[:] = [None] * 10
    capsys.readouterr()
    table = segment_folder(run, images, tmp_path / "out")
    assert len(calls) - 10 == 12 - done, "the others are not predicted again"
    assert re.search(r"7 images segmented in .* images per second; 5 were segmented before", capsys.readouterr().err)
    pd.testing.assert_frame_equal(table, whole)
    for path in (tmp_path / "whole").rglob("*.*"):
        assert (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


def test_only_what_was_made_of_the_same_file_by_the_same_run_is_kept(run, wide, images, tmp_path, capsys):
    def kept(*arguments):
        capsys.readouterr()
        segment_folder(*arguments)
        found = re.search(r"(\d+) were segmented before", capsys.readouterr().err)
        return int(found[1]) if found else 0

    out = tmp_path / "out"
    assert kept(run, images, out) == 0 and kept(run, images, out) == 3
    Image.new("RGB", (40, 71), "red").save(images / "tall.png")
    assert kept(run, images, out) == 2, "another image of the same name"
    np.testing.assert_array_equal(stored(out / "labels" / "tall.png")[0], run.predict(images / "tall.png"))
    (out / "labels" / "gray.png").write_bytes((out / "labels" / "gray.png").read_bytes()[:-40])
    (out / "overlays" / "tall.jpg").unlink()
    assert kept(run, images, out) == 1, "a damaged label map, a missing overlay"
    assert kept(run, images, out, 0.2) == 0 and kept(wide, images, out, 0.2) == 0
    first, second = run.classes.names[:2]
    run.name_segments({second: first})
    try:
        assert kept(run, images, out, 0.2) == 0 and kept(run, images, out, 0.2) == 3
        run.name_segments({second: None})
        assert kept(run, images, out, 0.2) == 0, "the same names in the same colors, of other pixels"
    finally:
        run.name_segments(None)
