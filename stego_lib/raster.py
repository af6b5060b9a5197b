"""Label maps of large rasters, read and written in parts with rasterio (extra `geo`)."""

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .annotations.geotiff import FORM, place_of, write_polygons
from .annotations.names import NO_SEGMENT
from .datasets.classes import Classes, Rules
from .datasets.images import color_bands, naming, open_raster, read_bands
from .tiles import label_strips
from .utils.files import atomic
from .utils.progress import progress

if TYPE_CHECKING:
    from .run import Run

# Pixels above which a TIFF is segmented by a sliding window, and default side of the window in pixels.
LARGE, TILE = 50_000_000, 448
# Columns that are read at once to look for missing data, and rows to outline regions.
COLUMNS, ROWS = 2048, 1024


def is_large(image: Path) -> bool:
    """Whether an image is a TIFF of more than `LARGE` pixels that rasterio can open."""
    if image.suffix.lower() not in (".tif", ".tiff"):
        return False
    try:
        with open_raster(image) as file:
            return file.width * file.height > LARGE
    except (OSError, ValueError):  # unreadable, or rasterio is missing
        return False


def label_raster(
    run: "Run", image: Path, output: Path, parts: Path, *, tile: int = TILE, crf: bool = False, rules: Rules
) -> None:
    """Writes the label map of a raster, as by `Run.predict` with `tile`, to a georeferenced GeoTIFF.

    Pixels without data are 255, the nodata value. Memory does not depend on the height of the raster. parts: folder of
    finished strips, from which an interrupted call continues; its name must depend on run and settings. rules: for
    reading the raster.
    """
    parts.mkdir(parents=True, exist_ok=True)
    with naming(f"image {image}"), open_raster(image) as file:
        bands, size = color_bands(file), (file.height, file.width)

        def read(top: int, left: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
            return read_bands(file, bands, rules.range, window=((top, top + height), (left, left + width)))

        def colors(top: int, left: int, height: int, width: int) -> Tensor:
            values, void = read(top, left, height, width)
            values = np.where(void[..., None], np.uint8(255), values)  # white, as in `read_image`
            return torch.from_numpy(np.broadcast_to(values, (height, width, 3)).copy()).movedim(-1, 0)

        row = sum(len(labels) for labels in _read_parts(parts))
        strips = label_strips(run, colors, size, tile, crf, done=row) if row < size[0] else ()
        with progress((), image.name, total=size[0], initial=row) as bar:
            for labels in strips:
                for left in range(0, size[1], COLUMNS):
                    part = labels[:, left : left + COLUMNS]
                    part[read(row, left, *part.shape)[1]] = NO_SEGMENT
                with atomic(parts / f"{row:09d}.npz") as temporary, open(temporary, "wb") as stored:
                    np.savez_compressed(stored, labels=labels)
                row += len(labels)
                bar.update(len(labels))
        form = FORM | place_of(file) | {"BIGTIFF": "IF_SAFER"}
    counts, top = np.zeros(256, int), 0
    try:
        with open_raster(output, "w", **form) as file:
            file.write_colormap(1, dict(enumerate(run.segments.colors)))
            for labels in _read_parts(parts):
                file.write(labels, 1, window=((top, top + len(labels)), (0, size[1])))
                counts, top = counts + np.bincount(labels.ravel(), minlength=256), top + len(labels)
        if (count_ids(output) != counts).any():  # on a full disk, GDAL may write a damaged file without an error
            raise OSError("a damaged file")
    except OSError as error:  # of rasterio, without the number that tells errors of the disk
        raise OSError(errno.EIO, f"GDAL reports {error}") from error
    shutil.rmtree(parts)


def _read_parts(folder: Path) -> Iterator[np.ndarray]:
    for path in sorted(folder.glob("[0-9]*.npz")):
        with np.load(path) as stored:
            yield stored["labels"]


def count_ids(path: Path) -> np.ndarray:
    """Number of pixels of each id in a label map, int64 (256,)."""
    with open_raster(path) as file:
        windows = (window for _, window in file.block_windows(1))
        return sum(
            (np.bincount(file.read(1, window=window).ravel(), minlength=256) for window in windows), np.zeros(256, int)
        )


def outline_raster(labels: Path, output: Path, segments: Classes) -> None:
    """Writes the connected regions of a label map in a file as GeoJSON, see `write_polygons`."""
    with open_raster(labels) as file:
        rows = (((top, min(top + ROWS, file.height)), (0, file.width)) for top in range(0, file.height, ROWS))
        write_polygons((file.read(1, window=window) for window in rows), output, segments, place_of(file))
