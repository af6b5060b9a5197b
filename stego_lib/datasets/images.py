"""Reads images of any kind as upright, 8-bit RGB, and says which of their pixels are transparent."""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from PIL.ExifTags import Base
from torch import Tensor

from ..utils.errors import StegoError
from ..utils.paths import user_path
from .formats import (
    BROKEN,
    DEFAULT,
    NODATA,
    NoRange,
    Rules,
    deep_to_rgb,
    depth_of,
    formats_of,
    is_flat,
    next_page,
    several,
    to_rgb,
    turn,
)

ImageLike: TypeAlias = str | Path | Image.Image | np.ndarray | Tensor
"""A path, a PIL image, a uint8 array (H, W, 3) or a uint8 tensor (3, H, W)."""


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An image file as it was read."""

    rgb: Image.Image
    """Upright, on white where it is transparent."""
    transparent: np.ndarray | None
    """bool (H, W), True where more than half transparent; None if nowhere."""
    orientation: int
    """EXIF orientation of the file, 1 to 8."""
    depth: str | None
    """What it holds instead of 8 bits per channel, such as "16-bit grayscale"."""
    flat: Literal["", "gray", "color"]
    """Whether it looks like a label map, see `is_flat`, and of one channel or of several."""
    paged: bool
    """Whether the file holds further images, see `several`."""


def read_image(source: Path | BinaryIO, rules: Rules = DEFAULT) -> StoredImage:
    """Reads an image file.

    Parameters
    ----------
    source
        Path, or an open file with a name. Any file that Pillow reads in one of `formats.FORMATS`; of an animated one the first frame.
    rules
        How images of more than 8 bits per channel and EXIF orientations are read.

    Raises
    ------
    StegoError
        Names a file that is broken, above Pillow's limit of about 179 megapixels, or whose values have no known range.
    """
    path = source if isinstance(source, Path) else Path(source.name)
    try:
        with Image.open(source, formats=formats_of(path)) as file:
            depth, tags = depth_of(file), getattr(file, "tag_v2", {})
            orientation, paged = file.getexif().get(Base.Orientation, 1), several(file)
            covered = _mask_page(file, rules)
            upright = turn(file, rules)
            rgb, transparent = deep_to_rgb(upright, depth, rules, tags) if depth else to_rgb(upright, tags)
            if covered is not None and covered.shape == rgb.size[::-1]:
                transparent = covered if transparent is None else covered | transparent
                rgb.paste("white", mask=Image.fromarray(covered))
            flat = is_flat(upright)
    except NoRange as error:
        raise StegoError(f"image {path} {error}") from None
    except BROKEN as error:
        tiff = path.suffix.lower() in (".tif", ".tiff")
        hint = "; TIFF of more than 4 channels or 64-bit values is not read" if tiff else ""
        raise StegoError(f"image {path} cannot be read ({error}{hint}); replace or remove the file") from error
    return StoredImage(rgb, transparent, orientation, depth, flat, paged)


def as_rgb(image: Image.Image, rules: Rules = DEFAULT) -> tuple[Image.Image, np.ndarray | None]:
    """An opened image as RGB, not turned, and its transparent pixels as in `StoredImage`. StegoError for an unknown range."""
    try:
        depth, tags = depth_of(image), getattr(image, "tag_v2", {})
        return deep_to_rgb(image, depth, rules, tags) if depth else to_rgb(image, tags)
    except NoRange as error:
        raise StegoError(f"the image {error}") from None


def transparent_part(path: Path, rules: Rules = DEFAULT) -> np.ndarray | None:
    """`read_image(...).transparent`, without decoding a file that cannot have transparent pixels."""
    try:
        with Image.open(path, formats=formats_of(path)) as file:
            possible = file.has_transparency_data or file.mode == "F" or NODATA in getattr(file, "tag_v2", {})
            possible = possible or next_page(file) == 4 if file.format == "TIFF" else possible
    except BROKEN:
        return None
    return read_image(path, rules).transparent if possible else None


def _mask_page(file: Image.Image, rules: Rules) -> np.ndarray | None:
    """Where GDAL's mask, the second image of a TIFF, says that there is nothing, bool (H, W); None without one."""
    if file.format != "TIFF" or next_page(file) != 4:
        return None
    file.seek(1)
    covered = np.asarray(turn(file, rules)) == 0
    file.seek(0)
    return covered if covered.any() else None


def as_tensor(image: ImageLike, rules: Rules) -> tuple[Tensor, np.ndarray | None]:
    """An image of any kind as uint8 (3, H, W), and where it is transparent, bool (H, W) or None.

    Files and PIL images are read by `rules`; arrays and tensors are taken as they are. Raises StegoError for a file that
    cannot be read, and for an array that is no image.
    """
    transparent = None
    if isinstance(image, str | Path):
        read = read_image(user_path(image), rules)
        image, transparent = read.rgb, read.transparent
    elif isinstance(image, Image.Image):
        image, transparent = as_rgb(image, rules)
    if isinstance(image, Image.Image):
        image = _as_array(image)
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.dtype == np.uint8:
        usable = image.flags.c_contiguous and image.flags.writeable  # torch takes neither views nor read-only arrays
        image = torch.from_numpy(image if usable else np.array(image, order="C")).movedim(-1, 0)
    if (
        not isinstance(image, Tensor)
        or image.ndim != 3
        or image.shape[0] != 3
        or image.dtype != torch.uint8
        or not image.numel()
    ):
        array = isinstance(image, Tensor | np.ndarray)
        what = f"{image.dtype} of shape {tuple(image.shape)}" if array else type(image).__name__
        raise StegoError(f"an image must be uint8 with three channels and a pixel at least, not {what}")
    return image, transparent


def _as_array(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3) of an RGB image, in strips: NumPy's own way needs the memory of two more."""
    width, height = image.size
    found = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, 256):
        bottom = min(top + 256, height)
        found[top:bottom] = np.asarray(image.crop((0, top, width, bottom)))
    return found
