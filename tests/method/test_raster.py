"""Label maps of rasters by windows: the labels of `predict`, georeference, missing data, interruptions, polygons."""

import json
import os
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from stego_lib import raster, tiles
from stego_lib.datasets.classes import Rules, cluster_classes
from stego_lib.segment import segment_folder
from stego_lib.utils.notices import Notice

rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed (extra `geo`)")
shapely = pytest.importorskip("shapely", reason="shapely is not installed (extra `geo`)")
PLACE = dict(crs="EPSG:25832", transform=rasterio.Affine(0.5, 0, 400_000, 0, -0.5, 5_500_000))
HEIGHT, WIDTH, TILE = 331, 267, 64
VOID = np.zeros((HEIGHT, WIDTH), bool)
VOID[:50, :90], VOID[300:, 200:] = True, True


@pytest.fixture
def image(tmp_path):
    """A GeoTIFF with a mask, as GDAL writes it."""
    blocks = np.random.default_rng(0).integers(0, 256, (3, 34, 27), dtype=np.uint8)
    form = dict(driver="GTiff", count=3, dtype="uint8", height=HEIGHT, width=WIDTH, compress="deflate", **PLACE)
    path = tmp_path / "images" / "a.tif"
    path.parent.mkdir()
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "w", **form) as file:
        file.write(blocks.repeat(10, 1).repeat(10, 2)[:, :HEIGHT, :WIDTH])
        file.write_mask(~VOID)
    return path


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tiles, "STRIP_BLOCK", 96)


def test_a_raster_has_the_labels_of_predict_at_its_place(run, image, tmp_path):
    raster.label_raster(run, image, tmp_path / "a.tif", tmp_path / "parts", tile=TILE, rules=Rules())
    expected = run.predict(image, tile=TILE, refine="none")
    with rasterio.open(tmp_path / "a.tif") as file:
        np.testing.assert_array_equal(file.read(1), expected)
        assert file.crs == PLACE["crs"] and file.transform == PLACE["transform"] and file.nodata == 255
        assert file.profile["tiled"] and file.profile["compress"] == "deflate"
        np.testing.assert_array_equal(file.dataset_mask() == 0, VOID)
        assert file.colormap(1)[0][:3] == run.segments.colors[0]
    np.testing.assert_array_equal(raster.count_ids(tmp_path / "a.tif"), np.bincount(expected.ravel(), minlength=256))
    assert not (tmp_path / "parts").exists()


def test_an_interrupted_raster_goes_on(run, image, tmp_path, monkeypatch):
    strips, rows = raster.label_strips, []

    def watched(*arguments, stop: bool, **options):
        for strip in strips(*arguments, **options):
            rows.append(len(strip))
            yield strip
            if stop and len(rows) == 2:
                raise KeyboardInterrupt

    options = dict(parts=tmp_path / "parts", tile=TILE, rules=Rules())
    monkeypatch.setattr(raster, "label_strips", lambda *a, **k: watched(*a, stop=True, **k))
    with pytest.raises(KeyboardInterrupt):
        raster.label_raster(run, image, tmp_path / "a.tif", **options)
    assert not (tmp_path / "a.tif").exists()
    monkeypatch.setattr(raster, "label_strips", lambda *a, **k: watched(*a, stop=False, **k))
    raster.label_raster(run, image, tmp_path / "a.tif", **options)
    assert len(rows) > 3 and sum(rows) == HEIGHT, "nothing is computed twice"
    with rasterio.open(tmp_path / "a.tif") as file:
        np.testing.assert_array_equal(file.read(1), run.predict(image, tile=TILE, refine="none"))


