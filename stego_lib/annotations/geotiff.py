"""Label maps as GeoTIFF, at the place of the image."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.classes import Classes
from ..utils.notices import notice
from .outputs import OutputFolder

# Value of pixels without data in a label map.
NODATA = 255


def georeference(path: Path, shape: tuple[int, int]) -> dict[str, Any] | None:
    """CRS and transform of an image, also from world files; None without, or if its shape is another."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioIOError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path) as file:
                if file.shape != shape or (file.transform.is_identity and not file.gcps[0]):
                    return None
                gcps, gcps_crs = file.gcps
                return {"gcps": gcps, "crs": gcps_crs} if gcps else {"transform": file.transform, "crs": file.crs}
    except RasterioIOError:
        return None


class GeoTiff:
    """geotiff/NAME.tif: ids with their colors and the georeference of the image. Images without one are left out."""

    summary = None

    def __init__(self, output: OutputFolder, segments: Classes):
        self.output, self.segments = output, segments
        self.left_out: list[str] = []

    def file(self, image: Path) -> str:
        """Name of the file of an image, below the output folder."""
        return f"geotiff/{image.stem}.tif"

    def add(self, image: Path, label: np.ndarray, source: str) -> None:
        """Writes a label map, uint8 (H, W)."""
        import rasterio

        place = georeference(image, label.shape)
        if place is None:
            self.left_out.append(image.name)
            return
        height, width = label.shape
        form = dict(driver="GTiff", count=1, dtype="uint8", nodata=NODATA, compress="deflate", tiled=True)
        with (
            self.output.write(self.file(image), source) as temporary,
            rasterio.open(
                temporary, "w", height=height, width=width, blockxsize=256, blockysize=256, **form, **place
            ) as file,
        ):
            file.write(label, 1)
            file.write_colormap(1, dict(enumerate(self.segments.colors)))

    def finish(self, source: str) -> None:
        """Shows a notice about images without a georeference."""
        if self.left_out:
            notice(
                f"No GeoTIFF is written for {len(self.left_out)} images without a georeference, or turned by EXIF "
                f"orientation; the first is {self.left_out[0]}."
            )
