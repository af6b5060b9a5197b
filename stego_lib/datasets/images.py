"""Reads images as 8-bit RGB and label maps as ids: Pillow, and rasterio for what Pillow does not read correctly."""

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.Image import Transpose
from torch import Tensor

from ..utils.errors import StegoError, check_installed
from ..utils.notices import notice
from ..utils.paths import user_path
from .classes import DEFAULT, Range, Rules

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
    orientation = 1
    try:
        with Image.open(source, formats=FORMATS) as file:
            special = _needs_rasterio(file)  # first: a PNG loses what this looks at when its EXIF data are read
            orientation = _orientation(file)
            if not special:
                file.load()
                if file.format in ("GIF", "PNG", "WEBP", "AVIF") and getattr(file, "is_animated", False):
                    notice(PAGES)
                return *_to_rgb(file, limits), orientation
    except (UnidentifiedImageError, SyntaxError):
        if _content(source)[:4] not in TIFF_MARKS:
            raise
    return *_read_raster(_content(source), limits), orientation


def _content(source: Source) -> bytes:
    if isinstance(source, Path):
        return source.read_bytes()
    source.seek(0)
    return source.read()


def _orientation(file: Image.Image) -> int:
    """EXIF orientation of an opened file; 1 where it, or the EXIF block, is broken."""
    try:
        value = file.getexif().get(Base.Orientation, 1)
    except Exception:  # Pillow raises a dozen types here; a fault in the metadata is no fault in the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


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
    return _on_white(np.asarray(rgb), np.asarray(layered.getchannel("A")) < 128)


def _scale(values: np.ndarray, known: np.ndarray, limits: Range | None) -> np.ndarray:
    """Stored values (H, W, channels) as uint8. known: bool (H, W), where there are values."""
    if values.dtype == np.uint8:
        return values
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
    """Reads an image with rasterio: bands by their color interpretation, missing pixels by masks, alpha and nodata."""
    check_installed("Reading it", ["rasterio"], "geo")
    import rasterio
    from rasterio.enums import ColorInterp
    from rasterio.io import MemoryFile

    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    try:
        with MemoryFile(content) as memory, memory.open() as file:
            colors = {kind: band for band, kind in reversed(list(enumerate(file.colorinterp, 1)))}
            plain = [band for band, kind in enumerate(file.colorinterp, 1) if kind != ColorInterp.alpha]
            bands: list[Any] = [colors.get(kind) for kind in (ColorInterp.red, ColorInterp.green, ColorInterp.blue)]
            if None in bands:
                bands = plain
            if len(bands) not in (1, 3):
                raise StegoError(f"has {len(plain)} bands, not red, green and blue. Save the three to be used.")
            if len(plain) > len(bands):
                notice("Images have bands beside red, green and blue, which are not used.")
            if file.subdatasets:
                notice(PAGES)
            values, white_is_zero = (
                np.moveaxis(file.read(bands), 0, -1),
                "MINISWHITE" in file.tags(ns="IMAGE_STRUCTURE"),
            )
            if ColorInterp.palette in file.colorinterp and values.dtype == np.uint8:
                palette = file.colormap(bands[0])
                values = np.array([palette.get(i, (0, 0, 0))[:3] for i in range(256)], np.uint8)[values[..., 0]]
                white_is_zero = False  # the palette says so already
            known = (file.dataset_mask() >= 128) & np.isfinite(values).all(-1)
    except rasterio.errors.RasterioError as error:
        raise OSError(error) from error
    values = _scale(values, known, limits)
    return _on_white(255 - values if white_is_zero else values, ~known)


def has_transparency(path: Path) -> bool:
    """Whether an image may have transparent pixels, by its header."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            return file.has_transparency_data or file.mode == "F" or _needs_rasterio(file)
    except BROKEN:
        return False


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

    Files and PIL images are read by `rules`; arrays and tensors are taken as they are. A path that is text may hold
    `~` and variables. Raises StegoError for a file that cannot be read, and for an array that is no image.
    """
    transparent = None
    if isinstance(image, str | Path):
        read = read_image(user_path(image) if isinstance(image, str) else image, rules)
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
