"""The formats of annotations by name."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np

from ..datasets.classes import Classes
from ..utils.errors import StegoError, did_you_mean
from .coco import CocoInstances, CocoPanoptic
from .geotiff import GeoTiff, georeference
from .labelme import LabelMe


class Writer(Protocol):
    """What writes label maps in one format."""

    def __init__(self, output: Path, segments: Classes): ...

    def add(self, image: Path, label: np.ndarray) -> None:
        """Takes the label map, uint8 (H, W), of an image; they come in the order of the images."""

    def finish(self) -> None:
        """Is called after the last."""


WRITERS: dict[str, type[Writer]] = {
    "coco-panoptic": CocoPanoptic, "coco-instances": CocoInstances, "labelme": LabelMe, "geotiff": GeoTiff,
}  # fmt: skip
"""Format -> its writer."""
NEEDS = {"coco-instances": "pycocotools", "labelme": "shapely", "geotiff": "tifffile"}
"""Format -> a package of the extra `annotations` that it needs."""
PNG = "png"
"""The label maps that are always written."""


def chosen_formats(format: str | Sequence[str], images: Sequence[Path]) -> list[str]:
    """The formats that were asked for, without "png".

    Raises StegoError for an unknown one, where its package is missing, and for "geotiff" if no image has a georeference.
    """
    asked = [format] if isinstance(format, str) else list(format)
    for name in asked:
        if name not in (PNG, *WRITERS):
            raise StegoError(
                f"format = {name!r} is unknown{did_you_mean(str(name), [PNG, *WRITERS])}; there are {', '.join([PNG, *WRITERS])}"
            )
        if (package := NEEDS.get(name)) and find_spec(package) is None:
            raise StegoError(
                f"format {name!r} needs {package}, which is not installed: pip install 'stego_lib[annotations]'"
            )
    if "geotiff" in asked and not any(map(georeference, images)):
        raise StegoError(
            "format 'geotiff': none of the images is a GeoTIFF with a georeference in the file (world files such as .tfw are not "
            "read); choose another format"
        )
    return [name for name in dict.fromkeys(asked) if name != PNG]
