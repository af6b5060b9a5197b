"""COCO's panoptic and instance annotations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..datasets.classes import Classes
from ..utils.files import atomic
from .regions import regions


def category_id(id_: int) -> int:
    """COCO's number of a segment: its id in label maps plus 1, for 0 is what belongs to no category."""
    return id_ + 1


class Coco:
    """What both kinds of annotations share: images and categories, written to one JSON file at the end."""

    file = ""

    def __init__(self, output: Path, segments: Classes):
        self.output, self.segments = output, segments
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def begin(self, image: Path, label: np.ndarray) -> int:
        """Lists an image; its number."""
        height, width = label.shape
        number = len(self.images) + 1
        self.images.append({"id": number, "file_name": image.name, "width": width, "height": height})
        return number

    def finish(self) -> None:
        """Writes the file."""
        categories = [
            {"id": category_id(id_), "name": name, "supercategory": "", "isthing": 0, "color": list(color)}
            for id_, (name, color) in enumerate(zip(self.segments.names, self.segments.colors, strict=True))
        ]
        text = json.dumps({"images": self.images, "annotations": self.annotations, "categories": categories})
        with atomic(self.output / self.file) as temporary:
            temporary.write_text(text, encoding="utf-8")


class CocoPanoptic(Coco):
    """panoptic.json, and panoptic/NAME.png with the number of each pixel's segment as R + 256 G + 65536 B.

    Every segment is one "stuff" segment an image, for nothing tells objects of one kind apart. Pixels of no segment have number 0.
    """

    file = "panoptic.json"

    def add(self, image: Path, label: np.ndarray) -> None:
        """Adds a label map."""
        number = self.begin(image, label)
        inside = label < len(self.segments)
        colored = np.zeros((*label.shape, 3), np.uint8)
        colored[..., 0] = np.where(inside, label, 0) + inside  # at most 255 segments: the red channel alone
        path = self.output / "panoptic" / f"{image.stem}.png"
        with atomic(path) as temporary:
            Image.fromarray(colored).save(temporary)
        described = []
        for id_ in np.unique(label[inside]).tolist():
            mask = label == id_
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            left, top = int(columns[0]), int(rows[0])
            box = [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
            described.append(
                {"id": id_ + 1, "category_id": category_id(id_), "area": int(mask.sum()), "bbox": box, "iscrowd": 0}
            )
        self.annotations.append({"image_id": number, "file_name": path.name, "segments_info": described})


class CocoInstances(Coco):
    """instances.json: every connected region of a segment is an instance, with a run-length encoded mask.

    A connected region is no object: objects of one kind that touch are one instance, and one that is partly hidden may be two.
    """

    file = "instances.json"

    def add(self, image: Path, label: np.ndarray) -> None:
        """Adds a label map."""
        from pycocotools import mask as encoder

        number = self.begin(image, label)
        for region in regions(label):
            if region.id >= len(self.segments):
                continue
            height, width = region.mask.shape
            full = np.zeros(label.shape, np.uint8, order="F")
            full[region.top : region.top + height, region.left : region.left + width] = region.mask
            encoded = encoder.encode(full)
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1, "image_id": number, "category_id": category_id(region.id),
                    "segmentation": {"size": list(label.shape), "counts": encoded["counts"].decode("ascii")},
                    "area": int(region.mask.sum()), "bbox": [region.left, region.top, width, height], "iscrowd": 0,
                }
            )  # fmt: skip
