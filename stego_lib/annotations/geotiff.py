"""Label maps as GeoTIFF, where the image was."""

from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.classes import Classes
from ..utils.files import atomic
from ..utils.notices import notice

SCALE, TIEPOINT, TRANSFORM, KEYS, DOUBLES, TEXTS = 33550, 33922, 34264, 34735, 34736, 34737
GEOREFERENCE = (SCALE, TIEPOINT, TRANSFORM, KEYS, DOUBLES, TEXTS)
"""Tags that say where a GeoTIFF's pixels are: scale, tie points, transformation, and the keys of the coordinate system."""
NODATA = 42113
"""GDAL's tag for the value of pixels without data. A label map has its own, 255, whatever the image had."""
ORIENTATION = 274


def georeference(path: Path) -> list[tuple[int, int, int, Any, bool]]:
    """The tags of `GEOREFERENCE` in an image file as tifffile writes them; none for a file without, or that is no TIFF."""
    import tifffile

    if path.suffix.lower() not in (".tif", ".tiff"):
        return []
    try:
        with tifffile.TiffFile(path) as file:
            tags = file.pages.first.tags
            turned = tags.valueof(ORIENTATION, 1) != 1  # the label map is upright, its georeference would not be
            found = [tag for code in GEOREFERENCE if (tag := tags.get(code)) is not None]
            placed = {tag.code for tag in found} & {TIEPOINT, TRANSFORM}
            return [(tag.code, tag.dtype, tag.count, tag.value, True) for tag in found] if placed and not turned else []
    except (tifffile.TiffFileError, OSError, ValueError, IndexError):
        return []


class GeoTiff:
    """geotiff/NAME.tif: ids with their colors, and the georeference of the image; 255 is "no data".

    Images without a georeference in the file are left out, with a notice; world files (.tfw) are not read.
    """

    def __init__(self, output: Path, segments: Classes):
        self.folder, self.segments = output / "geotiff", segments
        self.without: list[str] = []

    def add(self, image: Path, label: np.ndarray) -> None:
        """Writes the label map of an image, if it has a georeference."""
        import tifffile

        tags = georeference(image)
        if not tags:
            self.without.append(image.name)
            return
        palette = np.full((3, 256), 65535, np.uint16)
        palette[:, : len(self.segments)] = 257 * np.array(self.segments.colors, np.uint16).T
        nodata = (NODATA, "s", 0, "255", True)
        with atomic(self.folder / f"{image.stem}.tif") as temporary:
            tifffile.imwrite(
                temporary, label, photometric="palette", colormap=palette, compression="zlib", metadata=None,
                extratags=[*tags, nodata],
            )  # fmt: skip

    def finish(self) -> None:
        """Says which images have no georeference."""
        if self.without:
            notice(
                f"{len(self.without)} images have no georeference in the file (or are turned by their orientation tag), so no GeoTIFF "
                f"of them is written; the first: {self.without[0]}"
            )
