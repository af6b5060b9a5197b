"""What image files hold: formats, bits per channel, transparency, further pages, palettes."""

import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from PIL.ExifTags import Base
from PIL.Image import Transpose

warnings.filterwarnings(
    "ignore", category=Image.DecompressionBombWarning, append=True
)  # twice as many pixels are an error
Image.init()
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "BMP", "DIB", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF")
    if name in Image.OPEN  # AVIF needs Pillow 11.3
)
"""Formats that an image file may have, whatever its name says. Pillow knows more; EPS, say, it hands to a program that runs it."""
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "TGA", "MPO")}
"""Endings, in lower case, of the files in a folder that are read as images."""
SUFFIXES -= {".avifs", ".pfm"}
BROKEN = (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError, MemoryError)
"""What Pillow raises for a file that it cannot read."""
NODATA = 42113
"""TIFF tag in which GDAL writes the value of pixels without data."""
CLOSE = 1024
"""Pixels per side of the part of an image that is looked at closely."""
FILLED = 1 / 4
"""A 16-bit image whose largest value is above this part of the range is taken to fill it."""
REMEDY = (
    'write "range": [LOW, HIGH], the limits over all your images, into the classes.json of their folder (for color 0 and 65535 alone), '
    "or save them with 8 bits per channel: numpy.clip((values - LOW) / (HIGH - LOW) * 255, 0, 255).astype('uint8')"
)
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""EXIF orientation -> how the stored pixels are turned to stand upright."""
BACK = {Transpose.ROTATE_90: Transpose.ROTATE_270, Transpose.ROTATE_270: Transpose.ROTATE_90}
"""The turns that are not their own inverse."""


@dataclass(frozen=True)
class Rules:
    """What classes.json may say about reading the images of a folder."""

    range: tuple[float, float] | None = None
    """Stored values of black and white, for images of more than 8 bits per channel. None: the whole range of 16 bits."""
    exif: Literal["apply", "ignore"] | None = None
    """Turn images as their EXIF orientation says, or leave the pixels as stored. None: turn, and say so where labels exist."""


DEFAULT = Rules()


class NoRange(Exception):
    """The values of an image have no known black and white."""

    def __init__(self, depth: str, low: float, high: float):
        super().__init__(
            f"holds {depth} values from {low:,g} to {high:,g}, and nothing says which are black and white: {REMEDY}"
        )


def formats_of(path: Path) -> tuple[str, ...]:
    """What a file may be; TGA, which has no mark of its own, only under its own name."""
    return ("TGA",) if path.suffix.lower() in (".tga", ".icb", ".vda", ".vst") else FORMATS


def several(file: Image.Image) -> bool:
    """Whether an opened file holds more images than its first: frames or pages. Overviews and masks are not counted."""
    if file.format == "TIFF":
        return bool(next_page(file) == 0)
    return file.format in ("GIF", "PNG", "WEBP", "AVIF") and bool(getattr(file, "is_animated", False))


def next_page(file: Image.Image) -> int | None:
    """What kind of image follows the first of a TIFF: 0 another one, 1 a smaller copy, 4 a mask; None if nothing."""
    if not getattr(file, "is_animated", False):
        return None
    file.seek(1)
    kind = file.tag_v2.get(254, 0)  # type: ignore[attr-defined]
    file.seek(0)
    return kind & 5


def label_palette(path: Path | None) -> list[tuple[int, ...]]:
    """The colors of a label map file with a palette, in the order of ids; none for others."""
    try:
        with Image.open(path or "", formats=FORMATS) as file:
            colors = (file.getpalette() or []) if file.mode == "P" else []
    except BROKEN:
        return []
    return [tuple(colors[i : i + 3]) for i in range(0, len(colors), 3)]


def stored_numbers(file: Image.Image, rules: Rules) -> np.ndarray:
    """The numbers that an opened label map holds. Pillow stretches grayscale of 2 and 4 bits to 8."""
    raw = [tile[3] if isinstance(tile[3], str) else (tile[3] or ("",))[0] for tile in getattr(file, "tile", ())]
    stretched = {"L;2": 85, "L;4": 17}.get(raw[0], 1) if raw and file.mode == "L" else 1
    return np.array(turn(file, rules)) // stretched if stretched > 1 else np.array(turn(file, rules))


def depth_of(file: Image.Image) -> str | None:
    """What an opened file holds instead of unsigned 8 bits per channel, None for those. Reads no pixels."""
    tags = getattr(file, "tag_v2", {})
    signed = 2 in np.atleast_1d(tags.get(339, 1)).tolist()
    if file.mode.startswith("I;16"):
        return "16-bit grayscale"
    if file.mode == "I":
        bits = tags.get(258, (16 if file.format in ("PPM", "PNG") else 32,))[0]
        return f"{'signed ' if signed else ''}{bits}-bit grayscale"
    if file.mode == "F":
        return "32-bit floating-point grayscale"
    if signed:
        return "signed 8-bit"
    raw = [tile[3] if isinstance(tile[3], str) else (tile[3] or ("",))[0] for tile in getattr(file, "tile", ())]
    if any(isinstance(mode, str) and ";16" in mode for mode in raw):
        return "16-bit color"
    return "16-bit color" if file.format == "JPEG2000" and _jpeg2000_bits(file) == 16 else None


def _jpeg2000_bits(file: Image.Image) -> int:
    """Bits per channel that the file declares; other numbers than 16 are stretched to 8 by their own range."""
    stream = file.fp  # type: ignore[attr-defined]
    before = stream.tell()
    stream.seek(0)
    start = stream.read(2**14)
    stream.seek(before)
    mark = start.find(b"\xff\x4f\xff\x51")
    return (start[mark + 42] & 0x7F) + 1 if 0 <= mark < len(start) - 42 else 8


def value_range(path: Path) -> tuple[str, float, float] | None:
    """Depth, smallest and largest value of a file of more than 8 bits per channel; None for others and broken ones."""
    try:
        with Image.open(path, formats=formats_of(path)) as file:
            depth = depth_of(file)
            if depth is None or depth.endswith("color"):
                return None
            values, missing = _values(file, getattr(file, "tag_v2", {}))
    except BROKEN:
        return None
    known = values[~missing]
    return (depth, float(known.min()), float(known.max())) if known.size else None


def fills(depth: str, low: float, high: float) -> bool:
    """Whether values fill the range of their type well enough for it to be what black and white mean."""
    return depth.startswith("16-bit") and low >= 0 and high > FILLED * 65535


def _values(image: Image.Image, tags: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """Stored numbers of a grayscale image, float64 (H, W), and where there are none."""
    bits = np.atleast_1d(tags.get(258, 16))[0]
    values = np.asarray(image).astype(np.float64)
    missing = ~np.isfinite(values) | _nodata(tags, values[..., None])
    if 8 < bits < 16 and image.mode.startswith("I;16"):
        values = values * (65535 / (2**bits - 1))  # the file itself says how far its range goes
    return values, missing


def deep_to_rgb(image: Image.Image, depth: str, rules: Rules, tags: Mapping) -> tuple[Image.Image, np.ndarray | None]:
    """Grayscale of more than 8 bits, scaled by the range in `rules`, or by that of 16 bits where the values fill it."""
    if depth == "signed 8-bit":
        raise NoRange(depth, -128, 127)
    if depth == "16-bit color":  # Pillow gives the upper 8 bits alone
        rgb, transparent = to_rgb(image, tags)
        known = np.asarray(rgb)[slice(None) if transparent is None else ~transparent]
        if rules.range != (0, 65535) and known.size and known.max() <= 255 * FILLED:
            raise NoRange(depth, 256 * int(known.min()), 256 * int(known.max()) + 255)
        return rgb, transparent
    values, missing = _values(image, tags)
    known = values[~missing]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 65535.0)
    if rules.range is None and not fills(depth, low, high):
        raise NoRange(depth, low, high)
    black, white = rules.range or (0, 65535)
    scale = 255 / (white - black)
    gray = np.floor(values / 256) if rules.range is None else np.round((values - black) * scale)
    if tags.get(262) == 0:
        gray = 255 - gray  # "white is zero", which Pillow turns at 8 bits alone
    gray = np.where(missing, 255, np.clip(np.nan_to_num(gray), 0, 255)).astype(np.uint8)
    return Image.fromarray(gray).convert("RGB"), missing if missing.any() else None


def to_rgb(image: Image.Image, tags: Mapping) -> tuple[Image.Image, np.ndarray | None]:
    """8 bits per channel: alphper channels, transparent colors and GDAL's missing values composited on white."""
    missing = None
    if NODATA in tags and image.mode in ("L", "RGB"):
        found = _nodata(tags, np.atleast_3d(np.asarray(image)))
        missing = found if found.any() else None
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        clear = np.asarray(layered.getchannel("A")) < 128
        missing = clear if clear.any() else None
        rgb = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    else:
        rgb = image if image.mode == "RGB" and missing is None else image.convert("RGB")  # a copy, if it is painted on
    if missing is not None:
        rgb.paste("white", mask=Image.fromarray(missing))
    return rgb, missing


