"""Panoptic and instance annotations in COCO's format."""

import json
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image
from scipy import ndimage

from ..utils.files import fingerprint
from .outputs import Writer

if TYPE_CHECKING:
    from shapely import Polygon

# Entry of an image, and its annotations.
Record: TypeAlias = tuple[dict[str, Any], list[dict[str, Any]]]


class Coco(Writer):
    """Images, categories and annotations in one JSON file. The category of a segment is its label id + 1."""

    packages = ("pycocotools",)

    def add(self, image: Path, label: np.ndarray, source: str) -> Record:
        height, width = label.shape
        entry = {"id": _stable_id(image.name), "file_name": image.name, "width": width, "height": height}
        return entry, [{"image_id": entry["id"]} | about for about in self.annotations(image, label, source)]

    @abstractmethod
    def annotations(self, image: Path, label: np.ndarray, source: str) -> Iterator[dict[str, Any]]:
        """Annotations of an image, without its id."""

    def finish(self, records: list[Record], source: str) -> None:
        pairs = zip(self.segments.names, self.segments.colors, strict=True)
        categories = [
            {"id": number, "name": name, "supercategory": "", "isthing": 0, "color": list(color)}
            for number, (name, color) in enumerate(pairs, start=1)
        ]
        content = {
            "info": {"description": "Segments found by STEGO", "version": "1.0"},
            "licenses": [],
            "images": [image for image, _ in records],
            "annotations": [annotation for _, annotations in records for annotation in annotations],
            "categories": categories,
        }
        with self.output.write(self.summary, source) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")


class CocoPanoptic(Coco):
    """A PNG with the segment of each pixel as R + 256 G + 65536 B, 0 for none.

    Segments are "stuff": one per class and image.
    """

    file, summary = "panoptic/{}.png", "panoptic.json"

    def annotations(self, image: Path, label: np.ndarray, source: str) -> Iterator[dict[str, Any]]:
        numbers = np.where(label < len(self.segments), label + 1, 0).astype(np.uint8)  # at most 255: the red channel
        with self.output.write(self.file.format(image.stem), source) as temporary:
            Image.fromarray(np.stack([numbers, 0 * numbers, 0 * numbers], 2)).save(temporary)
        segments = []
        for id_ in np.unique(numbers[numbers > 0]).tolist():
            _, area, box = _encode(numbers == id_)
            segments.append({"id": id_, "category_id": id_, "iscrowd": 0, "area": area, "bbox": box})
        yield {"file_name": f"{image.stem}.png", "segments_info": segments}


class CocoInstances(Coco):
    """Each connected region of a segment is an instance, run-length encoded or as polygons.

    A region with holes is cut into several polygons, because polygons in COCO have no holes. Touching objects of one
    class are one instance, and a partly hidden object may be two.
    """

    summary = "instances.json"

    def annotations(self, image: Path, label: np.ndarray, source: str) -> Iterator[dict[str, Any]]:
        for id_ in np.unique(label[label < len(self.segments)]).tolist():
            regions, _ = ndimage.label(label == id_, np.ones((3, 3), bool))
            for region, window in enumerate(ndimage.find_objects(regions), start=1):
                mask = regions == region
                encoded, area, box = _encode(mask)
                outline = encoded if self.masks == "rle" else _outline(mask[window], window[1].start, window[0].start)
                about = {"id": _stable_id(image.name, id_, region), "category_id": id_ + 1, "iscrowd": 0}
                yield about | {"segmentation": outline, "area": area, "bbox": box}


def _stable_id(*parts: object) -> int:
    """A positive number below 2^53 from a hash, so that ids do not change when images are added."""
    return 1 + int(fingerprint(*parts)[:13], 16)


def _encode(mask: np.ndarray) -> tuple[dict[str, Any], int, list[int]]:
    """Run-length encoding, area and bounding box of a mask."""
    from pycocotools import mask as coco_mask

    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    area, box = int(coco_mask.area(encoded)), coco_mask.toBbox(encoded).astype(int).tolist()
    return {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}, area, box


def _outline(mask: np.ndarray, left: int, top: int) -> list[list[float]]:
    """Converts a mask to polygons without holes, [x, y, x, y, ...], shifted by (left, top)."""
    from rasterio.features import shapes
    from shapely.geometry import shape

    parts = [part for outline, _ in shapes(mask.astype(np.uint8), mask) for part in _without_holes(shape(outline))]
    corner = np.array([left, top])
    return [(corner + part.exterior.coords[:-1]).ravel().tolist() for part in parts]


def _without_holes(polygon: "Polygon") -> Iterator["Polygon"]:
    """Cuts a polygon vertically at the middle hole until all parts are without holes."""
    from shapely import box

    if not polygon.interiors:
        yield polygon
        return
    x = sorted(int(hole.bounds[0]) for hole in polygon.interiors)[len(polygon.interiors) // 2]
    left, top, right, bottom = polygon.bounds
    for half in (box(left, top, x, bottom), box(x, top, right, bottom)):
        parts = polygon.intersection(half)
        for part in getattr(parts, "geoms", [parts]):
            if part.geom_type == "Polygon":
                yield from _without_holes(part)
