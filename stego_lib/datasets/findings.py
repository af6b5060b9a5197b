"""What may mislead in a dataset, by the names of its files and the number of labeled pixels of each class."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..utils.notices import notice
from .base import SegmentationDataset
from .layout import has_images, left_out, list_images

# Name of a label map beside its image.
MASK_NAME = re.compile(
    r"(.+?)[ ._-](?:masks?|labels?|labelids|seg|segmentation|groundtruth|gt|annot(?:ations?)?|L|P)\d*|masks?[ ._-](.+)",
    re.IGNORECASE,
)


class Finding(NamedTuple):
    """Something about a dataset to know before training on it."""

    text: str
    misleads: bool = False
    """Whether training or scores would mean something else than they seem to."""


def show_findings(source: SegmentationDataset | Path, class_pixels: list[int] | None = None) -> None:
    """Shows as notices what may mislead in a dataset or a folder of images; opens no file.

    class_pixels: labeled pixels of each class, for classes that occur in no label map.
    """
    if isinstance(source, Path):
        findings = listing_findings(source, list_images(source))
    else:
        source = getattr(source, "whole", source)
        findings = file_findings(source)
        if class_pixels is not None and source.has_labels:
            # The counts are of resized label maps, which may lose the rarest of many classes.
            findings += label_findings(source, np.array(class_pixels), all_read=source.name == "folder")
    for finding in findings:
        prefix = "" if isinstance(source, Path) else f"{source.name} {source.split}: "
        _show(prefix + finding.text)


def _show(text: str) -> None:
    notice(text)  # always at this place: Python shows a warning of one place once


def file_findings(dataset: SegmentationDataset) -> list[Finding]:
    """Findings from the names of files; only a folder of your own has any."""
    if dataset.name != "folder":
        return []
    images = dataset.images[0].parent
    findings = listing_findings(images, dataset.images)
    if not dataset.has_labels:
        root = images.parent.parent if images.parent.name == "imgs" else images
        used = {"imgs", "depth", "overlays"} | ({"labels"} if (root / "labels" / "val").is_dir() else set())
        names = [path.name for path in sorted(root.iterdir()) if path.name not in used and has_images(path)]
        text = f"unlabeled; {few(names)} in {root} is not read. Label maps belong to labels/train and labels/val."
        findings += [Finding(text)] if names else []
    return findings


def listing_findings(folder: Path, images: list[Path]) -> list[Finding]:
    """Findings from the names of the files in a folder of images."""
    findings = []
    if skipped := left_out(folder):
        findings.append(Finding(f"left out of {folder}:{skipped}"))
    stems = {path.stem for path in images}
    matches = [(path.name, MASK_NAME.fullmatch(path.stem)) for path in images]
    masks = [name for name, match in matches if match and (match[1] or match[2]) in stems]
    if masks:
        text = (
            f"{len(masks)} of {len(images)} images in {folder} are named like label maps ({few(masks)}) and are used "
            "as images. Move them to labels/train and labels/val, named like their images."
        )
        findings.append(Finding(text, misleads=True))
    return findings


def label_findings(
    dataset: SegmentationDataset, counts: np.ndarray, all_read: bool, ids: np.ndarray | None = None
) -> list[Finding]:
    """Findings from the number of labeled pixels of each class, and of each stored id where they are known."""
    names, present = dataset.classes.names, np.flatnonzero(counts).tolist()
    seen = present if ids is None else np.flatnonzero(ids).tolist()
    hint = f"ids seen: {', '.join(map(str, seen[:10]))}{', ...' if len(seen) > 10 else ''}"
    if dataset.name == "folder":
        hint += "; ids start at 0, and 255 means ignored: where it is an object, store the id of its class"
    if not present:
        return [Finding(f"no pixel of the label maps has a class ({hint})", misleads=True)]
    if len(present) == 1:
        text = f"{names[present[0]]!r} is the only class in the label maps ({hint}): scores would mean nothing"
        return [Finding(text, misleads=True)]
    absent = [name for name, count in zip(names, counts, strict=True) if not count]
    if not absent or not all_read:
        return []
    return [Finding(f"{len(absent)} of {len(names)} classes occur in no label map: {few(absent)} ({hint})")]


def few(names: list[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
