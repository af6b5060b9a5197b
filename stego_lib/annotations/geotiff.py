"""Label maps as georeferenced GeoTIFF, and polygons as GeoJSON."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.classes import Classes
from ..datasets.images import open_raster
from ..utils.notices import notice
from .names import NO_SEGMENT
from .outputs import Writer

# Options of rasterio for a label map.
FORM = dict(driver="GTiff", count=1, dtype="uint8", nodata=NO_SEGMENT, compress="deflate")
FORM |= dict(tiled=True, blockxsize=256, blockysize=256)


def write_polygons(strips: Iterable[np.ndarray], path: Path, segments: Classes, place: dict[str, Any]) -> None:
    """Writes connected regions as GeoJSON polygons with id, name and color, one per line.

    strips: parts of a label map from top to bottom, uint8 (rows, W). place: transform and CRS. Coordinates are in this
    CRS, which the file names as GDAL does; in longitude and latitude if it has no code; in pixels without a transform.
    """
    from rasterio import Affine
    from rasterio.warp import transform_geom
    from shapely.affinity import affine_transform
    from shapely.geometry import mapping

    transform = place.get("transform", Affine.identity()).to_shapely()
    crs = place["crs"] if "transform" in place else None
    authority = crs and crs.to_authority()
    header: dict[str, Any] = {"type": "FeatureCollection"}
    if authority:
        name = "urn:ogc:def:crs:{}::{}".format(*authority)
        header["crs"] = {"type": "name", "properties": {"name": name}}
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(header).removesuffix("}") + ', "features": [')
        separator = "\n"
        for polygon, id_ in region_outlines(strips):
            outline = mapping(affine_transform(polygon, transform))
            if crs and not authority:
                outline = transform_geom(crs, "OGC:CRS84", outline)
            color = "#{:02x}{:02x}{:02x}".format(*segments.colors[id_])
            about = {"id": id_, "name": segments.names[id_], "color": color}
            file.write(separator + json.dumps({"type": "Feature", "properties": about, "geometry": outline}))
            separator = ",\n"
        file.write("\n]}\n")


def region_outlines(strips: Iterable[np.ndarray]) -> Iterator[tuple[Any, int]]:
    """Polygons, in pixels, and ids of the connected regions of a label map in strips.

    Regions that cross the border of a strip are merged with their parts in the next strip. So the memory depends on the
    size of a strip; GDAL would keep all polygons.
    """
    from rasterio import Affine
    from rasterio.features import shapes
    from shapely import get_parts, union_all
    from shapely.geometry import shape

    unfinished: dict[int, list[Any]] = {}
    top = 0
    for labels in strips:
        regions = []
        for outline, value in shapes(labels, labels != NO_SEGMENT, 4, Affine.translation(0, top)):
            id_, polygon = int(value), shape(outline)
            if id_ in unfinished and polygon.bounds[1] == top:
                unfinished[id_].append(polygon)
            else:
                regions.append((polygon, id_))
        for id_, parts in unfinished.items():
            regions += [(polygon.simplify(0), id_) for polygon in get_parts(union_all(parts))]
        unfinished, top = {}, top + len(labels)
        for polygon, id_ in regions:
            if polygon.bounds[3] == top:
                unfinished.setdefault(id_, []).append(polygon)
            else:
                yield polygon, id_
    for id_, parts in unfinished.items():
        yield from ((polygon, id_) for polygon in parts)


class GeoJson(Writer):
    """Polygons of connected regions in the coordinates of the image, or in pixels."""

    file, packages, extra = "geojson/{}.geojson", ("rasterio", "shapely"), "geo"

    def add(self, image: Path, label: np.ndarray, source: str) -> None:
        with self.output.write(self.file.format(image.stem), source) as temporary:
            write_polygons([label], temporary, self.segments, _georeference(image, label.shape) or {})


class GeoTiff(Writer):
    """Ids with colors and the georeference of the image. Images without one are skipped."""

    file, packages, extra = "geotiff/{}.tif", ("rasterio",), "geo"

    def add(self, image: Path, label: np.ndarray, source: str) -> str | None:
        """Returns the name of the image if it is skipped."""
        from rasterio.io import MemoryFile

        place = _georeference(image, label.shape)
        if place is None:
            return image.name
        with MemoryFile() as memory:  # on a full disk, GDAL may write a damaged file without an error
            with memory.open(**FORM, **place) as file:
                file.write(label, 1)
                file.write_colormap(1, dict(enumerate(self.segments.colors)))
            with self.output.write(self.file.format(image.stem), source) as temporary:
                temporary.write_bytes(memory.read())
        return None

    def finish(self, records: list[str | None], source: str) -> None:
        if skipped := [name for name in records if name is not None]:
            text = "images without a georeference or with EXIF orientation, for example"
            notice(f"No GeoTIFF is written for {len(skipped)} {text} {skipped[0]}.")


def _georeference(path: Path, shape: tuple[int, int]) -> dict[str, Any] | None:
    """Georeference of an image, also from world files; None if it is missing or the shape differs."""
    try:
        with open_raster(path) as file:
            place = place_of(file)
            return place if file.shape == shape and place.keys() & {"transform", "gcps"} else None
    except (OSError, UnicodeEncodeError):  # GDAL only supports UTF-8 file names
        return None


def place_of(file: Any) -> dict[str, Any]:
    """Size and georeference of a raster: transform or control points, and CRS."""
    place = {"height": file.height, "width": file.width}
    points, crs = file.gcps
    if points:
        return place | {"gcps": points, "crs": crs}
    return place | ({} if file.transform.is_identity else {"transform": file.transform, "crs": file.crs})
