"""Finds what may be misleading in a dataset, from file names and the number of labeled pixels of each class."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..utils.notices import notice
from .base import SegmentationDataset
from .layout import has_images, ignored_files, list_images

# Stem of a label map that is stored next to its image: IMAGE_mask, IMAGE-labels, mask_IMAGE and the like.
MASK_STEM = re.compile(
    r"(.+?)[ ._-](?:masks?|labels?|labelids|seg|segmentation|groundtruth|gt|annot(?:ations?)?|L|P)\d*|masks?[ ._-](.+)",
    re.IGNORECASE,
)


class Finding(NamedTuple):
    """Something to know before training on a dataset."""

    text: str
    misleads: bool = False
    """Whether results would be misleading."""


def show_findings(source: SegmentationDataset | Path, class_pixels: list[int] | None = None) -> None:
    """Shows findings on a dataset or a folder of images as notices. Opens no file.

    class_pixels: number of labeled pixels of each class.
    """
    if isinstance(source, Path):
        findings = listing_findings(source, list_images(source))
    else:
        source = getattr(source, "whole", source)
        findings = file_findings(source)
        if class_pixels is not None and source.has_labels:
            # Resized label maps may lose rare classes, so absent classes are only reported for a folder.
            findings += label_findings(source, np.array(class_pixels), all_read=source.name == "folder")
    for finding in findings:
        notice(finding.text if isinstance(source, Path) else f"{source.name} {source.split}: {finding.text}")


def file_findings(dataset: SegmentationDataset) -> list[Finding]:
    """Findings from file names, for the dataset `folder`."""
    if dataset.name != "folder":
        return []
    images = dataset.images[0].parent
    findings = listing_findings(images, dataset.images)
    if not dataset.has_labels:
        root = images.parent.parent if images.parent.name == "imgs" else images
        used = {"imgs", "depth", "overlays"} | ({"labels"} if (root / "labels" / "val").is_dir() else set())
        names = [path.name for path in sorted(root.iterdir()) if path.name not in used and has_images(path)]
        text = f"no labels; {few(names)} in {root} is not read. Put label maps into labels/train and labels/val."
        findings += [Finding(text)] if names else []
    return findings


def listing_findings(folder: Path, images: list[Path]) -> list[Finding]:
    """Findings from the file names of a folder of images."""
    findings = []
    if skipped := ignored_files(folder):
        findings.append(Finding(f"ignored files in {folder}:{skipped}"))
    stems = {path.stem for path in images}
    matches = [(path.name, MASK_STEM.fullmatch(path.stem)) for path in images]
    masks = [name for name, match in matches if match and (match[1] or match[2]) in stems]
    if masks:
        text = (
            f"{len(masks)} of {len(images)} images in {folder} have names of label maps ({few(masks)}) and are used "
            "as images. Move them to labels/train and labels/val, and give them the names of their images."
        )
        findings.append(Finding(text, misleads=True))
    return findings


def label_findings(dataset: SegmentationDataset, counts: np.ndarray, all_read: bool) -> list[Finding]:
    """Findings from the number of labeled pixels of each class."""
    names, present = dataset.classes.names, np.flatnonzero(counts).tolist()
    hint = "ids start at 0, and 255 means ignored, not an object" if dataset.name == "folder" else "check the ids"
    if len(present) < 2:
        text = f"the label maps hold {'only ' + repr(names[present[0]]) if present else 'no class'}; {hint}"
        return [Finding(text, misleads=True)]
    absent = [name for name, count in zip(names, counts, strict=True) if not count]
    if not absent or not all_read:
        return []
    return [Finding(f"{len(absent)} of {len(names)} classes are in no label map: {few(absent)}; {hint}")]


def few(names: list[str]) -> str:
    """The first three names, for messages."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
