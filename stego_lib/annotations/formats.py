"""Annotation formats."""

from collections.abc import Sequence

from ..utils.errors import check_choice, check_installed
from .coco import CocoInstances, CocoPanoptic
from .geotiff import GeoJson, GeoTiff
from .labelme import LabelMe

# Format of the label maps, which are always written.
PNG = "png"
WRITERS = {
    "coco-panoptic": CocoPanoptic, "coco-instances": CocoInstances, "labelme": LabelMe, "geotiff": GeoTiff,
    "geojson": GeoJson,
}  # fmt: skip
# Formats of masks in instances.json.
MASKS = ("rle", "polygons")
# Format -> the packages that it needs, and the extras that install them.
NEEDS = {
    "coco-panoptic": (["pycocotools"], "annotations"),
    "coco-instances": (["pycocotools"], "annotations"),
    "labelme": (["rasterio", "shapely"], "annotations"),
    "geotiff": (["rasterio"], "geo"),
    "geojson": (["rasterio", "shapely"], "geo"),
}


def chosen_formats(format: str | Sequence[str]) -> list[str]:
    """Returns formats without "png". Raises StegoError for unknown formats and missing packages."""
    formats = [format] if isinstance(format, str) else list(dict.fromkeys(format))
    for name in formats:
        check_choice("format", name, (PNG, *WRITERS))
        packages, extra = NEEDS.get(name, ([], ""))
        check_installed(f"format={name!r}", packages, extra)
    return [name for name in formats if name != PNG]


def check_masks(masks: str) -> None:
    """Raises StegoError for an unknown format of masks and missing packages."""
    check_choice("masks", masks, MASKS)
    if masks == "polygons":
        check_installed("masks='polygons'", ["rasterio", "shapely"], "annotations")
