"""What image files hold besides 8-bit RGB: depths, transparency, EXIF orientations, formats; and how text files are stored."""

import ast
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import standins
from common import ROOT
from PIL import Image, ImageOps
from project_code import calls, sources

from stego_lib import StegoError, open_dataset
from stego_lib.datasets.folder import read_classes, write_classes
from stego_lib.datasets.formats import Rules
from stego_lib.datasets.images import read_image
from stego_lib.datasets.layout import list_images
from stego_lib.utils.files import read_json, read_text

GRAY = np.array([[0, 255, 256, 3000], [4095, 32767, 40000, 65535]], np.uint16)
TWELVE = np.array([[0, 1, 2047, 2048], [4000, 4094, 4095, 0]], np.uint16)


def png16(path: Path, values: np.ndarray) -> Path:
    """A PNG of 16 bits per channel, of one channel or three."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if values.ndim == 2 else 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    written = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))
    return path


def tiff(path: Path, values: np.ndarray, kind: int = 1, order: str = "<", bits: int = 0, photometric: int = 1) -> Path:
    """An uncompressed TIFF. kind: 1 unsigned, 2 signed, 3 floating point."""
    height, width = values.shape[:2]
    channels = 1 if values.ndim == 2 else values.shape[2]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    if bits == 12:  # two numbers in three bytes
        pairs = values.reshape(-1, 2).astype(int)
        data = (
            np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
            .astype(np.uint8)
            .tobytes()
        )
    bits = bits or 8 * values.itemsize
    entries = {
        256: ("H", [width]), 257: ("H", [height]), 258: ("H", [bits] * channels), 259: ("H", [1]),
        262: ("H", [photometric if channels == 1 else 2]), 273: ("I", [0]), 277: ("H", [channels]), 278: ("H", [height]),
        279: ("I", [len(data)]), 284: ("H", [1]), 339: ("H", [kind] * channels),
    }  # fmt: skip
    place = 8 + 2 + 12 * len(entries) + 4
    extra = b""
    for tag, (form, numbers) in entries.items():
        packed = struct.pack(order + form * len(numbers), *numbers)
        if len(packed) > 4 and tag != 273:
            entries[tag] = (form, [packed, place + len(extra)])
            extra += packed
    entries[273] = ("I", [place + len(extra)])
    directory = b""
    for tag, (form, numbers) in sorted(entries.items()):
        code = {"H": 3, "I": 4}[form]
        if isinstance(numbers[0], bytes):
            count, value = len(numbers[0]) // struct.calcsize(form), struct.pack(order + "I", numbers[1])
        else:
            count, value = len(numbers), struct.pack(order + form * len(numbers), *numbers).ljust(4, b"\0")
        directory += struct.pack(order + "HHI", tag, code, count) + value
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    path.write_bytes(start + directory + b"\0\0\0\0" + extra + data)
    return path


# ---------------------------------------------------------------------------------------------- depth


@pytest.mark.parametrize("write", [png16, tiff, lambda path, values: tiff(path, values, order=">")])
def test_sixteen_bits_that_fill_their_range_lose_the_lower_eight(tmp_path, write):
    read = read_image(write(tmp_path / "a.png", GRAY))
    image, transparent = read.rgb, read.transparent
    assert np.asarray(image)[..., 0].tolist() == [[0, 0, 1, 11], [15, 127, 156, 255]] and transparent is None
    color = read_image(write(tmp_path / "b.png", np.stack([GRAY, GRAY // 2, GRAY * 0], -1))).rgb
    assert np.asarray(color)[1].tolist() == [[15, 7, 0], [127, 63, 0], [156, 78, 0], [255, 127, 0]]


NARROW = {
    "12-bit sensor, PNG": (lambda path: png16(path, TWELVE), "16-bit grayscale values from 0 to 4,095"),
    "12-bit sensor, TIFF": (lambda path: tiff(path, TWELVE), "16-bit grayscale values from 0 to 4,095"),
    "12-bit sensor, big-endian": (lambda path: tiff(path, TWELVE, order=">"), "16-bit grayscale values from 0 to 4,095"),
    "10 bits": (lambda path: png16(path, TWELVE // 4), "from 0 to 1,023"),
    "14 bits": (lambda path: png16(path, TWELVE * 4), "from 0 to 16,380"),
    "reflectances, PNG": (lambda path: png16(path, np.stack([TWELVE % 3000] * 3, -1)), "16-bit color values from 0 to 2,"),
    "reflectances, TIFF": (lambda path: tiff(path, np.stack([TWELVE % 3000] * 3, -1)), "16-bit color values from 0 to 2,"),
    "signed": (lambda path: tiff(path, TWELVE.astype(np.int16) - 1024, 2), "signed 16-bit grayscale values from -1,024 to 3,071"),
    "signed, large": (lambda path: tiff(path, (GRAY // 2).astype(np.int16), 2), "signed 16-bit grayscale values from 0 to 32,767"),
    "signed, 8 bits": (lambda path: tiff(path, TWELVE.astype(np.int8), 2), "signed 8-bit"),
    "32 bits": (lambda path: tiff(path, TWELVE.astype(np.int32), 2), "32-bit grayscale values from 0 to 4,095"),
    "floating point": (lambda path: tiff(path, TWELVE.astype(np.float32) / 4095, 3), "32-bit floating-point grayscale values from 0 to 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", NARROW)
def test_values_of_no_known_range_are_refused_with_their_range_and_a_remedy(tmp_path, name):
    write, said = NARROW[name]
    write(tmp_path / "a.tif")
    with pytest.raises(StegoError, match=r"a\.tif holds ") as caught:
        read_image(tmp_path / "a.tif")
    assert said in str(caught.value) and '"range": [LOW, HIGH]' in str(caught.value)


@pytest.mark.parametrize(
    "write", [png16, tiff, lambda path, values: tiff(path, values.astype(np.int16), 2), lambda path, values: tiff(path, values.astype(np.float32), 3)]
)  # fmt: skip
def test_a_range_scales_all_images_of_a_folder_alike(tmp_path, write):
    """One image of a dataset is dark; each by its own range would make it bright."""
    for split in ("train", "val"):
        (tmp_path / "imgs" / split).mkdir(parents=True)
        write(tmp_path / "imgs" / split / "bright.tif", TWELVE)
        write(tmp_path / "imgs" / split / "dark.tif", TWELVE // 8)
    (tmp_path / "classes.json").write_text('{"range": [0, 4095]}')
    expected = [[0, 0, 127, 128], [249, 255, 255, 0]]
    for split in ("train", "val"):
        dataset = open_dataset("folder", tmp_path, split, n_classes=3)
        assert len(dataset.classes) == 3 and dataset.image(0)[0].tolist() == expected
        np.testing.assert_allclose(dataset.image(1)[0], np.array(expected) / 8, atol=0.6)


def test_a_range_and_an_exif_rule_go_with_the_classes_of_a_run(tmp_path):
    (tmp_path / "classes.json").write_text('{"names": ["a"], "range": [-1000, 3000.5], "exif": "ignore"}')
    classes = read_classes(tmp_path / "classes.json")
    write_classes(tmp_path / "again.json", classes)
    assert read_classes(tmp_path / "again.json") == classes and classes.rules == Rules((-1000, 3000.5), "ignore")


@pytest.mark.parametrize(
    "rules, said",
    [({"range": [1]}, "range"), ({"range": [5, 5]}, "range"), ({"range": "all"}, "range"), ({"range": [0, True]}, "range"), ({"range": [0, float("inf")]}, "range"), ({"exif": "no"}, "exif")],
)  # fmt: skip
def test_wrong_rules_are_explained(tmp_path, rules, said):
    (tmp_path / "classes.json").write_text(json.dumps({"names": ["a"]} | rules))
    with pytest.raises(StegoError, match=rf'classes\.json: "{said}" is '):
        read_classes(tmp_path / "classes.json")


def test_white_is_zero_at_sixteen_bits_too(tmp_path):
    """Radiographs are stored so. Pillow turns 8 bits round, and no others."""
    found = read_image(tiff(tmp_path / "a.tif", GRAY, photometric=0)).rgb
    assert np.asarray(found)[..., 0].tolist() == [[255, 255, 254, 244], [240, 128, 99, 0]]


def test_twelve_bits_that_a_file_declares_are_its_range(tmp_path):
    found = read_image(tiff(tmp_path / "a.tif", TWELVE, bits=12)).rgb
    assert np.asarray(found)[..., 0].tolist() == [[0, 0, 127, 128], [250, 255, 255, 0]]


def test_an_unreadable_tiff_says_what_is_not_read(tmp_path):
    tiff(tmp_path / "a.tif", np.zeros((4, 4, 5), np.uint16))
    with pytest.raises(StegoError, match=r"a\.tif cannot be read.*more than 4 channels"):
        read_image(tmp_path / "a.tif")


# ---------------------------------------------------------------------------------------------- transparency

LAYERED = np.full((4, 4, 4), (200, 30, 10, 255), np.uint8)
LAYERED[2, :, 3], LAYERED[3, :, 3] = 100, 0
HIDDEN = [[False] * 4, [False] * 4, [True] * 4, [True] * 4]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "TGA", "AVIF", "JPEG2000"])
def test_what_is_transparent_is_white_and_told(tmp_path, kind):
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    path = tmp_path / f"a.{'tga' if kind == 'TGA' else 'x'}"
    Image.fromarray(LAYERED).save(path, kind, **({"lossless": True} if kind == "WEBP" else {}))
    read = read_image(path)
    image, transparent = read.rgb, read.transparent
    assert transparent.tolist() == HIDDEN and image.mode == "RGB"
    found = np.asarray(image).astype(int)
    assert np.abs(found[:2] - (200, 30, 10)).max() < 8 and (found[2:] == 255).all()


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (2, 2), (200, 0, 0, 204)).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    image, transparent = read.rgb, read.transparent
    assert transparent is None and np.abs(np.asarray(image).astype(int) - (211, 51, 51)).max() <= 1


def transparent_files(folder: Path) -> dict[str, Path]:
    """One file a kind, whose left pixel is transparent."""
    gray = Image.fromarray(np.array([[7, 90]], np.uint8))
    palette = Image.fromarray(np.array([[1, 0]], np.uint8))
    palette.putpalette([90, 90, 90, 255, 0, 0])
    found = {name: folder / f"{name}.{name.partition('-')[0]}" for name in ("png-L", "png-LA", "png-P", "png-RGB", "gif-P", "tif-nodata", "tif-nodata-RGB", "tif-nan")}  # fmt: skip
    gray.save(found["png-L"], "PNG", transparency=7)
    Image.merge("LA", (gray, Image.fromarray(np.array([[0, 255]], np.uint8)))).save(found["png-LA"], "PNG")
    palette.save(found["png-P"], "PNG", transparency=1)
    gray.convert("RGB").save(found["png-RGB"], "PNG", transparency=(7, 7, 7))
    palette.save(found["gif-P"], "GIF", transparency=1)
    gray.save(found["tif-nodata"], "TIFF", tiffinfo={42113: "7"})
    gray.convert("RGB").save(found["tif-nodata-RGB"], "TIFF", tiffinfo={42113: " 7.0 "})
    Image.fromarray(np.array([[np.nan, 90]], np.float32)).save(found["tif-nan"], "TIFF")
    return found


@pytest.mark.parametrize(
    "name", ["png-L", "png-LA", "png-P", "png-RGB", "gif-P", "tif-nodata", "tif-nodata-RGB", "tif-nan"]
)
def test_every_way_to_be_transparent(tmp_path, name):
    """Alpha channels, transparent colors, GDAL's nodata and NaN."""
    read = read_image(transparent_files(tmp_path)[name], Rules(range=(0, 255)))
    image, transparent = read.rgb, read.transparent
    assert transparent.tolist() == [[True, False]] and np.asarray(image)[0].tolist() == [[255] * 3, [90] * 3]


