"""Connected regions of a label map, and their outlines."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from contourpy import FillType, contour_generator
from scipy import ndimage

if TYPE_CHECKING:
    from shapely import Polygon

TOUCHING = np.ones((3, 3), bool)
"""Pixels that touch at an edge or a corner are connected."""


@dataclass(frozen=True, eq=False)
class Region:
    """Connected pixels of one id."""

    id: int
    mask: np.ndarray
    """bool, of the smallest box around the region."""
    top: int
    left: int


def regions(label: np.ndarray) -> Iterator[Region]:
    """The connected regions of a label map, uint8 (H, W), by id and then from top to bottom."""
    for id_ in np.unique(label).tolist():
        numbered, _ = ndimage.label(label == id_, TOUCHING)
        for number, (rows, columns) in enumerate(ndimage.find_objects(numbered), 1):
            yield Region(id_, numbered[rows, columns] == number, rows.start, columns.start)


def outlines(region: Region, tolerance: float) -> "list[Polygon]":
    """The region as polygons with holes, in pixels from the image's top left corner, so that pixel (0, 0) is centered at 0.5, 0.5.

    The boundary runs halfway between the centers of pixels, and cuts the corners of pixels. It is then simplified: no point of
    the old one is further than `tolerance` pixels from the new one. More than one polygon where parts touch at a corner alone.
    """
    import shapely

    padded = np.pad(region.mask, 1).astype(np.float32)
    traced = contour_generator(z=padded, fill_type=FillType.OuterOffset).filled(0.5, np.inf)
    found = []
    for points, offsets in zip(*traced, strict=True):
        moved = points - 0.5 + (region.left, region.top)  # from centers of padded pixels to corners of the image's
        rings = [moved[start:end] for start, end in zip(offsets[:-1], offsets[1:], strict=True)]
        simple = shapely.Polygon(rings[0], rings[1:]).simplify(tolerance, preserve_topology=True)
        found += [simple] if simple.geom_type == "Polygon" else list(getattr(simple, "geoms", []))
    return [polygon for polygon in found if not polygon.is_empty]
