"""Finds what may be misleading in a dataset, from file names and the number of labeled pixels of each class."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..utils.notices import notice
from .base import SegmentationDataset
from .layout import ignored_files

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


def show_findings(dataset: SegmentationDataset, class_pixels: list[int] | None) -> None:
    """Shows findings as notices. class_pixels: number of labeled pixels of each class."""
    whole = getattr(dataset, "whole", dataset)
    # Resized label maps may lose rare classes, so absent classes are only reported for a folder.
    for finding in dataset_findings(whole, class_pixels, all_read=whole.name == "folder"):
        notice(f"{whole.name} {whole.split}: {finding.text}")


def dataset_findings(dataset: SegmentationDataset, class_pixels: list[int] | None, all_read: bool) -> list[Finding]:
    """Findings on a dataset. all_read: whether `class_pixels` counts all labels."""
    own = dataset.name == "folder"
    findings = folder_findings(dataset.images[0].parent, dataset.images) if own else []
    if class_pixels is None or not dataset.has_labels:
        return findings
    names, present = dataset.classes.names, np.flatnonzero(class_pixels).tolist()
    hint = "ids start at 0, and 255 means ignored, not an object" if own else "check the ids"
    if len(present) < 2:
        text = f"the label maps hold {'only ' + repr(names[present[0]]) if present else 'no class'}; {hint}"
        return [*findings, Finding(text, misleads=True)]
    absent = [name for name, count in zip(names, class_pixels, strict=True) if not count]
    if absent and all_read:
        findings.append(Finding(f"{len(absent)} of {len(names)} classes are in no label map: {few(absent)}; {hint}"))
    return findings


def folder_findings(folder: Path, images: list[Path]) -> list[Finding]:
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


def few(names: list[str]) -> str:
    """The first three names, for messages."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
