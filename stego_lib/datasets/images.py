"""Reads images as 8-bit RGB and label maps as ids, with Pillow, and with rasterio what Pillow does not support."""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from PIL.ExifTags import Base
from PIL.Image import Transpose
from torch import Tensor

from ..utils.errors import StegoError, check_installed
from ..utils.notices import notice
from ..utils.paths import user_path
from .classes import DEFAULT, Classes, Range, Rules, read_classes

ImageLike: TypeAlias = str | Path | Image.Image | np.ndarray | Tensor
"""A path, a PIL image, a uint8 array (H, W, 3) or a uint8 tensor (3, H, W)."""

Image.init()
# Accepted formats, independent of the suffix. (Pillow would pass EPS to an external program, which executes it.)
FORMATS = tuple({"JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF"} & set(Image.OPEN))
# Suffixes, in lower case, of images in a folder.
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")}
# Errors of Pillow for unreadable files.
READ_ERRORS = (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError, MemoryError)
# TIFF tags of GDAL's metadata and nodata value.
GDAL_TAGS = {42112, 42113}
# First bytes of TIFF and BigTIFF files.
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PAGES = "Images with several frames or pages: only the first is read."
# Share of partly transparent pixels in a TIFF above which its fourth band is probably not alpha.
MAX_PARTIAL = 0.5
# Megabytes of blocks that GDAL keeps: by default 5 % of the machine's memory.
CACHE = 128
# EXIF orientation -> the operation that rotates stored pixels upright.
ROTATIONS = {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An image with its transparency and orientation."""

    rgb: Image.Image
    """Upright, composited on white."""
    transparent: np.ndarray | None
    """bool (H, W), pixels that are more than half transparent or have no data; None if there are none."""
    orientation: int
    """EXIF orientation, 1 to 8."""


@contextmanager
def naming(name: object) -> Iterator[None]:
    """Turns errors of reading a file into StegoErrors that begin with its name."""
    try:
        yield
    except StegoError as error:
        raise StegoError(f"{name} {error}") from None
    except READ_ERRORS as error:
        raise StegoError(f"{name} cannot be read ({error}). Replace or remove it.") from error


def read_image(path: Path, rules: Rules = DEFAULT, content: bytes | None = None) -> StoredImage:
    """Reads an image file as upright 8-bit RGB. Only the first of several frames or pages is read, with a notice.

    Pillow reads 8-bit images and 16-bit gray PNG. rasterio (extra `geo`) reads JPEG 2000, 16-bit color, and TIFF with
    more bits, masks, nodata or additional bands, by the file's color interpretation and masks.

    Parameters
    ----------
    path
        The file.
    rules
        `range` scales images of more than 8 bits per channel; `exif="ignore"` does not rotate.
    content
        The content of the file, if it is already read.

    Raises
    ------
    StegoError
        For an unreadable file, more than Pillow's limit of 179 megapixels, and more than 8 bits without a range.

    Examples
    --------
    >>> read_image(Path("street.jpg")).rgb.size
    """
    with naming(f"image {path}"):
        rgb, transparent, orientation = _read(content or path.read_bytes(), rules.range)
    if orientation > 1 and rules.exif != "ignore":
        rgb = rgb.transpose(ROTATIONS[orientation])
        if transparent is not None:
            transparent = np.asarray(Image.fromarray(transparent).transpose(ROTATIONS[orientation]))
    return StoredImage(rgb, transparent, orientation)


def _read(content: bytes, limits: Range | None) -> tuple[Image.Image, np.ndarray | None, int]:
    """RGB as stored, transparent pixels, EXIF orientation."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as file:
            if _needs_rasterio(file):  # before loading, which removes these attributes
                return *_read_raster(content, limits), _orientation(file)
            file.load()  # before `_orientation`, so that broken pixels do not look like broken metadata
            orientation = _orientation(file)
            if file.format in ("GIF", "PNG", "WEBP", "AVIF") and getattr(file, "is_animated", False):
                notice(PAGES)
            return *_to_rgb(file, limits), orientation
    except StegoError:
        raise
    except READ_ERRORS:
        if content[:4] in TIFF_SIGNATURES:
            return *_read_raster(content, limits), 1
        raise


def _orientation(file: Image.Image) -> int:
    """EXIF orientation of an opened file; 1, with a notice, if it is invalid."""
    try:
        value = file.getexif().get(Base.Orientation, 1)
    except Exception:  # Pillow raises many types for broken metadata, which do not affect the pixels
        value = None
    if isinstance(value, int) and 0 <= value <= 8:
        return max(1, value)  # 0 means unknown
    notice("Some images have an invalid EXIF orientation, which is ignored.")
    return 1


def _needs_rasterio(file: Image.Image) -> bool:
    """Whether Pillow would read an opened file wrongly or in part."""
    tiles = getattr(file, "tile", ())
    raw = tiles[0][3] if tiles else ""  # storage of the pixels, as in "RGB;16B"
    if file.format != "TIFF":
        return file.format == "JPEG2000" or (";16" in str(raw) and not file.mode.startswith("I"))
    tags = file.tag_v2  # type: ignore[attr-defined]
    bits, kinds = np.atleast_1d(tags.get(258, 1)).tolist(), np.atleast_1d(tags.get(339, 1)).tolist()
    simple = {*bits} <= {1, 8} and {*kinds} == {1} and len(bits) == len(file.getbands())
    special = GDAL_TAGS & {*tags} or tags.get(274, 1) != 1 or file.n_frames > 1  # type: ignore[attr-defined]
    return bool(special) or not simple


def _to_rgb(image: Image.Image, limits: Range | None) -> tuple[Image.Image, np.ndarray | None]:
    """Converts an image of any mode to RGB on white, and returns its transparent pixels."""
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
    """Shows a notice if the alpha band of a TIFF, uint8, is probably not alpha, which GDAL assumes of a fourth band."""
    if ((alpha > 0) & (alpha < 255)).mean() > MAX_PARTIAL:
        notice(
            "TIFF images have an alpha band that makes most pixels partly transparent. If the band is near infrared, "
            "change its interpretation: gdal_edit.py -colorinterp_4 undefined."
        )


def _scale(values: np.ndarray, known: np.ndarray, limits: Range | None) -> np.ndarray:
    """Scales stored values (H, W, channels) to uint8. known: bool (H, W), pixels with data."""
    if values.dtype == np.uint8:
        return values
    if limits is None:
        span = f" from {values[known].min():g} to {values[known].max():g}" if known.any() else ""
        raise StegoError(
            f'has {values.dtype} values{span}. Write {{"range": [LOW, HIGH]}}, the values of black and white, into '
            "classes.json in the folder."
        )
    low, high = limits
    scaled = (np.nan_to_num(values).astype(np.float64) - low) / (high - low)
    return (255 * np.clip(scaled, 0, 1)).round().astype(np.uint8)


def _on_white(values: np.ndarray, void: np.ndarray) -> tuple[Image.Image, np.ndarray | None]:
    """Converts uint8 values (H, W, 1 or 3) to an RGB image, white at `void`; also returns `void`, or None if empty."""
    shown = np.where(void[..., None], np.uint8(255), values)
    rgb = Image.fromarray(np.ascontiguousarray(np.broadcast_to(shown, (*void.shape, 3))))
    return rgb, void if void.any() else None


def _read_raster(content: bytes, limits: Range | None) -> tuple[Image.Image, np.ndarray | None]:
    """Reads an image with rasterio."""
    with open_raster(content) as file:
        return _on_white(*read_bands(file, color_bands(file), limits))


@contextmanager
def open_raster(source: Path | bytes, mode: str = "r", **form: Any) -> Iterator[Any]:
    """Opens a file, or the content of one, with rasterio and a small cache. Errors of GDAL become OSErrors."""
    check_installed("Reading it", ["rasterio"], "geo")
    import rasterio

    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    try:
        if isinstance(source, bytes):
            with rasterio.MemoryFile(source) as memory, memory.open() as file:
                yield file
        else:
            with rasterio.Env(GDAL_CACHEMAX=CACHE), rasterio.open(source, mode, **form) as file:
                yield file
    except rasterio.errors.RasterioError as error:
        raise OSError(error) from error


def color_bands(file: Any) -> list[int]:
    """Band numbers of red, green and blue, or of gray, in a file opened by rasterio.

    Without color interpretation, one band is gray and three are colors. A notice names unused bands.
    """
    from rasterio.enums import ColorInterp

    kinds = dict(enumerate(file.colorinterp, 1))
    first = {kind: band for band, kind in reversed(kinds.items())}
    plain = [band for band, kind in kinds.items() if kind != ColorInterp.alpha]
    bands: list[Any] = [first.get(kind) for kind in (ColorInterp.red, ColorInterp.green, ColorInterp.blue)]
    if None in bands:
        bands = plain
    if len(bands) not in (1, 3):
        raise StegoError(f"has {len(plain)} bands, not red, green and blue. Save the three bands to use.")
    if others := [f"{band} ({file.descriptions[band - 1] or kinds[band].name})" for band in plain if band not in bands]:
        notice(f"Images have bands that are not used: {', '.join(others)}.")
    if file.subdatasets:
        notice(PAGES)
    return bands


def read_bands(
    file: Any, bands: list[int], limits: Range | None = None, window: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Colors, uint8 (H, W, 1 or 3), and pixels without data, bool (H, W), of a file opened by rasterio.

    bands: see `color_bands`; limits: values of black and white; window: part of the image, None for all of it.
    """
    from rasterio.enums import ColorInterp

    values = np.moveaxis(file.read(bands, window=window), 0, -1)
    known = (file.dataset_mask(window=window) >= 128) & np.isfinite(values).all(-1)
    if ColorInterp.alpha in file.colorinterp:
        alpha = file.read(file.colorinterp.index(ColorInterp.alpha) + 1, window=window)
        if alpha.dtype == np.uint8:
            _check_alpha(alpha)
        if file.count > 4:  # GDAL's mask includes the alpha band only for files of 2 or 4 bands
            known &= alpha > np.iinfo(alpha.dtype).max // 2 if alpha.dtype.kind in "iu" else alpha > 0
    white_is_zero = "MINISWHITE" in file.tags(ns="IMAGE_STRUCTURE")
    palette = ColorInterp.palette in file.colorinterp and not white_is_zero  # GDAL adds a palette to MINISWHITE
    few_bits = values.dtype == np.uint8 and "NBITS" in file.tags(bands[0], ns="IMAGE_STRUCTURE")
    if palette or few_bits or values.dtype.kind not in "uif":
        problem = f"has a palette, less than 8 bits or values that are not real numbers ({values.dtype})"
        raise StegoError(f"{problem}. Convert it to real numbers, for example by gdal_translate -expand rgb or -scale.")
    values = _scale(values, known, limits)
    return 255 - values if white_is_zero else values, ~known


def image_size(path: Path, rules: Rules = DEFAULT) -> tuple[int, int]:
    """Height and width of an image after `read_image`, from the header."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            width, height = file.size
            transposed = _orientation(file) >= 5 and rules.exif != "ignore"
    except READ_ERRORS:  # only rasterio can read it, or nothing, which raises an error
        width, height = read_image(path, rules).rgb.size
        transposed = False
    return (width, height) if transposed else (height, width)


def read_ids(path: Path, content: bytes | None = None) -> np.ndarray:
    """Stored ids of a label map, int64 (H, W). Raises StegoError for an unreadable file, JPEG, and colors."""
    with naming(f"label map {path}"), Image.open(io.BytesIO(content or path.read_bytes()), formats=FORMATS) as file:
        if file.format == "JPEG" or file.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
            raise StegoError(f"is {file.format} {file.mode}. Save class ids as an 8-bit gray PNG.")
        tiles: Any = getattr(file, "tile", None)
        raw = tiles[0][3] if file.mode == "L" and tiles else ""
        scale = {"L;2": 85, "L;4": 17}.get(str(raw), 1)  # Pillow scales these to 8 bits
        return np.array(file).astype(np.int64) // scale


def rules_of(image: Path, default: Rules = DEFAULT) -> Rules:
    """Rules of the classes.json in an image's folder, or in DATASET for DATASET/imgs/SPLIT; otherwise `default`."""
    folders = [image.parent, *([image.parents[2]] if image.parent.parent.name == "imgs" else [])]
    path = next((path for folder in folders if (path := folder / "classes.json").exists()), None)
    return default if path is None else read_classes(path, Classes((), ())).rules


def as_tensor(image: ImageLike, rules: Rules = DEFAULT) -> tuple[Tensor, np.ndarray | None]:
    """Converts an image to uint8 (3, H, W), and returns its transparent pixels, bool (H, W) or None.

    Files are read by the rules of their folder (see `rules_of`), or else by `rules`, as PIL images are. Raises
    StegoError for an unreadable file and for an array of another shape or type.
    """
    transparent = None
    if isinstance(image, str | Path):
        path = user_path(image) if isinstance(image, str) else image  # a listed file may contain "$"
        stored = read_image(path, rules_of(path, rules))
        image, transparent = stored.rgb, stored.transparent
    elif isinstance(image, Image.Image):
        with naming("The image"):
            image, transparent = _to_rgb(image, rules.range)
    if isinstance(image, Image.Image | np.ndarray):
        image = np.array(image, order="C")  # torch accepts neither read-only arrays nor negative strides
        if image.ndim == 3 and image.dtype == np.uint8:
            image = torch.from_numpy(image).movedim(-1, 0)
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.shape[:-2] == (3,) and image.numel():
        return image, transparent
    kind = f"{image.dtype} of shape {tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__
    raise StegoError(f"An image must be a uint8 array (H, W, 3) or a uint8 tensor (3, H, W), not {kind}.")
