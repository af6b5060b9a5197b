"""Polygons in LabelMe's format, one JSON file per image."""

import json
import os
from pathlib import Path

import numpy as np

from .outputs import Writer

# Version of LabelMe and its format.
VERSION = "5.5.0"
# Tolerance of the simplification of outlines in pixels.
TOLERANCE = 1.0
# LabelMe's name for pixels without a label.
IGNORED = "__ignore__"


class LabelMe(Writer):
    """Polygons of connected regions, simplified with a tolerance of `TOLERANCE` pixels.

    Polygons in LabelMe have no holes. The largest polygons come first, so those in holes are drawn on top. Regions
    without a segment become polygons with the label "__ignore__".
    """

    file, packages = "labelme/{}.json", ("rasterio", "shapely")

    def add(self, image: Path, label: np.ndarray, source: str) -> None:
        from rasterio.features import shapes
        from shapely import Polygon
        from shapely.geometry import shape

        names = dict(enumerate(self.segments.names))
        polygons = []
        for outline, id_ in shapes(label, connectivity=4):
            filled = Polygon(shape(outline).exterior)
            polygons.append((filled.area, names.get(int(id_), IGNORED), filled.simplify(TOLERANCE)))
        polygons.sort(key=lambda polygon: -polygon[0])
        content = {
            "version": VERSION,
            "flags": {},
            "shapes": [
                {
                    "label": name,
                    "points": [list(point) for point in polygon.exterior.coords[:-1]],
                    "group_id": None,
                    "description": "",
                    "shape_type": "polygon",
                    "flags": {},
                    "mask": None,
                }
                for _, name, polygon in polygons
            ],
            "imagePath": Path(os.path.relpath(image.resolve(), (self.output.path / "labelme").resolve())).as_posix(),
            "imageData": None,
            "imageHeight": label.shape[0],
            "imageWidth": label.shape[1],
        }
        with self.output.write(self.file.format(image.stem), source) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
