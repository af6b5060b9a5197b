"""Annotation formats."""

from collections.abc import Sequence

from ..utils.errors import check_choice, check_installed
from .coco import CocoInstances, CocoPanoptic
from .geotiff import GeoJson, GeoTiff
from .labelme import LabelMe
from .outputs import MASKS, Writer

# Format of the label maps, which are always written.
PNG = "png"
WRITERS: dict[str, type[Writer]] = {
    "coco-panoptic": CocoPanoptic, "coco-instances": CocoInstances, "labelme": LabelMe, "geotiff": GeoTiff,
    "geojson": GeoJson,
}  # fmt: skip


def chosen_writers(format: str | Sequence[str], masks: str = "rle") -> list[type[Writer]]:
    """Writers of formats. Raises StegoError for unknown formats and missing packages."""
    check_choice("masks", masks, MASKS)
    if masks == "polygons":
        check_installed("masks='polygons'", ["rasterio", "shapely"], "annotations")
    names = dict.fromkeys([format] if isinstance(format, str) else format)
    for name in names:
        check_choice("format", name, (PNG, *WRITERS))
    writers = {name: WRITERS[name] for name in names if name != PNG}
    for name, writer in writers.items():
        check_installed(f"format={name!r}", writer.packages, writer.extra)
    return list(writers.values())
