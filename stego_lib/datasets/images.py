"""Reads images as 8-bit RGB and label maps as ids: Pillow, and rasterio for what Pillow does not read correctly."""

import io
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from PIL import Image
from PIL.ExifTags import Base
from PIL.Image import Transpose
from torch import Tensor

from ..utils.errors import StegoError, check_installed
from ..utils.notices import notice
from ..utils.paths import user_path
from .classes import DEFAULT, Range, Rules, rules_of

ImageLike: TypeAlias = str | Path | Image.Image | np.ndarray | Tensor
"""A path, a PIL image, a uint8 array (H, W, 3) or a uint8 tensor (3, H, W)."""
Source: TypeAlias = Path | BinaryIO
"""A path, or an open binary file; its attribute `name` appears in errors."""

Image.init()
# Formats that a file may have, whatever its name says. (Pillow hands EPS to a program that runs it.)
FORMATS = tuple({"JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF"} & set(Image.OPEN))
# Endings, in lower case, of the files in a folder that are read as images.
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")}
# What Pillow raises for a file that it cannot read.
BROKEN = (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError, MemoryError)
# TIFF tags in which GDAL stores the meaning of bands and the value of pixels without data.
GDAL_TAGS = {42112, 42113}
# First bytes of a TIFF; the last two are BigTIFF.
TIFF_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PAGES = "Images with several frames or pages: only the first is read."
METADATA = "The metadata of some images are broken and ignored, also their EXIF orientation."
# Chunks of PNG and WebP files that are not metadata.
PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"}
# Share of pixels that are neither opaque nor transparent in a TIFF, above which its alpha band may be something else.
MAX_PARTIAL = 0.5
# EXIF orientation -> how the stored pixels are turned upright.
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An image as it was read."""

    rgb: Image.Image
    """Upright, composited on white."""
    transparent: np.ndarray | None
    """bool (H, W), True where more than half transparent or without data; None if nowhere."""
    orientation: int
    """EXIF orientation of the file, 1 to 8."""


@contextmanager
def naming(name: object) -> Iterator[None]:
    """Turns errors of reading a file into StegoErrors that start with its name."""
    try:
        yield
    except StegoError as error:
        raise StegoError(f"{name} {error}") from None
    except BROKEN as error:
        raise StegoError(f"{name} cannot be read ({error}). Replace or remove the file.") from error


def read_image(source: Source, rules: Rules = DEFAULT) -> StoredImage:
    """Reads an image file as upright 8-bit RGB.

    Pillow reads 8-bit images and 16-bit gray PNG. rasterio (extra `geo`) reads JPEG 2000, 16-bit color, and TIFF with
    more bits, masks, nodata or further bands; it goes by the file's color interpretation and masks.

    Parameters
    ----------
    source
        A path or an open binary file. Of several frames or pages the first is read, with a notice.
    rules
        `range` scales images of more than 8 bits per channel; `exif="ignore"` leaves pixels as stored.

    Raises
    ------
    StegoError
        For a broken file, one above Pillow's limit of about 179 megapixels, and more than 8 bits without a range.

    Examples
    --------
    >>> read_image(Path("street.jpg")).rgb.size
    """
    with naming(f"image {name_of(source)}"):
        if os.path.exists(mask := f"{name_of(source)}.msk"):
            raise OSError(f"its mask is in {mask}; GDAL_TIFF_INTERNAL_MASK=YES writes it into the image")
        rgb, transparent, orientation = _read(source, rules.range)
    if orientation > 1 and rules.exif != "ignore":
        rgb = rgb.transpose(TURNS[orientation])
        if transparent is not None:
            transparent = np.asarray(Image.fromarray(transparent).transpose(TURNS[orientation]))
    return StoredImage(rgb, transparent, orientation)


def name_of(source: Source) -> str:
    """The path of a file, for errors."""
    return str(source if isinstance(source, Path) else getattr(source, "name", "in memory"))


def _read(source: Source, limits: Range | None) -> tuple[Image.Image, np.ndarray | None, int]:
    """RGB as stored, transparent pixels, EXIF orientation."""
    try:
        return _read_with_pillow(source, limits)
    except StegoError:
        raise
    except BROKEN:
        content = _content(source)
        if content[:4] in TIFF_MARKS:
            return *_read_raster(content, limits), 1
        if len(pixels := _without_metadata(content)) == len(content):
            raise
        read = _read_with_pillow(io.BytesIO(pixels), limits)
        notice(METADATA)
        return read


def _read_with_pillow(source: Source, limits: Range | None) -> tuple[Image.Image, np.ndarray | None, int]:
    """What `_read` returns, of a file that Pillow can open."""
    with Image.open(source, formats=FORMATS) as file:
        if _needs_rasterio(file):  # first: loading removes what this looks at
            return *_read_raster(_content(source), limits), _orientation(file)
        file.load()  # before `_orientation`, in which broken pixels would look like broken metadata
        orientation = _orientation(file)
        if file.format in ("GIF", "PNG", "WEBP", "AVIF") and getattr(file, "is_animated", False):
            notice(PAGES)
        return *_to_rgb(file, limits), orientation


def _content(source: Source) -> bytes:
    if isinstance(source, Path):
        return source.read_bytes()
    source.seek(0)
    return source.read()


def _without_metadata(content: bytes) -> bytes:
    """A PNG or WebP without metadata, since broken metadata keep Pillow from opening it; other files unchanged."""
    png = content.startswith(b"\x89PNG")
    if not png and content[8:12] != b"WEBP":
        return content
    start = place = 8 if png else 12
    kept = b""
    while place < len(content):
        first, second = content[place : place + 4], content[place + 4 : place + 8]
        if png:
            kind, end = second, place + 12 + int.from_bytes(first, "big")
        else:
            size = int.from_bytes(second, "little")
            kind, end = first, place + 8 + size + size % 2
        if kind in PIXEL_CHUNKS:
            kept += content[place:end]
        place = end
    return content[:start] + kept if png else b"RIFF" + struct.pack("<I", 4 + len(kept)) + b"WEBP" + kept


def _orientation(file: Image.Image) -> int:
    """EXIF orientation of an opened file; 1 where it, or the EXIF block, is broken."""
    try:
        value = file.getexif().get(Base.Orientation, 1)
    except Exception:  # Pillow raises a dozen types here; a fault in the metadata is no fault in the pixels
        value = None
    if isinstance(value, bytes) and len(value) == 1:  # stored as a byte
        value = value[0]
    if isinstance(value, str) and value.strip("\0 ").isdecimal():  # stored as text
        value = int(value.strip("\0 "))
    if isinstance(value, int) and 0 <= value <= 8:
        return max(1, value)  # 0 stands for "unknown"
    notice(METADATA)
    return 1


def _needs_rasterio(file: Image.Image) -> bool:
    """Whether Pillow reads an opened file wrongly or in part."""
    tiles = getattr(file, "tile", ())
    raw = tiles[0][3] if tiles else ""  # how pixels are stored, as in "RGB;16B"
    if file.format != "TIFF":
        return file.format == "JPEG2000" or (";16" in str(raw) and not file.mode.startswith("I"))
    tags = file.tag_v2  # type: ignore[attr-defined]
    bits, kinds = np.atleast_1d(tags.get(258, 1)).tolist(), np.atleast_1d(tags.get(339, 1)).tolist()
    simple = {*bits} <= {1, 8} and {*kinds} == {1} and len(bits) == len(file.getbands())
    special = GDAL_TAGS & {*tags} or tags.get(274, 1) != 1 or file.n_frames > 1  # type: ignore[attr-defined]
    return bool(special) or not simple


def _to_rgb(image: Image.Image, limits: Range | None) -> tuple[Image.Image, np.ndarray | None]:
    """An image of any mode as RGB on white, and its transparent pixels."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)[..., None]
        known = np.isfinite(values).all(-1)
        return _on_white(_scale(values, known, limits), ~known)
    if not image.has_transparency_data:
        return image.convert("RGB"), None
    layered = image.convert("RGBA")
    rgb = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    alpha = np.asarray(layered.getchannel("A"))
    if image.format == "TIFF":
        _check_alpha(alpha)
    return _on_white(np.asarray(rgb), alpha < 128)


