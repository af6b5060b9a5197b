"""Every format of annotations, read back by a reader that is not ours."""

import json
from pathlib import Path

import numpy as np
import pytest
from common import tiny_experiment
from PIL import Image, ImageDraw

from stego_lib import StegoError, train
from stego_lib.annotations.coco import CocoInstances, CocoPanoptic
from stego_lib.annotations.formats import NEEDS, WRITERS, chosen_formats
from stego_lib.annotations.geotiff import GEOREFERENCE
from stego_lib.annotations.labelme import IGNORED, TOLERANCE, LabelMe
from stego_lib.annotations.regions import outlines, regions
from stego_lib.datasets import Classes
from stego_lib.segment import segment_folder
from stego_lib.utils.notices import Notice

SEGMENTS = Classes(("road", "sky", "tree"), ((90, 90, 90), (40, 120, 220), (30, 140, 40)))


@pytest.fixture
def label() -> np.ndarray:
    """A ring of 1 around a disk of 2, in 0; a hole of nothing in the disk, a second region of 2 that touches the border."""
    y, x = np.mgrid[:120, :160]
    distance = np.hypot(y - 60, x - 70)
    found = np.zeros((120, 160), np.uint8)
    found[distance < 50] = 1
    found[distance < 30] = 2
    found[distance < 12] = 255
    found[90:, 140:] = 2
    return found


@pytest.fixture
def other(label) -> np.ndarray:
    return np.ascontiguousarray(label[:70, ::-1])