def test_a_damaged_file_is_an_error_and_nothing_is_lost(run, image, tmp_path, monkeypatch):
    """As GDAL leaves it on a full disk, without an error."""
    opened = raster.open_raster

    @contextmanager
    def truncated(path, mode="r", **form):
        with opened(path, mode, **form) as file:
            yield file
        if mode == "w":
            os.truncate(path, path.stat().st_size // 2)

    monkeypatch.setattr(raster, "open_raster", truncated)
    options = dict(parts=tmp_path / "parts", tile=TILE, rules=Rules())
    with pytest.raises(OSError, match="GDAL"):
        raster.label_raster(run, image, tmp_path / "a.tif", **options)
    monkeypatch.setattr(raster, "open_raster", opened)
    monkeypatch.setattr(raster, "label_strips", None)  # all strips are finished
    raster.label_raster(run, image, tmp_path / "a.tif", **options)
    with rasterio.open(tmp_path / "a.tif") as file:
        np.testing.assert_array_equal(file.read(1), run.predict(image, tile=TILE, refine="none"))


@pytest.mark.filterwarnings("ignore:.*was not evaluated")
@pytest.mark.parametrize("large", [True, False])
def test_tiffs_of_a_folder_and_their_polygons(run, image, tmp_path, monkeypatch, large):
    monkeypatch.setattr(raster, "LARGE", 10_000 if large else 50_000_000)
    options = dict(format=("geotiff", "geojson", "png"), tile=TILE, refine="none")
    with pytest.warns(Notice, match="large") if large else nullcontext():
        table = segment_folder(run, image.parent, tmp_path / "out", **options)
    label = run.predict(image, tile=TILE, refine="none")
    known = np.bincount(label.ravel(), minlength=256)[: len(run.segments)]
    np.testing.assert_allclose(table.loc["a.tif"], 100 * known / known.sum())
    made = tmp_path / "out" / "geotiff" / "a.tif"
    with rasterio.open(made) as file:
        np.testing.assert_array_equal(file.read(1), label)
        assert file.crs == PLACE["crs"] and file.transform == PLACE["transform"] and file.nodata == 255
        assert file.colormap(1)[3][:3] == run.segments.colors[3]

    collection = json.loads((tmp_path / "out" / "geojson" / "a.geojson").read_text())
    assert collection["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::25832"
    shapes = [(feature["geometry"], feature["properties"]["id"]) for feature in collection["features"]]
    drawn = rasterio.features.rasterize(shapes, label.shape, fill=255, transform=PLACE["transform"])
    np.testing.assert_array_equal(drawn, label)
    names = {feature["properties"]["id"]: feature["properties"]["name"] for feature in collection["features"]}
    assert all(name == run.segments.names[id_] for id_, name in names.items())

    before = made.stat().st_mtime_ns
    with pytest.warns(Notice, match="large") if large else nullcontext():
        segment_folder(run, image.parent, tmp_path / "out", **options)
    assert not large or made.stat().st_mtime_ns == before, "up to date"
    assert large != (tmp_path / "out" / "labels" / "a.png").exists()


@pytest.mark.filterwarnings("ignore:.*was not evaluated")
def test_an_image_without_a_place_gets_no_geotiff(run, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "plain.png")
    with pytest.warns(Notice, match=r"plain\.png"):
        segment_folder(run, tmp_path / "images", tmp_path / "out", format="geotiff")
    assert not (tmp_path / "out" / "geotiff" / "plain.tif").exists()


def write_labels(path, label, **place):
    form = dict(driver="GTiff", count=1, dtype="uint8", height=label.shape[0], width=label.shape[1])
    with rasterio.open(path, "w", **form, **place) as file:
        file.write(label, 1)


def test_gdal_reads_polygons_of_the_pixels_and_strips_cut_none(tmp_path, monkeypatch):
    pyogrio = pytest.importorskip("pyogrio", reason="pyogrio is not installed (extra `dev`)")
    label = np.random.default_rng(0).integers(0, 3, (40, 30), dtype=np.uint8).repeat(2, 0).repeat(3, 1)
    label[10:70, 20:60:10], label[:9, :9] = 1, 255
    write_labels(tmp_path / "a.tif", label, **PLACE)
    monkeypatch.setattr(raster, "ROWS", 7)
    raster.outline_raster(tmp_path / "a.tif", tmp_path / "a.geojson", cluster_classes(3))
    about, _, outlines, columns = pyogrio.raw.read(tmp_path / "a.geojson")
    polygons, ids = shapely.from_wkb(outlines), columns[list(about["fields"]).index("id")]
    assert about["crs"] == "EPSG:25832" and about["geometry_type"] == "Polygon" and shapely.is_valid(polygons).all()
    pixel = abs(PLACE["transform"].determinant)
    for id_ in range(3):
        assert (ids == id_).sum() == ndimage.label(label == id_)[1], "a region is one polygon"
        assert shapely.area(polygons[ids == id_]).sum() == pytest.approx(pixel * (label == id_).sum())
    drawn = rasterio.features.rasterize(
        zip(polygons, ids, strict=True), label.shape, fill=255, transform=PLACE["transform"]
    )
    np.testing.assert_array_equal(drawn, label)


def test_polygons_of_a_raster_with_control_points_are_in_pixels(tmp_path):
    points = [rasterio.control.GroundControlPoint(row, 0, 4e5, 5e6 - row) for row in range(4)]
    write_labels(tmp_path / "a.tif", np.zeros((4, 5), np.uint8), gcps=points, crs="EPSG:25832")
    raster.outline_raster(tmp_path / "a.tif", tmp_path / "a.geojson", cluster_classes(1))
    collection = json.loads((tmp_path / "a.geojson").read_text())
    assert "crs" not in collection
    assert shapely.geometry.shape(collection["features"][0]["geometry"]).equals(shapely.box(0, 0, 5, 4))