def _check_alpha(alpha: np.ndarray) -> None:
    """A notice for an alpha band of a TIFF, uint8, with many values: GDAL calls a fourth band alpha by default."""
    if ((alpha > 0) & (alpha < 255)).mean() > MAX_PARTIAL:
        notice(
            "TIFF images have an alpha band that makes most pixels partly transparent. If the band is not alpha, but "
            "near infrared, say so in the file: gdal_edit.py -colorinterp_4 undefined."
        )


def _scale(values: np.ndarray, known: np.ndarray, limits: Range | None) -> np.ndarray:
    """Stored values (H, W, channels) as uint8. known: bool (H, W), where there are values."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "c":
        raise OSError("it holds complex numbers")
    if limits is None:
        span = f" from {values[known].min():g} to {values[known].max():g}" if known.any() else ""
        raise StegoError(
            f'holds {values.dtype} values{span}. Write "range": [LOW, HIGH], the values of black and white, into the '
            "classes.json of the folder."
        )
    low, high = limits
    scaled = (np.nan_to_num(values).astype(np.float64) - low) / (high - low)
    return (255 * np.clip(scaled, 0, 1)).round().astype(np.uint8)


def _on_white(values: np.ndarray, void: np.ndarray) -> tuple[Image.Image, np.ndarray | None]:
    """uint8 values (H, W, 1 or 3) as an RGB image, white where `void`; and `void`, or None if it is all False."""
    shown = np.where(void[..., None], np.uint8(255), values)
    rgb = Image.fromarray(np.ascontiguousarray(np.broadcast_to(shown, (*void.shape, 3))))
    return rgb, void if void.any() else None


def _read_raster(content: bytes, limits: Range | None) -> tuple[Image.Image, np.ndarray | None]:
    """Reads an image with rasterio."""
    check_installed("Reading it", ["rasterio"], "geo")
    import rasterio

    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    try:
        with rasterio.MemoryFile(content) as memory, memory.open() as file:
            return _on_white(*read_bands(file, color_bands(file), limits))
    except rasterio.errors.RasterioError as error:
        raise OSError(error) from error


def color_bands(file: Any) -> list[int]:
    """Numbers of the bands of red, green and blue, or of the gray one, in a file that rasterio has opened.

    The color interpretation decides; without one, one band is gray and three are colors. A notice names other bands.
    """
    from rasterio.enums import ColorInterp

    kinds = dict(enumerate(file.colorinterp, 1))
    first = {kind: band for band, kind in reversed(kinds.items())}
    plain = [band for band, kind in kinds.items() if kind != ColorInterp.alpha]
    bands: list[Any] = [first.get(kind) for kind in (ColorInterp.red, ColorInterp.green, ColorInterp.blue)]
    if None in bands:
        bands = plain
    if len(bands) not in (1, 3):
        raise StegoError(f"has {len(plain)} bands, not red, green and blue. Save the three to be used.")
    if others := [f"{band} ({file.descriptions[band - 1] or kinds[band].name})" for band in plain if band not in bands]:
        notice(f"Images have bands beside red, green and blue, which are not used: {', '.join(others)}.")
    if file.subdatasets:
        notice(PAGES)
    return bands


def read_bands(
    file: Any, bands: list[int], limits: Range | None = None, window: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Colors, uint8 (H, W, 1 or 3), and the pixels without data, bool (H, W), of a file that rasterio has opened.

    bands: see `color_bands`; limits: values of black and white; window: a part of the image, None for all of it.
    """
    from rasterio.enums import ColorInterp

    values = np.moveaxis(file.read(bands, window=window), 0, -1)
    known = (file.dataset_mask(window=window) >= 128) & np.isfinite(values).all(-1)
    if ColorInterp.alpha in file.colorinterp:
        alpha = file.read(file.colorinterp.index(ColorInterp.alpha) + 1, window=window)
        if alpha.dtype == np.uint8:
            _check_alpha(alpha)
        if file.count > 4:  # GDAL's mask heeds the alpha band of 2 or 4 bands alone
            known &= alpha > np.iinfo(alpha.dtype).max // 2 if alpha.dtype.kind in "iu" else alpha > 0
    white_is_zero = "MINISWHITE" in file.tags(ns="IMAGE_STRUCTURE")  # GDAL gives it a palette, full of 8 bits alone
    palette_holds = values.dtype == np.uint8 or (values.dtype == np.uint16 and not white_is_zero)
    if ColorInterp.palette in file.colorinterp and palette_holds:
        palette = file.colormap(bands[0])
        colors = [palette.get(i, (0, 0, 0))[:3] for i in range(np.iinfo(values.dtype).max + 1)]
        return np.array(colors, np.uint8)[values[..., 0]], ~known
    bits = int(file.tags(bands[0], ns="IMAGE_STRUCTURE").get("NBITS", 8))
    if values.dtype == np.uint8 and bits < 8:
        values = values * np.uint8(255 // (2**bits - 1))
    values = _scale(values, known, limits)
    return 255 - values if white_is_zero else values, ~known


def image_size(path: Path, rules: Rules = DEFAULT) -> tuple[int, int]:
    """Height and width of an image as `read_image` gives it, by its header."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            width, height = file.size
            turned = _orientation(file) >= 5 and rules.exif != "ignore"
    except BROKEN:  # a file for rasterio, or for an error that names it
        width, height = read_image(path, rules).rgb.size
        turned = False
    return (width, height) if turned else (height, width)


def has_transparency(path: Path) -> bool:
    """Whether an image may have transparent pixels, by its header."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            return file.has_transparency_data or file.mode == "F" or _needs_rasterio(file)
    except BROKEN:  # also a TIFF that rasterio alone can read
        return True


def read_ids(source: Source) -> np.ndarray:
    """The ids of a label map as stored, int64 (H, W). StegoError for a broken file, a JPEG, colors and fractions."""
    with naming(f"label map {name_of(source)}"), Image.open(source, formats=FORMATS) as file:
        if file.format == "JPEG" or file.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
            raise StegoError(f"is {file.format} {file.mode}. Save one class id per pixel as 8-bit gray PNG.")
        tiles: Any = getattr(file, "tile", None)
        raw = tiles[0][3] if file.mode == "L" and tiles else ""
        stretched = {"L;2": 85, "L;4": 17}.get(str(raw), 1)  # Pillow scales these to 8 bits
        return np.array(file).astype(np.int64) // stretched


def as_tensor(image: ImageLike, rules: Rules = DEFAULT) -> tuple[Tensor, np.ndarray | None]:
    """An image of any kind as uint8 (3, H, W), and where it is transparent, bool (H, W) or None.

    Files are read by the rules of their folder (see `rules_of`), otherwise by `rules`, as PIL images are; arrays and
    tensors are taken as they are. A path that is text may hold `~` and variables. Raises StegoError for a file that
    cannot be read, and for an array that is no image.
    """
    transparent = None
    if isinstance(image, str | Path):
        path = user_path(image)
        read = read_image(path, rules_of(path, rules))
        image, transparent = read.rgb, read.transparent
    elif isinstance(image, Image.Image):
        with naming("The image"):
            image, transparent = _to_rgb(image, rules.range)
    if isinstance(image, Image.Image | np.ndarray):
        image = np.array(image, order="C")  # a copy: torch takes neither read-only arrays nor negative strides
        if image.ndim == 3 and image.dtype == np.uint8:
            image = torch.from_numpy(image).movedim(-1, 0)
    if (
        isinstance(image, Tensor)
        and image.dtype == torch.uint8
        and image.ndim == 3
        and len(image) == 3
        and image.numel()
    ):
        return image, transparent
    array = isinstance(image, Tensor | np.ndarray)
    what = f"{image.dtype} of shape {tuple(image.shape)}" if array else type(image).__name__
    raise StegoError(f"An image must be a uint8 array (H, W, 3) or a uint8 tensor (3, H, W), not {what}.")
