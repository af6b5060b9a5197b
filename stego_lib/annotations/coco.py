"""COCO's panoptic and instance annotations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from ..datasets.classes import Classes
from ..utils.files import fingerprint
from .outputs import OutputFolder, Writer


class Coco(Writer):
    """Images, categories and annotations in one JSON file. The category of a segment is its id in label maps + 1."""

    summary = ""

    def __init__(self, output: OutputFolder, segments: Classes):
        super().__init__(output, segments)
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add_image(self, image: Path, label: np.ndarray) -> int:
        """Lists an image; returns its id."""
        height, width = label.shape
        id_ = _stable_id(image.name)
        self.images.append({"id": id_, "file_name": image.name, "width": width, "height": height})
        return id_

    def finish(self, source: str) -> None:
        pairs = zip(self.segments.names, self.segments.colors, strict=True)
        categories = [
            {"id": number, "name": name, "supercategory": "", "isthing": 0, "color": list(color)}
            for number, (name, color) in enumerate(pairs, start=1)
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
        numbers = np.where(label < len(self.segments), label + 1, 0).astype(np.uint8)  # at most 255: the red channel
        with self.output.write(self.file(image), source) as temporary:
            Image.fromarray(np.stack([numbers, 0 * numbers, 0 * numbers], 2)).save(temporary)
        segments = []
        for id_ in np.unique(numbers[numbers > 0]).tolist():
            _, area, box = _encode(numbers == id_)
            segments.append({"id": id_, "category_id": id_, "iscrowd": 0, "area": area, "bbox": box})
        image_id, name = self.add_image(image, label), f"{image.stem}.png"
        self.annotations.append({"image_id": image_id, "file_name": name, "segments_info": segments})


class CocoInstances(Coco):
    """instances.json: every connected region of a segment is an instance, with a run-length encoded mask.

    A connected region is not an object: objects of one kind that touch are one instance, and one that is partly hidden
    may be two.
    """

    summary = "instances.json"

    def add(self, image: Path, label: np.ndarray, source: str) -> None:
        image_id = self.add_image(image, label)
        for id_ in np.unique(label[label < len(self.segments)]).tolist():
            regions, count = ndimage.label(label == id_, np.ones((3, 3), bool))
            for region in range(1, count + 1):
                mask, area, box = _encode(regions == region)
                annotation = {"id": _stable_id(image.name, id_, region), "image_id": image_id, "category_id": id_ + 1}
                self.annotations.append(annotation | {"segmentation": mask, "iscrowd": 0, "area": area, "bbox": box})


def _stable_id(*parts: object) -> int:
    """A positive number below 2^53 that depends on the parts alone, so that ids stay when images are added."""
    return 1 + int(fingerprint(*parts)[:13], 16)


def _encode(mask: np.ndarray) -> tuple[dict[str, Any], int, list[int]]:
    """Run-length encoding, area and bounding box of a mask."""
    from pycocotools import mask as coco_mask

    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    area, box = int(coco_mask.area(encoded)), coco_mask.toBbox(encoded).astype(int).tolist()
    return {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}, area, box
