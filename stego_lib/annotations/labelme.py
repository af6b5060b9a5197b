"""LabelMe's JSON: one file an image, with the regions as polygons."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.classes import Classes
from ..utils.files import atomic
from .regions import outlines, regions

VERSION = "5.5.0"
"""Version of LabelMe whose format this is."""
TOLERANCE = 1.0
"""Pixels by which simplifying may move an outline."""
IGNORED = "__ignore__"
"""LabelMe's name for pixels that are not labeled."""


class LabelMe:
    """labelme/NAME.json: polygons of connected regions, simplified by at most `TOLERANCE` pixels.

    LabelMe's polygons have no holes. So polygons are sorted by size, the largest first: what lies in a hole is smaller than what
    is around it, and is drawn over it when LabelMe draws them in this order. Pixels of no segment are polygons called "__ignore__",
    for they too may be holes.
    """

    def __init__(self, output: Path, segments: Classes):
        self.folder, self.segments = output / "labelme", segments

    def add(self, image: Path, label: np.ndarray) -> None:
        """Writes the file of an image."""
        found: list[tuple[float, str, list[list[float]]]] = []
        for region in regions(label):
            name = self.segments.names[region.id] if region.id < len(self.segments) else IGNORED
            for polygon in outlines(region, TOLERANCE):
                points = [[round(x, 2), round(y, 2)] for x, y in polygon.exterior.coords[:-1]]
                filled = type(polygon)(polygon.exterior).area
                found.append((filled, name, points))
        found.sort(key=lambda one: -one[0])
        shapes: list[dict[str, Any]] = [
            {
                "label": name, "points": points, "group_id": None, "description": "", "shape_type": "polygon", "flags": {},
                "mask": None,
            }
            for _, name, points in found
        ]  # fmt: skip
        content: dict[str, Any] = {
            "version": VERSION, "flags": {}, "shapes": shapes, "imagePath": _relative(image, self.folder), "imageData": None,
            "imageHeight": label.shape[0], "imageWidth": label.shape[1],
        }  # fmt: skip
        with atomic(self.folder / f"{image.stem}.json") as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")

    def finish(self) -> None:
        """Nothing is left to write."""


def _relative(path: Path, folder: Path) -> str:
    """The path as LabelMe looks for it, from the folder of the JSON file; absolute where that is on another drive."""
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:
        return path.resolve().as_posix()
