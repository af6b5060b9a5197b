"""The formats of annotations by name."""

from collections.abc import Sequence
from importlib.util import find_spec

from ..utils.errors import StegoError
from .coco import CocoInstances, CocoPanoptic
from .geotiff import GeoTiff
from .labelme import LabelMe

# The label maps that are always written.
PNG = "png"
WRITERS = {"coco-panoptic": CocoPanoptic, "coco-instances": CocoInstances, "labelme": LabelMe, "geotiff": GeoTiff}
# Format -> the packages that it needs, and the extras that install them.
NEEDS = {
    "coco-panoptic": (["pycocotools"], "annotations"),
    "coco-instances": (["pycocotools"], "annotations"),
    "labelme": (["rasterio", "shapely"], "annotations"),
    "geotiff": (["rasterio"], "geo"),
}


def chosen_formats(format: str | Sequence[str]) -> list[str]:
    """The requested formats without "png". Raises StegoError for an unknown one, and where its packages are missing."""
    formats = [format] if isinstance(format, str) else list(dict.fromkeys(format))
    for name in formats:
        if name not in (PNG, *WRITERS):
            raise StegoError(f"format={name!r} is unknown. Choose from {', '.join([PNG, *WRITERS])}.")
        packages, extra = NEEDS.get(name, ([], ""))
        if missing := [package for package in packages if find_spec(package) is None]:
            raise StegoError(f"format={name!r} needs {', '.join(missing)}. Run: pip install 'stego_lib[{extra}]'")
    return [name for name in formats if name != PNG]
