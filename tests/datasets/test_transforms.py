"""Sizes and crops against the numbers of the published code."""

import json

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from common import golden
from PIL import Image

from stego_lib import Experiment, open_dataset
from stego_lib.datasets import open_training_set
from stego_lib.datasets.crops import FiveCrop, RandomCrop, Tiles, five_boxes
from stego_lib.datasets.transforms import nearest_grid, resize_image, resize_label

GOLDEN = golden("transforms")
SIZES = {"center32": 32, "none32": (32, 32)}
SHAPES = [tuple(shape) for shape in GOLDEN["idx_sizes"].tolist()]


@pytest.mark.parametrize("height, width", SHAPES)
@pytest.mark.parametrize("name", SIZES)
def test_the_published_pixel_is_taken(name, height, width):
    rows, columns = nearest_grid(height, width, SIZES[name])
    np.testing.assert_array_equal(rows, GOLDEN[f"idx.{name}.{height}x{width}.rows"])
    np.testing.assert_array_equal(columns, GOLDEN[f"idx.{name}.{height}x{width}.cols"])


@pytest.mark.parametrize("height, width", SHAPES)
@pytest.mark.parametrize("name", SIZES)
def test_labels_and_published_images_take_the_same_pixel(name, height, width):
    rows, columns = (GOLDEN[f"idx.{name}.{height}x{width}.{axis}"].astype(int) for axis in ("rows", "cols"))
    label = torch.arange(height * width).reshape(height, width)
    found = resize_label(label, SIZES[name])
    np.testing.assert_array_equal(found // width, np.repeat(rows[:, None], 32, 1))
    np.testing.assert_array_equal(found % width, np.repeat(columns[None], 32, 0))
    image = torch.stack([label // 256, label % 256, label * 0]).to(torch.uint8)
    small = resize_image(image, SIZES[name], published=True).long()
    np.testing.assert_array_equal(small[0] * 256 + small[1], found)


@pytest.mark.parametrize("name", SIZES)
def test_images_are_the_published_ones(name):
    image = torch.from_numpy(GOLDEN["image"]).permute(2, 0, 1)
    found = resize_image(image, SIZES[name], published=True)
    assert found.dtype == torch.uint8
    mean, spread = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    np.testing.assert_allclose((found / 255 - mean) / spread, GOLDEN[f"{name}.image_out"], atol=1e-6)
    label = torch.from_numpy(GOLDEN["label"]).long()
    np.testing.assert_array_equal(resize_label(label, SIZES[name])[None], GOLDEN[f"{name}.label_out"])


def test_image_and_label_stay_on_top_of_each_other():
    """A half-plane drawn in both: after resizing by a factor of four the border is at the same place in both."""
    for border in range(40, 60):
        label = (torch.arange(96) >= border).long().expand(96, 96).contiguous()
        image = (255 * label).to(torch.uint8).expand(3, 96, 96).contiguous()
        small, small_label = resize_image(image, (24, 24)), resize_label(label, (24, 24))
        edge = 24 - small[0].float().mean() / 255 * 24  # where the bright half begins, in small pixels
        assert abs(edge - (24 - small_label.float().mean() * 24)) <= 0.5 + 1e-3, border


BOXES = {key: value for key, value in GOLDEN.items() if "boxes" in key}


@pytest.mark.parametrize("key", sorted(BOXES))
def test_five_boxes_equal_the_published_ones(key):
    size, ratio = key.removeprefix("five.boxes_").split("_ratio")
    height, width = map(int, size.split("x"))
    assert five_boxes(height, width, float(ratio)) == [tuple(box) for box in BOXES[key].tolist()]


@pytest.fixture
def pair(tmp_path):
    """The golden image and label, and both upside down, as the published crops were made of them."""
    folder = tmp_path / "folder"
    for kind, array in (("imgs", GOLDEN["image"]), ("labels", GOLDEN["label"])):
        (folder / kind / "train").mkdir(parents=True)
        for i, stored in enumerate((array, array[::-1])):
            Image.fromarray(np.ascontiguousarray(stored)).save(folder / kind / "train" / f"street{i}.png")
    (folder / "classes.json").write_text(json.dumps({"names": [str(i) for i in range(255)]}))
    return open_dataset("folder", tmp_path, "train")


def test_five_crops_are_the_published_ones(pair):
    crops = FiveCrop(pair)
    for i in range(5):
        image, label = crops[i]
        np.testing.assert_allclose(image / 255, GOLDEN["five.image_crops"][i], atol=1e-6)
        published = GOLDEN["five.label_crops"][i]
        np.testing.assert_array_equal(label, np.where(published == 255, -1, published))


def test_random_crops_are_decided_by_the_seed(pair):
    crops, again, other = RandomCrop(pair), RandomCrop(pair), RandomCrop(pair, seed=1)
    assert len(crops) == 10 == len(set(crops.names)) and crops.names[6] == "street1-random1"
    assert all(torch.equal(crops.image(i), again.image(i)) for i in range(10))
    assert not all(torch.equal(crops.image(i), other.image(i)) for i in range(10))
    assert crops.settings(labels=True) == again.settings(labels=True) != other.settings(labels=True)
    assert crops.boxes(0, 50, 70) != crops.boxes(1, 50, 70), "each image is cut at places of its own"


def test_random_crops_cut_image_and_label_alike(pair):
    crops = RandomCrop(pair)
    for number in range(10):
        top, left, height, width = crops.boxes(number // 5, 50, 70)[number % 5]
        image, label = pair[number // 5]
        assert torch.equal(crops.image(number), image[:, top : top + height, left : left + width])
        assert torch.equal(crops.label(number), label[top : top + height, left : left + width])


def test_tiles_cover_each_image_at_its_own_resolution(tmp_path):
    """Images of different sizes; one is turned by EXIF."""
    folder = tmp_path / "folder" / "imgs" / "train"
    folder.mkdir(parents=True)
    shapes = {"a": (100, 130), "b": (40, 30), "c": (64, 129)}
    for name, (height, width) in shapes.items():
        values = np.arange(height * width * 3).reshape(height, width, 3).astype(np.uint8)
        exif = Image.Exif()
        if name == "c":  # stored upright, and shown turned by a quarter
            values = np.ascontiguousarray(np.rot90(values))
            exif[0x0112] = 6
        Image.fromarray(values).save(folder / f"{name}.png", exif=exif)
    whole = open_dataset("folder", tmp_path, "train", n_classes=2)
    tiles = Tiles(whole, (64, 64))
    assert [number for number, _ in tiles.places] == [0] * 6 + [1] + [2] * 3
    seen = [np.zeros(shape, bool) for shape in shapes.values()]
    for index, (number, piece) in enumerate(tiles.places):
        top, left, height, width = tiles.boxes(number, *seen[number].shape)[piece]
        assert (height, width) == ((40, 30) if number == 1 else (64, 64))
        assert torch.equal(tiles.image(index), whole.image(number)[:, top : top + height, left : left + width])
        seen[number][top : top + height, left : left + width] = True
    assert all(pixels.all() for pixels in seen)
    assert len(set(tiles.names)) == len(tiles) == 10
    experiment = Experiment(dataset="folder", data_root=str(tmp_path), n_classes=2, crop="tiles", train_size=64)
    assert open_training_set(experiment).settings(labels=False) == tiles.settings(labels=False)
    assert tiles.settings(labels=False) != Tiles(whole, 32).settings(labels=False)


@pytest.mark.parametrize(
    "shape, size", [((500, 333), 64), ((300, 77), (96, 40)), ((40, 50), 72), ((1000, 64), (320, 64)), ((64, 64), 64)]
)
def test_scaling_in_strips_is_scaling_at_once(shape, size):
    """Bit for bit, whatever goes up or down: features on disk stay what they are."""
    image = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for one in (image.movedim(-1, 0), image.movedim(-1, 0).contiguous()):
        expected = TF.resize(one, size if isinstance(size, int) else list(size), antialias=True)
        expected = TF.center_crop(expected, size) if isinstance(size, int) else expected
        assert torch.equal(resize_image(one, size), expected)
