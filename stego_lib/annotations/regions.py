"""Connected regions of a label map, and their outlines."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from contourpy import FillType, contour_generator
from scipy import ndimage

if TYPE_CHECKING:
    from shapely import Polygon

TOUCHING = np.ones((3, 3), bool)
"""Pixels that touch at an edge or a corner are connected."""


MARGIN = 3
"""Pixels by which a region is continued beyond the image's border before it is traced, so that corners there stay sharp."""


@dataclass(frozen=True, eq=False)
class Region:
    """Connected pixels of one id."""

    id: int
    mask: np.ndarray
    """bool, of the smallest box around the region."""
    top: int
    left: int
    image: tuple[int, int]
    """Height and width of the image."""


def regions(label: np.ndarray) -> Iterator[Region]:
    """The connected regions of a label map, uint8 (H, W), by id and then from top to bottom."""
    for id_ in np.unique(label).tolist():
        numbered, _ = ndimage.label(label == id_, TOUCHING)
        for number, (rows, columns) in enumerate(ndimage.find_objects(numbered), 1):
            yield Region(id_, numbered[rows, columns] == number, rows.start, columns.start, label.shape)


def outlines(region: Region, tolerance: float) -> "list[Polygon]":
    """The region as polygons with holes, in pixels from the image's top left corner, so that pixel (0, 0) is centered at 0.5, 0.5.

    The boundary runs halfway between the centers of pixels, and cuts the corners of pixels. It is then simplified: no point of
    the one boundary is further than `tolerance` pixels from the other. Several polygons where parts touch at a corner alone.
    """
    import shapely

    (height, width), (rows, columns) = region.image, region.mask.shape
    beyond = ((region.top == 0, region.top + rows == height), (region.left == 0, region.left + columns == width))
    margins = [[MARGIN * side for side in sides] for sides in beyond]
    padded = np.pad(np.pad(region.mask, margins, mode="edge"), 1).astype(np.float32)
    corner = np.array([region.left - margins[1][0], region.top - margins[0][0]]) - 0.5
    traced = contour_generator(z=padded, fill_type=FillType.OuterOffset).filled(0.5, np.inf)
    found = []
    for points, offsets in zip(*traced, strict=True):
        rings = [points[start:end] + corner for start, end in pairwise(offsets)]
        inside = _simplified(shapely.Polygon(rings[0], rings[1:]), tolerance).intersection(
            shapely.box(0, 0, width, height)
        )
        parts = getattr(inside, "geoms", [inside])
        found += [part for part in parts if part.geom_type == "Polygon" and not part.is_empty]
    return found


def _simplified(polygon: "Polygon", tolerance: float) -> "Polygon":
    """The polygon with fewer points. shapely's own tolerance is no limit where it keeps the topology, so the result is measured."""
    for part in (1, 0.5, 0.25) if tolerance else ():
        simple = polygon.simplify(part * tolerance, preserve_topology=True)
        if simple.geom_type == "Polygon" and simple.boundary.hausdorff_distance(polygon.boundary) <= tolerance:
            return simple
    return polygon
