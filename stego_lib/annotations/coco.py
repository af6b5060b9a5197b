"""COCO's panoptic and instance annotations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from ..datasets.classes import Classes
from ..utils.files import fingerprint
from .outputs import OutputFolder


def stable_id(*parts: object) -> int:
    """A positive number below 2^53 that depends on the parts alone, so that ids stay when images are added."""
    return 1 + int(fingerprint(*parts)[:13], 16)


class Coco:
    """Images, categories and annotations in one JSON file. The category of a segment is its id in label maps + 1."""

    summary = ""

    def __init__(self, output: OutputFolder, segments: Classes):
        self.output, self.segments = output, segments
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def file(self, image: Path) -> str | None:
        """Name of the file of an image, below the output folder."""
        return None

    def begin(self, image: Path, label: np.ndarray) -> int:
        """Lists an image; returns its id."""
        height, width = label.shape
        number = stable_id(image.name)
        self.images.append({"id": number, "file_name": image.name, "width": width, "height": height})
        return number

    def finish(self, source: str) -> None:
        """Writes the JSON file."""
        categories = [
            {"id": id_ + 1, "name": name, "supercategory": "", "isthing": 0, "color": list(color)}
            for id_, (name, color) in enumerate(zip(self.segments.names, self.segments.colors, strict=True))
        ]
        content = {
            "info": {"description": "Segments found by STEGO", "version": "1.0"},
            "licenses": [],
            "images": self.images,
            "annotations": self.annotations,
            "categories": categories,
        }
        with self.output.write(self.summary, source) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")


class CocoPanoptic(Coco):
    """panoptic.json, and panoptic/NAME.png with the number of each pixel's segment as R + 256 G + 65536 B.

    Every segment is one "stuff" segment per image. Pixels of no segment have the number 0.
    """

    summary = "panoptic.json"

    def file(self, image: Path) -> str:
        return f"panoptic/{image.stem}.png"

    def add(self, image: Path, label: np.ndarray, source: str) -> None:
        """Adds a label map, uint8 (H, W)."""
        number = self.begin(image, label)
        numbers = np.where(label < len(self.segments), label + 1, 0).astype(np.uint8)  # at most 255: the red channel
        with self.output.write(self.file(image), source) as temporary:
            Image.fromarray(np.stack([numbers, 0 * numbers, 0 * numbers], 2)).save(temporary)
        present = np.unique(numbers[numbers > 0]).tolist()
        segments = [{"id": id_, "category_id": id_, "iscrowd": 0, **_measures(numbers == id_)} for id_ in present]
        self.annotations.append({"image_id": number, "file_name": f"{image.stem}.png", "segments_info": segments})


class CocoInstances(Coco):
    """instances.json: every connected region of a segment is an instance, with a run-length encoded mask.

    A connected region is not an object: objects of one kind that touch are one instance, and one that is partly hidden
    may be two.
    """

    summary = "instances.json"

    def add(self, image: Path, label: np.ndarray, source: str) -> None:
        """Adds a label map, uint8 (H, W)."""
        number = self.begin(image, label)
        for id_ in np.unique(label[label < len(self.segments)]).tolist():
            regions, count = ndimage.label(label == id_, np.ones((3, 3), bool))
            for region in range(1, count + 1):
                mask = _encoded(regions == region)
                segmentation = {"size": list(label.shape), "counts": mask["counts"].decode("ascii")}
                self.annotations.append(
                    {
                        "id": stable_id(image.name, id_, region),
                        "image_id": number,
                        "category_id": id_ + 1,
                        "segmentation": segmentation,
                        "iscrowd": 0,
                        **_measures(regions == region),
                    }
                )


def _encoded(mask: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    return coco_mask.encode(np.asfortranarray(mask, np.uint8))


def _measures(mask: np.ndarray) -> dict[str, Any]:
    """Area and bounding box of a mask."""
    from pycocotools import mask as coco_mask

    encoded = _encoded(mask)
    return {"area": int(coco_mask.area(encoded)), "bbox": coco_mask.toBbox(encoded).astype(int).tolist()}