def test_instances_are_read_by_pycocotools(label, other, tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    writer = CocoInstances(tmp_path, SEGMENTS)
    writer.add(Path("a.jpg"), label)
    writer.add(Path("b.jpg"), other)
    writer.finish()
    read = coco.COCO(str(tmp_path / "instances.json"))
    assert [read.cats[id_]["name"] for id_ in sorted(read.cats)] == list(SEGMENTS.names)
    for image, ids in zip(read.loadImgs(sorted(read.imgs)), (label, other), strict=True):
        assert (image["height"], image["width"]) == ids.shape
        drawn = np.full(ids.shape, 255, np.uint8)
        for one in read.loadAnns(read.getAnnIds(imgIds=image["id"])):
            mask = read.annToMask(one).astype(bool)
            assert mask.sum() == one["area"] and (drawn[mask] == 255).all(), "instances do not overlap"
            rows, columns = np.nonzero(mask)
            assert one["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            drawn[mask] = one["category_id"] - 1
        np.testing.assert_array_equal(drawn, ids)
    assert len(read.getAnnIds(imgIds=1, catIds=3)) == 2, "a disk and a corner"


def test_panoptic_ids_and_areas_agree_with_its_segments(label, other, tmp_path):
    """Decoded as COCO's panopticapi does: R + 256 G + 65536 B."""
    writer = CocoPanoptic(tmp_path, SEGMENTS)
    for name, ids in (("a.jpg", label), ("b.jpg", other)):
        writer.add(Path(name), ids)
    writer.finish()
    read = json.loads((tmp_path / "panoptic.json").read_text())
    assert [one["name"] for one in read["categories"]] == list(SEGMENTS.names)
    for about, ids in zip(read["annotations"], (label, other), strict=True):
        with Image.open(tmp_path / "panoptic" / about["file_name"]) as file:
            numbers = np.array(file).astype(np.int64) @ [1, 256, 65536]
        decoded = np.full(ids.shape, 255)
        for one in about["segments_info"]:
            mask = numbers == one["id"]
            rows, columns = np.nonzero(mask)
            assert one["area"] == mask.sum() and one["bbox"] == [
                columns.min(),
                rows.min(),
                np.ptp(columns) + 1,
                np.ptp(rows) + 1,
            ]
            decoded[mask] = one["category_id"] - 1
        np.testing.assert_array_equal(decoded, ids)
        assert ((numbers == 0) == (ids == 255)).all()


def drawn_labelme(path: Path) -> np.ndarray:
    """Label map of a LabelMe file, drawn by Pillow at four times the size, later shapes over earlier ones."""
    read = json.loads(path.read_text())
    canvas = Image.new("L", (4 * read["imageWidth"], 4 * read["imageHeight"]), 254)
    for shape in read["shapes"]:
        id_ = 255 if shape["label"] == IGNORED else SEGMENTS.names.index(shape["label"])
        ImageDraw.Draw(canvas).polygon([(4 * x - 0.5, 4 * y - 0.5) for x, y in shape["points"]], fill=id_)
    return np.array(canvas)[2::4, 2::4]


def distance_to_border(label: np.ndarray) -> np.ndarray:
    """Pixels, of each pixel to the nearest one of another id."""
    from scipy import ndimage

    found = np.full(label.shape, np.inf)
    for id_ in np.unique(label):
        found = np.where(label == id_, ndimage.distance_transform_edt(label == id_), found)
    return found


@pytest.mark.parametrize("which", ["label", "other"])
def test_polygons_of_labelme_draw_the_label_map_within_the_tolerance(which, request, tmp_path):
    pytest.importorskip("shapely")
    ids = request.getfixturevalue(which)
    LabelMe(tmp_path, SEGMENTS).add(tmp_path / "images" / "a.jpg", ids)
    read = json.loads((tmp_path / "labelme" / "a.json").read_text())
    assert (
        read["imagePath"] == "../images/a.jpg"
        and read["imageData"] is None
        and (read["imageHeight"], read["imageWidth"]) == ids.shape
    )
    assert {shape["shape_type"] for shape in read["shapes"]} == {"polygon"} and all(
        len(shape["points"]) >= 3 for shape in read["shapes"]
    )
    drawn = drawn_labelme(tmp_path / "labelme" / "a.json")
    wrong = drawn != ids
    assert wrong.mean() < 0.02 and distance_to_border(ids)[wrong].max(initial=0) <= TOLERANCE + 1


def test_outlines_have_the_holes_of_a_region_and_its_area(label):
    pytest.importorskip("shapely")
    ring = next(one for one in regions(label) if one.id == 1)
    (polygon,) = outlines(ring, 0)
    assert len(polygon.interiors) == 1 and polygon.area == pytest.approx((label == 1).sum(), rel=0.01)
    (moved,) = outlines(ring, TOLERANCE)
    assert (
        moved.boundary.hausdorff_distance(polygon.boundary) <= TOLERANCE
        and len(moved.exterior.coords) < len(polygon.exterior.coords) / 3
    )


@pytest.fixture
def georeferenced(tmp_path) -> Path:
    """A GeoTIFF written by GDAL: 50 cm a pixel in UTM zone 33 N; 0 where it has no data. Beside it, one that is nowhere."""
    rasterio = pytest.importorskip("rasterio")
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(1, 255, (3, 64, 96), dtype=np.uint8)
    place = rasterio.transform.from_origin(380_000, 5_820_000, 0.5, 0.5)
    options = dict(
        driver="GTiff", height=64, width=96, count=3, dtype="uint8", crs="EPSG:32633", transform=place, nodata=0
    )
    with rasterio.open(folder / "tile.tif", "w", photometric="RGB", **options) as file:
        file.write(pixels)
    Image.fromarray(pixels.transpose(1, 2, 0).copy()).save(folder / "plain.png")
    return folder


@pytest.fixture(scope="module")
def run(scenes_root, backbone_file, tmp_path_factory):
    return train(tiny_experiment(scenes_root, backbone_file, steps=2), runs_dir=tmp_path_factory.mktemp("runs"))


def test_a_geotiff_keeps_its_place(run, georeferenced, tmp_path):
    import rasterio
    import tifffile

    run.name_segments({f"cluster {i}": f"thing {i}" for i in range(8)})
    try:
        with pytest.warns(Notice, match=r"1 images have no georeference.*plain\.png"):
            segment_folder(run, georeferenced, tmp_path / "out", format="geotiff")
    finally:
        run.name_segments(None)
    with Image.open(tmp_path / "out" / "labels" / "tile.png") as file:
        ids = np.array(file)
    with (
        rasterio.open(tmp_path / "out" / "geotiff" / "tile.tif") as made,
        rasterio.open(georeferenced / "tile.tif") as given,
    ):
        assert made.crs == given.crs and made.crs.to_epsg() == 32633 and made.transform == given.transform
        assert made.nodata == 255, "the image's own, 0, is an id here"
        np.testing.assert_array_equal(made.read(1), ids)
        assert made.colormap(1)[3][:3] == run.segments.colors[3]
    with (
        tifffile.TiffFile(tmp_path / "out" / "geotiff" / "tile.tif") as made,
        tifffile.TiffFile(georeferenced / "tile.tif") as given,
    ):
        there = [code for code in GEOREFERENCE if code in given.pages[0].tags]
        assert len(there) >= 4
        for code in there:
            assert made.pages[0].tags[code].value == given.pages[0].tags[code].value
    assert not (tmp_path / "out" / "geotiff" / "plain.tif").exists()
    (georeferenced / "tile.tif").unlink()
    with pytest.raises(StegoError, match="none of the images is a GeoTIFF"):
        segment_folder(run, georeferenced, tmp_path / "other", format=("png", "geotiff"))
    assert not (tmp_path / "other").exists()


def test_a_folder_is_written_in_several_formats_from_its_label_maps(run, tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    pytest.importorskip("shapely")
    (tmp_path / "in").mkdir()
    for name, size in (("b", (60, 90)), ("a", (90, 60))):
        Image.radial_gradient("L").resize(size).convert("RGB").save(tmp_path / "in" / f"{name}.jpg")
    with pytest.warns(Notice, match="clusters without names"):
        segment_folder(run, tmp_path / "in", tmp_path / "out", format=("coco-instances", "coco-panoptic", "labelme"))
    read = coco.COCO(str(tmp_path / "out" / "instances.json"))
    assert [image["file_name"] for image in read.loadImgs([1, 2])] == ["a.jpg", "b.jpg"]
    for number, name in ((1, "a"), (2, "b")):
        with Image.open(tmp_path / "out" / "labels" / f"{name}.png") as file:
            ids = np.array(file)
        found = read.loadAnns(read.getAnnIds(imgIds=number))
        for id_ in np.unique(ids):
            assert sum(one["area"] for one in found if one["category_id"] == id_ + 1) == (ids == id_).sum()
        assert (tmp_path / "out" / "labelme" / f"{name}.json").exists() and (
            tmp_path / "out" / "panoptic" / f"{name}.png"
        ).exists()


def test_an_unknown_format_and_a_missing_package_are_said(monkeypatch):
    with pytest.raises(
        StegoError, match=r"'coco' is unknown.*there are png, coco-panoptic, coco-instances, labelme, geotiff"
    ):
        chosen_formats("coco", [])
    monkeypatch.setattr("stego_lib.annotations.formats.find_spec", lambda name: None)
    for name, package in NEEDS.items():
        with pytest.raises(
            StegoError, match=rf"{package}, which is not installed: pip install 'stego_lib\[annotations\]'"
        ):
            chosen_formats(("png", name), [])
    assert chosen_formats("png", []) == [] and set(NEEDS) < set(WRITERS)