def test_transparent_pixels_are_ignored_in_label_maps(tmp_path):
    standins.save(tmp_path / "imgs/train/a.png", LAYERED)
    standins.save(tmp_path / "labels/train/a.png", np.ones((4, 4), np.uint8))
    (tmp_path / "classes.json").write_text('{"names": ["a", "b"]}')
    dataset = open_dataset("folder", tmp_path, "train")
    expected = np.where(HIDDEN, -1, 1).tolist()
    assert dataset.label(0).tolist() == dataset[0][1].tolist() == expected


def test_a_mask_that_gdal_keeps_in_a_tiff_is_transparency(tmp_path):
    mask = Image.fromarray(np.array([[0, 255]], np.uint8))
    mask.encoderinfo = {"tiffinfo": {254: 4}}
    Image.new("RGB", (2, 1), (90, 90, 90)).save(tmp_path / "a.tif", save_all=True, append_images=[mask])
    read = read_image(tmp_path / "a.tif")
    image, transparent = read.rgb, read.transparent
    assert transparent.tolist() == [[True, False]] and np.asarray(image)[0].tolist() == [[255] * 3, [90] * 3]
    standins.save(tmp_path / "imgs/train/b.png", np.zeros((1, 2, 3), np.uint8)).unlink()
    (tmp_path / "a.tif").rename(tmp_path / "imgs/train/a.tif")
    standins.save(tmp_path / "labels/train/a.png", np.zeros((1, 2), np.uint8))
    (tmp_path / "classes.json").write_text('{"names": ["a"]}')
    assert open_dataset("folder", tmp_path, "train").label(0).tolist() == [[-1, 0]]


