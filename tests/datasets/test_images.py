"""Reading images and label maps: formats, depths, transparency, orientations, against files of Pillow and GDAL."""

from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image

from stego_lib import StegoError, open_dataset
from stego_lib.datasets.classes import DEFAULT, Rules
from stego_lib.datasets.images import read_ids, read_image
from stego_lib.utils.notices import Notice

RGB = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
GRAY = RGB[..., 0]
# 16 bits, of which a 12-bit sensor fills the lower ones.
TWELVE = (GRAY.astype(np.uint16) << 4) + 7
UPPER = np.zeros((16, 24), bool)
UPPER[:8] = True


def pixels(path, rules=DEFAULT) -> np.ndarray:
    return np.asarray(read_image(path, rules).rgb)


def write_tiff(path, bands, mask=None, colors="", **options):
    """Writes (bands, H, W) as GDAL does. colors: color interpretation of each band."""
    rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed (extra `geo`)")
    count, height, width = bands.shape
    options = dict(driver="GTiff", count=count, height=height, width=width, dtype=bands.dtype) | options
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        pytest.warns(rasterio.errors.NotGeoreferencedWarning),
        rasterio.open(path, "w", **options) as file,
    ):
        if colors:
            file.colorinterp = [rasterio.enums.ColorInterp[color] for color in colors.split()]
        file.write(bands)
        if mask is not None:
            file.write_mask(mask)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "gif", "ppm", "jp2"])
