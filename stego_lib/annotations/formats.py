"""The formats of annotations by name."""

from collections.abc import Sequence

from ..utils.errors import check_choice, check_installed
from .coco import CocoInstances, CocoPanoptic
from .geotiff import GeoJson, GeoTiff
from .labelme import LabelMe

# The label maps that are always written.
PNG = "png"
WRITERS = {
    "coco-panoptic": CocoPanoptic, "coco-instances": CocoInstances, "labelme": LabelMe, "geotiff": GeoTiff,
    "geojson": GeoJson,
}  # fmt: skip
# How instances.json stores masks.
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
    """The requested formats without "png". Raises StegoError for an unknown one, and where its packages are missing."""
    formats = [format] if isinstance(format, str) else list(dict.fromkeys(format))
    for name in formats:
        check_choice("format", name, (PNG, *WRITERS))
        packages, extra = NEEDS.get(name, ([], ""))
        check_installed(f"format={name!r}", packages, extra)
    return [name for name in formats if name != PNG]


def check_masks(masks: str) -> None:
    """Raises StegoError for an unknown kind of masks, and where its packages are missing."""
    check_choice("masks", masks, MASKS)
    if masks == "polygons":
        check_installed("masks='polygons'", ["rasterio", "shapely"], "annotations")