def _nodata(tags: Mapping, values: np.ndarray) -> np.ndarray:
    """Where (H, W, channels) hold the value that a GeoTIFF names for pixels without data, in all channels."""
    text = str(tags.get(NODATA, ""))
    number = re.match(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text)
    if not number:
        return np.zeros(values.shape[:2], bool)
    return (values == float(number[0])).all(-1)


def is_flat(image: Image.Image) -> Literal["", "gray", "color"]:
    """Whether an image has 2 to 32 colors, in areas rather than dots: a label map, a mask, a drawing."""
    if image.mode not in ("1", "L", "P", "RGB", "RGBA") or min(image.size) < 8:
        return ""
    width, height = image.size
    few = image.resize((min(width, 128), min(height, 128)), Image.Resampling.NEAREST)
    if not 1 < len(np.unique(_packed(np.asarray(few)))) <= 32:  # a quick look, which nearly all photographs fail
        return ""
    left, top = max(0, width - CLOSE) // 2, max(0, height - CLOSE) // 2
    pixels = np.asarray(image.crop((left, top, min(width, left + CLOSE), min(height, top + CLOSE))))
    values = _packed(pixels)
    if (values[:, 1:] == values[:, :-1]).mean() <= 0.9 or len(np.unique(values)) > 32:
        return ""
    return "gray" if pixels.ndim == 2 else "color"


def _packed(pixels: np.ndarray) -> np.ndarray:
    """One number per pixel, (H, W)."""
    return pixels if pixels.ndim == 2 else pixels.astype(np.int64) @ (1 << 8 * np.arange(pixels.shape[2]))


def turn(file: Image.Image, rules: Rules) -> Image.Image:
    """An opened file's pixels, loaded: upright as its EXIF data say, or as stored if `rules` ignore them."""
    orientation = file.getexif().get(
        Base.Orientation, 1
    )  # asked before loading, when a TIFF turns itself and forgets it
    file.load()
    method, turned = TURNS.get(orientation), file.format == "TIFF"
    if method is None or turned != (rules.exif == "ignore"):
        return file
    return file.transpose(BACK.get(method, method) if turned else method)
