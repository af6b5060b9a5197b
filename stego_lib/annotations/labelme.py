"""LabelMe's JSON: one file per image, with regions as polygons."""

import json
import os
from pathlib import Path

import numpy as np

from .outputs import Writer

# Version of LabelMe whose format this is.
VERSION = "5.5.0"
# Pixels by which simplification may move an outline.
TOLERANCE = 1.0
# LabelMe's name for pixels without a label.
IGNORED = "__ignore__"


class LabelMe(Writer):
    """labelme/NAME.json: polygons of connected regions, simplified by at most `TOLERANCE` pixels.

    LabelMe's polygons have no holes. Therefore the largest come first, and a smaller one that lies in a hole is drawn
    over the one around it. Pixels of no segment are polygons called "__ignore__", because they may be holes too.
    """

    def file(self, image: Path) -> str:
        return f"labelme/{image.stem}.json"

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
        with self.output.write(self.file(image), source) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
