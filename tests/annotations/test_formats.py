"""Every format of annotations, read back by a reader that is not ours."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from stego_lib import StegoError
from stego_lib.annotations.formats import WRITERS, chosen_writers
from stego_lib.annotations.labelme import IGNORED, TOLERANCE
from stego_lib.annotations.outputs import OutputFolder
from stego_lib.datasets import Classes

SEGMENTS = Classes(("road", "sky", "tree"), ((90, 90, 90), (40, 120, 220), (30, 140, 40)))


def ring() -> np.ndarray:
    """A ring of 1 around a disk of 2, in 0; a hole of nothing in the disk, a second region of 2 at the border."""
    y, x = np.mgrid[:120, :160]
    distance = np.hypot(y - 60, x - 70)
    label = np.zeros((120, 160), np.uint8)
    label[distance < 50] = 1
    label[distance < 30] = 2
    label[distance < 12] = 255
    label[90:, 140:] = 2
    return label


LABELS = {"a.jpg": ring(), "b.jpg": np.ascontiguousarray(ring()[:70, ::-1])}


def write(name: str, folder: Path, labels: dict[str, np.ndarray] = LABELS, masks: str = "rle") -> None:
    writer = WRITERS[name](OutputFolder(folder), SEGMENTS, masks)
    records = [writer.add(folder / "images" / image, label, "source") for image, label in labels.items()]
    writer.finish(records, "source")


@pytest.mark.parametrize("masks", ["rle", "polygons"])
def test_instances_are_read_by_pycocotools_and_keep_their_ids(tmp_path, masks):
    coco = pytest.importorskip("pycocotools.coco")
    write("coco-instances", tmp_path, masks=masks)
    read = coco.COCO(str(tmp_path / "instances.json"))
    assert [read.cats[id_]["name"] for id_ in sorted(read.cats)] == list(SEGMENTS.names)
    for image in read.imgs.values():
        label = LABELS[image["file_name"]]
        assert (image["height"], image["width"]) == label.shape
        drawn = np.full(label.shape, 255, np.uint8)
        for annotation in read.loadAnns(read.getAnnIds(imgIds=image["id"])):
            mask = read.annToMask(annotation).astype(bool)
            assert mask.sum() == annotation["area"] and (drawn[mask] == 255).all(), "instances do not overlap"
            rows, columns = np.nonzero(mask)
            assert annotation["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            drawn[mask] = annotation["category_id"] - 1
        np.testing.assert_array_equal(drawn, label)
        if image["file_name"] == "a.jpg":
            assert len(read.getAnnIds(imgIds=image["id"], catIds=3)) == 2, "a disk and a corner"
    assert len(read.loadRes(read.dataset["annotations"]).anns) == len(read.anns)
    write("coco-instances", tmp_path / "more", {"0.jpg": LABELS["b.jpg"], **LABELS})
    more = json.loads((tmp_path / "more" / "instances.json").read_text())
    assert {image["id"] for image in more["images"]} > set(read.imgs)
    assert {annotation["id"] for annotation in more["annotations"]} > set(read.anns)


def test_polygons_of_noise_are_its_pixels(tmp_path):
    """Holes in holes, and regions that touch at corners."""
    coco = pytest.importorskip("pycocotools.coco")
    noise = np.random.default_rng(0).choice(np.array([0, 1, 255], np.uint8), (20, 30), p=(0.8, 0.1, 0.1))
    write("coco-instances", tmp_path, {"a.jpg": noise}, masks="polygons")
    read = coco.COCO(str(tmp_path / "instances.json"))
    drawn = np.full(noise.shape, 255, np.uint8)
    for annotation in read.anns.values():
        drawn[read.annToMask(annotation) == 1] = annotation["category_id"] - 1
    np.testing.assert_array_equal(drawn, noise)


def test_panoptic_numbers_and_areas_agree_with_its_segments(tmp_path):
    """Decoded as COCO's panopticapi does: R + 256 G + 65536 B."""
    pytest.importorskip("pycocotools")
    write("coco-panoptic", tmp_path)
    read = json.loads((tmp_path / "panoptic.json").read_text())
    assert {"info", "licenses"} < set(read) and [c["name"] for c in read["categories"]] == list(SEGMENTS.names)
    for annotation, label in zip(read["annotations"], LABELS.values(), strict=True):
        with Image.open(tmp_path / "panoptic" / annotation["file_name"]) as file:
            numbers = np.array(file).astype(np.int64) @ [1, 256, 65536]
        decoded = np.full(label.shape, 255)
        for segment in annotation["segments_info"]:
            assert segment["area"] == (numbers == segment["id"]).sum()
            decoded[numbers == segment["id"]] = segment["category_id"] - 1
        np.testing.assert_array_equal(decoded, label)
        assert ((numbers == 0) == (label == 255)).all()


@pytest.mark.parametrize("image", LABELS)
def test_polygons_of_labelme_draw_the_label_map_within_the_tolerance(image, tmp_path):
    """Drawn by Pillow at four times the size, later shapes over earlier ones."""
    pytest.importorskip("shapely")
    pytest.importorskip("rasterio")
    write("labelme", tmp_path)
    label, read = LABELS[image], json.loads((tmp_path / "labelme" / image.replace("jpg", "json")).read_text())
    assert read["imagePath"] == f"../images/{image}" and (read["imageHeight"], read["imageWidth"]) == label.shape
    assert sum(len(shape["points"]) for shape in read["shapes"]) < 300
    canvas = Image.new("L", (4 * label.shape[1], 4 * label.shape[0]), 254)
    for shape in read["shapes"]:
        id_ = 255 if shape["label"] == IGNORED else SEGMENTS.names.index(shape["label"])
        ImageDraw.Draw(canvas).polygon([(4 * x - 0.5, 4 * y - 0.5) for x, y in shape["points"]], fill=id_)
    wrong = np.array(canvas)[2::4, 2::4] != label
    to_border = sum((label == id_) * ndimage.distance_transform_edt(label == id_) for id_ in np.unique(label))
    assert wrong.mean() < 0.02 and to_border[wrong].max(initial=0) <= TOLERANCE + 1


def test_an_unknown_format_and_a_missing_package_are_named(monkeypatch):
    with pytest.raises(StegoError, match="'coco'"):
        chosen_writers("coco")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, package in {"coco-instances": "pycocotools", "labelme": "shapely", "geotiff": "rasterio"}.items():
        with pytest.raises(StegoError, match=package):
            chosen_writers(("png", name))
    assert chosen_writers("png") == []