def test_lossless_formats(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    image = RGB // 64 * 64 if suffix == "gif" else RGB  # at most 256 colors
    Image.fromarray(image).save(path, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(pixels(path), image)
    content = path.read_bytes()
    path.unlink()
    np.testing.assert_array_equal(np.asarray(read_image(path, content=content).rgb), image)


DEEP = {
    "12-bit PNG": lambda path: Image.fromarray(TWELVE).save(path, "PNG"),
    "12-bit TIFF": lambda path: Image.fromarray(TWELVE).save(path, "TIFF"),
    "float": lambda path: Image.fromarray(TWELVE.astype(np.float32)).save(path, "TIFF"),
    "int32": lambda path: Image.fromarray(TWELVE.astype(np.int32)).save(path, "TIFF"),
    "signed": lambda path: write_tiff(path, TWELVE[None].astype(np.int16)),
    "16-bit color PNG": lambda path: write_tiff(path, np.stack([TWELVE] * 3), driver="PNG"),
    "16-bit color TIFF": lambda path: write_tiff(path, np.stack([TWELVE] * 3)),
    "float color": lambda path: write_tiff(path, np.stack([TWELVE] * 3).astype(np.float32)),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_need_a_range(tmp_path, name):
    DEEP[name](tmp_path / "a.x")
    with pytest.raises(StegoError, match=r"range.*classes\.json"):
        read_image(tmp_path / "a.x")
    expected = np.round(255 * np.clip((TWELVE.astype(float) - 500) / 3000, 0, 1))
    np.testing.assert_array_equal(pixels(tmp_path / "a.x", Rules((500, 3500))), np.stack([expected] * 3, -1))


def test_white_is_zero(tmp_path):
    """As radiographs are stored."""
    write_tiff(tmp_path / "a.tif", TWELVE[None], photometric="MINISWHITE")
    Image.fromarray(TWELVE).save(tmp_path / "b.tif", tiffinfo={262: 0})
    for name in ("a.tif", "b.tif"):
        expected = 255 * (1 - TWELVE / 4095.0)
        np.testing.assert_allclose(pixels(tmp_path / name, Rules((0, 4095)))[..., 0], expected, atol=0.51)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_transparent_pixels_are_white_and_void(tmp_path, kind):
    alpha = np.full((16, 24, 1), 255, np.uint8)
    alpha[:8], alpha[8:10] = 0, 204
    options = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(np.dstack([RGB, alpha])).save(tmp_path / "a.x", kind, **options)
    read = read_image(tmp_path / "a.x")
    np.testing.assert_array_equal(read.transparent, UPPER)
    expected = np.where(alpha == 0, 255, RGB * (alpha / 255) + 255 - alpha)
    assert np.abs(np.asarray(read.rgb) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["alpha", "GDAL's mask"])
def test_transparent_pixels_are_ignored_in_label_maps(tmp_path, kind):
    opaque = np.where(UPPER, 0, 255).astype(np.uint8)
    for folder in ("imgs", "labels"):
        (tmp_path / folder / "train").mkdir(parents=True)
    if kind == "alpha":
        Image.fromarray(np.dstack([RGB, opaque])).save(tmp_path / "imgs/train/a.png")
    else:
        write_tiff(tmp_path / "imgs/train/a.tif", RGB.transpose(2, 0, 1), opaque)
    Image.fromarray(np.ones((16, 24), np.uint8)).save(tmp_path / "labels/train/a.png")
    (tmp_path / "classes.json").write_text('{"names": ["a", "b"]}')
    dataset = open_dataset("folder", tmp_path, "train")
    for label in (dataset[0][1], dataset.label(0)):
        np.testing.assert_array_equal(label, np.where(UPPER, -1, 1))


LAYOUTS = [{}, dict(photometric="YCBCR", compress="JPEG"), dict(tiled=True, blockxsize=16, blockysize=16)]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_the_internal_mask_of_a_geotiff(tmp_path, options):
    bands = np.full((3, 16, 24), 200, np.uint8)
    read = read_image(write_tiff(tmp_path / "a.tif", bands, np.where(UPPER, 0, 255).astype(np.uint8), **options))
    np.testing.assert_array_equal(read.transparent, UPPER)
    rgb = np.asarray(read.rgb).astype(int)
    assert np.abs(rgb[~UPPER] - 200).max() <= 2 and rgb[UPPER].min() == 255


@pytest.mark.parametrize("nodata, dtype", [(0, np.uint8), (-9999, np.float32), (np.nan, np.float32)])
def test_nodata_and_nan_are_void(tmp_path, nodata, dtype):
    values = np.where(UPPER, nodata, 100).astype(dtype)
    read = read_image(write_tiff(tmp_path / "a.tif", values[None], nodata=nodata), Rules((0, 255)))
    np.testing.assert_array_equal(read.transparent, UPPER)
    assert (np.asarray(read.rgb)[~UPPER] == 100).all()


def test_the_color_interpretation_decides_about_the_fourth_band(tmp_path):
    bands = np.concatenate([RGB.transpose(2, 0, 1), GRAY[None]])
    with pytest.warns(Notice, match="bands"):
        read = read_image(write_tiff(tmp_path / "nir.tif", bands, colors="red green blue undefined"))
    np.testing.assert_array_equal(np.asarray(read.rgb), RGB)
    assert read.transparent is None
    swapped = write_tiff(tmp_path / "bgr.tif", bands[[2, 1, 0]], colors="blue green red")
    np.testing.assert_array_equal(pixels(swapped), RGB)
    path = write_tiff(tmp_path / "alpha.tif", bands, colors="red green blue alpha")
    with pytest.warns(Notice, match="infrared"):  # as GDAL calls a fourth band that nobody has named
        np.testing.assert_array_equal(read_image(path).transparent, GRAY < 128)
    five = np.concatenate([bands, np.where(UPPER, 0, 255).astype(np.uint8)[None]])
    path = write_tiff(tmp_path / "five.tif", five, colors="red green blue undefined alpha", photometric="RGB")
    with pytest.warns(Notice, match=r"4 \(undefined\)"):
        np.testing.assert_array_equal(read_image(path).transparent, UPPER)


def test_three_bands_are_colors_and_five_are_refused(tmp_path):
    bands = RGB.transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels(write_tiff(tmp_path / "a.tif", bands, photometric="MINISBLACK")), RGB)
    with pytest.raises(StegoError, match="5 bands"):
        read_image(write_tiff(tmp_path / "b.tif", np.concatenate([bands, bands[:2]])))


def test_few_bits_and_palettes_of_geotiffs_are_refused(tmp_path):
    for options in (dict(nbits=4), dict(photometric="PALETTE", nodata=0)):
        path = write_tiff(tmp_path / "a.tif", GRAY[None] // 16, **options)
        with pytest.raises(StegoError, match="palette"):
            read_image(path)


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "complex_int16"])
def test_values_that_are_not_real_numbers_are_refused(tmp_path, dtype):
    path = write_tiff(tmp_path / "a.tif", TWELVE[None] * np.complex64(1 + 1j), dtype=dtype)
    for rules in (DEFAULT, Rules((0, 4095))):
        with pytest.raises(StegoError, match="complex"):
            read_image(path, rules)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_images_unless_told_otherwise(tmp_path, kind, orientation):
    """Each orientation, as the standard defines it: where the first row and column lie."""
    smooth = np.kron(RGB[:4, :6], np.ones((16, 16, 1), np.uint8))
    stored = {
        1: smooth, 2: smooth[:, ::-1], 3: smooth[::-1, ::-1], 4: smooth[::-1], 5: smooth.swapaxes(0, 1),
        6: np.rot90(smooth), 7: smooth[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(smooth, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.x", kind, exif=exif, **options)
    read, ignored = read_image(tmp_path / "a.x"), read_image(tmp_path / "a.x", Rules(exif="ignore"))
    assert read.orientation == orientation
    assert np.abs(np.asarray(read.rgb).astype(int) - smooth).max() < 12
    assert np.abs(np.asarray(ignored.rgb).astype(int) - stored).max() < 12


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("value, said", [(0, False), (9, True)])
def test_an_orientation_that_is_none_is_ignored_with_a_notice(tmp_path, name, value, said):
    exif = Image.Exif()
    exif[0x0112] = value
    Image.fromarray(RGB).save(tmp_path / name, exif=exif)
    with pytest.warns(Notice, match="orientation") if said else nullcontext():
        assert read_image(tmp_path / name).orientation == 1


@pytest.mark.parametrize("rule, said", [("", True), (', "exif": "apply"', False), (', "exif": "ignore"', False)])
def test_turned_images_with_label_maps_give_a_notice(tmp_path, rule, said, recwarn):
    for kind in ("imgs", "labels"):
        (tmp_path / kind / "train").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(RGB).save(tmp_path / "imgs/train/a.jpg", exif=exif)
    Image.fromarray(np.zeros((16, 24), np.uint8)).save(tmp_path / "labels/train/a.png")
    (tmp_path / "classes.json").write_text(f'{{"names": ["a"]{rule}}}')
    dataset = open_dataset("folder", tmp_path, "train")
    with pytest.warns(Notice, match="EXIF") if said else nullcontext():
        dataset[0]


def test_ids_of_label_maps_are_read_as_stored(tmp_path):
    ids = (GRAY % 4).astype(np.uint8)
    palette = Image.fromarray(ids)
    palette.putpalette([9, 9, 9, 0, 0, 0, 200, 0, 0, 9, 9, 9])
    deep = Image.fromarray(ids.astype(np.uint16))
    for image, options in ((Image.fromarray(ids), {}), (palette, {}), (palette, {"bits": 2}), (deep, {})):
        image.save(tmp_path / "a.png", **options)
        np.testing.assert_array_equal(read_ids(tmp_path / "a.png"), ids)


def test_gray_of_two_bits_is_not_stretched(tmp_path):
    """Pillow makes 85 of a stored 1."""
    ids = GRAY % 4
    write_tiff(tmp_path / "a.png", ids[None], driver="PNG", nbits=2)
    np.testing.assert_array_equal(read_ids(tmp_path / "a.png"), ids)


@pytest.mark.parametrize("mode, kind", [("L", "JPEG"), ("RGB", "PNG"), ("LA", "PNG"), ("F", "TIFF")])
def test_label_maps_without_ids_are_refused(tmp_path, mode, kind):
    Image.fromarray(GRAY).convert(mode).save(tmp_path / "a.png", kind)
    with pytest.raises(StegoError, match=r"a\.png.*class id"):
        read_ids(tmp_path / "a.png")


def flipped(content: bytes) -> bytes:
    """With another byte among the pixels."""
    place = content.index(b"IDAT") + 100
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


BROKEN = {
    "empty": lambda content: b"", "text": lambda content: b"text", "TIFF": lambda content: b"II*\0junk",
    "cut short": lambda content: content[: len(content) // 2], "another byte": flipped,
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_named(tmp_path, kind):
    Image.fromarray(GRAY).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(BROKEN[kind]((tmp_path / "a.png").read_bytes()))
    for read in (read_image, read_ids):
        with pytest.raises(StegoError, match=r"a\.png cannot be read"):
            read(tmp_path / "a.png")