# ---------------------------------------------------------------------------------------------- label maps of few bits


def png_of(bits: int, ids: list[int]) -> bytes:
    """A grayscale PNG of 1, 2 or 4 bits with one row of ids."""
    packed = int("".join(f"{id_:0{bits}b}" for id_ in ids).ljust(-(-len(ids) * bits // 8) * 8, "0"), 2)
    row = b"\0" + packed.to_bytes(-(-len(ids) * bits // 8), "big")
    header = struct.pack(">IIBBBBB", len(ids), 1, bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(row)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


@pytest.mark.parametrize("bits, ids", [(1, [0, 1, 1]), (2, [0, 3, 1, 2]), (4, [0, 15, 1, 7])])
def test_label_maps_of_few_bits_hold_the_stored_numbers(tmp_path, bits, ids):
    """Pillow stretches them to 8 bits, as is right for photographs: 1 becomes 85 or 17, which may be another class."""
    standins.save(tmp_path / "imgs/train/a.png", np.zeros((1, len(ids), 3), np.uint8))
    (tmp_path / "labels/train").mkdir(parents=True)
    (tmp_path / "labels/train/a.png").write_bytes(png_of(bits, ids))
    (tmp_path / "classes.json").write_text(json.dumps({"names": [str(i) for i in range(90)]}))
    assert open_dataset("folder", tmp_path, "train").label(0).tolist() == [ids]


# ---------------------------------------------------------------------------------------------- orientation


def oriented(path: Path, orientation: int, kind: str) -> Path:
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(path, kind, exif=exif)
    return path


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_images_or_is_ignored(tmp_path, kind, orientation):
    path = oriented(tmp_path / "a.x", orientation, kind)
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file).convert("RGB")
    found = [read_image(path, rules).rgb for rules in (Rules(), Rules(exif="apply"), Rules(exif="ignore"))]
    assert [image.size for image in found] == [upright.size, upright.size, (32, 16)]
    for image, expected in zip(
        found, (upright, upright, read_image(oriented(tmp_path / "b.x", 1, kind)).rgb), strict=True
    ):
        assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() < 30


@pytest.mark.parametrize("split", ["train"])
@pytest.mark.parametrize("name", ["camvid", "cityscapes", "cocostuff27"])
def test_benchmarks_are_read_as_stored_because_their_label_maps_are(tmp_path, name, split):
    getattr(standins, name.rstrip("27"))(tmp_path, {"train": 1, "val": 1}, *((("Coco164kFull_Stuff_Coarse_7.txt",),) if "coco" in name else ()), 32, 64)  # fmt: skip
    dataset = open_dataset(name, tmp_path, split)
    oriented(dataset.images[0], 6, "JPEG")
    assert dataset.image(0).shape == (3, 16, 32)


def labeled_folder(root: Path, orientation: int, label: np.ndarray, **more: object) -> Path:
    (root / "imgs/train").mkdir(parents=True)
    oriented(root / "imgs/train/a.jpg", orientation, "JPEG")
    standins.save(root / "labels/train/a.png", label)
    (root / "classes.json").write_text(json.dumps({"names": ["a", "b"]} | more))
    return root


def test_a_label_map_on_the_stored_pixels_says_how_to_choose(tmp_path):
    stored = np.zeros((16, 32), np.uint8)
    with pytest.raises(
        StegoError, match=r'a\.jpg is \(32, 16\), its label map .*a\.png is \(16, 32\).*orientation 6.*"exif": "ignore"'
    ):
        open_dataset("folder", labeled_folder(tmp_path / "a", 6, stored), "train")[0]
    image, label = open_dataset("folder", labeled_folder(tmp_path / "b", 6, stored, exif="ignore"), "train")[0]
    assert image.shape[1:] == label.shape == (16, 32)
    with pytest.raises(StegoError, match=r"left as stored"):
        open_dataset("folder", labeled_folder(tmp_path / "c", 6, stored.T, exif="ignore"), "train")[0]


def test_a_label_map_with_an_orientation_of_its_own_is_turned_like_its_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    root = labeled_folder(tmp_path, 6, np.zeros((16, 32), np.uint8))
    stored = np.zeros((16, 32), np.uint8)
    stored[:8, :8] = 1
    Image.fromarray(stored).save(root / "labels/train/a.png", exif=exif)
    image, label = open_dataset("folder", root, "train")[0]
    assert ((image[0] > 128) == (label == 1)).float().mean() > 0.95


def test_rules_are_part_of_what_a_result_depends_on(tmp_path):
    identities = []
    for number, more in enumerate(({}, {"exif": "apply"}, {"exif": "ignore"}, {"range": [0, 9]})):
        identities.append(open_dataset("folder", labeled_folder(tmp_path / str(number), 3, np.zeros((16, 32), np.uint8), **more), "train").identity())  # fmt: skip
    assert identities[0] == identities[1] and len({str(one) for one in identities}) == 3


# ---------------------------------------------------------------------------------------------- formats and names


@pytest.mark.parametrize(
    "name", ["a.gif", "a.ppm", "a.pgm", "a.jfif", "a.JPE", "a.avif", "a.jp2", "a.tga", "a.TIFF", "a.dib"]
)
def test_formats_that_pillow_reads_are_read(tmp_path, name):
    kind = Image.registered_extensions()[Path(name.lower()).suffix]
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    Image.new("RGB", (16, 16), (90, 90, 90)).save(tmp_path / name, kind)
    (path,) = list_images(tmp_path)
    assert np.abs(np.asarray(read_image(path).rgb).astype(int) - 90).max() < 4


def test_a_broken_file_is_not_taken_for_a_format_without_a_mark(tmp_path):
    """A TGA begins with anything."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.tga")
    (tmp_path / "a.tga").rename(tmp_path / "a.jpg")
    with pytest.raises(StegoError, match=r"a\.jpg cannot be read"):
        read_image(tmp_path / "a.jpg")


def test_hidden_files_are_skipped_in_every_dataset(tmp_path):
    """macOS writes ._NAME beside NAME into archives and on other systems' disks."""
    standins.cityscapes(tmp_path, {"train": 2, "val": 1}, 32, 64)
    standins.camvid(tmp_path, {"train": 2, "val": 1}, 12, 24)
    for folder in ("cityscapes", "camvid"):
        for path in list((tmp_path / folder).rglob("*.png")):
            path.with_name(f"._{path.name}").write_bytes(b"\0\x05\x16\x07")
        city = next((tmp_path / folder).rglob("*.png")).parent
        (city.parent / f"._{city.name}").write_bytes(b"\0\x05\x16\x07")
        assert len(open_dataset(folder, tmp_path, "train")) == 2
        assert open_dataset(folder, tmp_path, "train")[1][1] is not None


# ---------------------------------------------------------------------------------------------- text

UMLAUTS = {"names": ["Straße", "Bäume", "空"]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_class_names_are_read_with_and_without_a_mark(tmp_path, encoding):
    (tmp_path / "classes.json").write_text(json.dumps(UMLAUTS, ensure_ascii=False), encoding=encoding)
    assert list(read_classes(tmp_path / "classes.json").names) == UMLAUTS["names"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_other_encodings_are_named_with_the_remedy(tmp_path, encoding):
    names = UMLAUTS["names"][:2] if encoding == "cp1252" else UMLAUTS["names"]
    (tmp_path / "classes.json").write_text(json.dumps({"names": names}, ensure_ascii=False), encoding=encoding)
    with pytest.raises(
        StegoError, match=r"classes\.json is (stored as UTF-16|not stored as UTF-8 \(line 1\)); save it as UTF-8"
    ):
        read_json(tmp_path / "classes.json")


def test_id_lists_with_a_mark_are_read(tmp_path):
    standins.cocostuff(tmp_path, {"train": 1, "val": 2}, ("Coco164kFull_Stuff_Coarse_7.txt",), 48, 182)
    standins.potsdam_patches(tmp_path, train=2, val=1, side=40)
    for path in (*(tmp_path / "cocostuff").rglob("*.txt"), *(tmp_path / "potsdam").glob("*.txt")):
        path.write_text("\ufeff" + path.read_text().replace("\n", "\r\n"), encoding="utf-8", newline="")
    assert (
        len(open_dataset("cocostuff27", tmp_path, "val")) == 2 and len(open_dataset("potsdam3", tmp_path, "train")) == 2
    )


@pytest.mark.parametrize(
    "names, said",
    [(["cat", "dog", "cat"], "'cat' is twice"), (["cat", "Cat "], "'Cat ' is twice"), (["cat", ""], "'' is empty"), (["cat", "  "], "'  ' is empty"), (["cat", "no class"], "'no class' is the name of what"),
     (["café", "cafe\u0301"], "'cafe\u0301' is twice"), (["cat", "\u200b"], r"'.*' is empty"), (["cat", "d\no\ng"], r"'d.*' is broken by a control")],
)  # fmt: skip
def test_class_names_tell_the_classes_apart(tmp_path, names, said):
    (tmp_path / "classes.json").write_text(json.dumps({"names": names}))
    with pytest.raises(StegoError, match=rf"classes\.json: class name {said}"):
        read_classes(tmp_path / "classes.json")


def test_a_misspelled_key_of_classes_json_is_told_and_a_remark_is_not(tmp_path):
    path = tmp_path / "classes.json"
    for key, meant in (("colours", "colors"), ("Range", "range"), ("name", "names")):  # codespell:ignore colours
        path.write_text(json.dumps({"names": ["cat"], key: []}))
        with pytest.raises(StegoError, match=rf"unknown key '{key}' \(did you mean '{meant}'\?\)"):
            read_classes(path)
    path.write_text(json.dumps({"names": ["سگ\u200cها"], "made by": "hand"}))
    assert read_classes(path).names == ("سگ\u200cها",), "joiners belong to some scripts"


def test_no_text_is_read_or_written_in_the_machines_own_encoding():
    found = []
    for name, tree in sources().items():
        if name.startswith("tests/"):
            continue
        for called, words in calls(tree):
            method = called.rpartition(".")[2]
            if method in ("read_text", "write_text") and "encoding" not in words and called != "read_text":
                found.append(f"{name}: {called}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "open":
                mode = next((ast.unparse(word.value) for word in node.keywords if word.arg == "mode"), None)
                mode = mode or (ast.unparse(node.args[1]) if len(node.args) > 1 else "'r'")
                if "b" not in mode and not any(word.arg == "encoding" for word in node.keywords):
                    found.append(f"{name}: {ast.unparse(node)}")
    assert not found


def test_a_machine_of_another_encoding_reads_and_writes_the_same(tmp_path):
    """As cp1252 on Windows; here ASCII."""
    (tmp_path / "classes.json").write_text(json.dumps(UMLAUTS, ensure_ascii=False), encoding="utf-8")
    code = (
        "import locale, sys; from pathlib import Path; from stego_lib.datasets.folder import read_classes, write_classes; "
        "assert locale.getpreferredencoding(False).lower() not in ('utf-8', 'utf8'), 'shows nothing'; "
        f"root = Path({str(tmp_path)!r}); write_classes(root / 'again.json', read_classes(root / 'classes.json'))"
    )
    settings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | settings)
    assert list(read_classes(tmp_path / "again.json").names) == UMLAUTS["names"] and read_text(tmp_path / "again.json")
