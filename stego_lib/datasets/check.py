"""Prints on one screen whether a dataset is complete and whether its labels mean what they should."""

import warnings
from pathlib import Path

import numpy as np

from ..utils.errors import StegoError
from ..utils.notices import Notice
from ..utils.paths import user_path
from . import SegmentationDataset, open_dataset
from .findings import look, rotation_note
from .intact import Survey, survey

COUNTS: dict[str, dict[str, tuple[int, ...]]] = {
    "camvid": {"train": (367,), "val": (101,)},
    "cityscapes": {"train": (2975,), "val": (500,)},
    "cocostuff27": {"train": (97702, 49629), "val": (2175,)},
    "cocostuff15": {"train": (49629,), "val": (2175,)},
    "cocostuff3": {"val": (1432,)},
    "potsdam3": {"train": (4545, 4500), "val": (855, 900)},
}
"""Images of each split: as published, then in other lists or layouts that are accepted."""
SAMPLE = 2000
"""Largest number of images and label maps of a split that are read, spread over it."""
COLUMNS = 3


def check(name: str, root: str | Path) -> bool:
    """Prints what is there of dataset `name` below `root`; returns whether it can be used.

    It cannot if a split is missing, an image or label map cannot be read or they differ in size, no pixel has a class, or a
    finding misleads (see `findings`). Other than published numbers of images are told, and no fault.
    """
    print(f"{name} below {user_path(root).resolve()}")
    usable = {
        split: _check_split(name, root, split) for split in ("train", "val")
    }  # both are told, whatever the first is
    return all(usable.values())


def _check_split(name: str, root: str | Path, split: str) -> bool:
    try:
        with warnings.catch_warnings(record=True) as caught:  # said when opened: one folder for both splits
            warnings.simplefilter("always", Notice)
            dataset = open_dataset(name, root, split)
        rows = np.unique(np.linspace(0, len(dataset) - 1, SAMPLE).astype(int)).tolist()
        found = survey(dataset, rows)
        findings = look(dataset, found)
    except StegoError as error:
        print(f"  {split}: MISSING or broken: " + str(error).replace("\n", "\n  "))
        return False
    height, width = found.first
    counts = COUNTS.get(name, {}).get(split, ())
    remark = "" if not counts or len(dataset) in counts else f" (published: {' or '.join(f'{c:,}' for c in counts)})"
    print(f"  {split}: {len(dataset):,} images{remark}, the first {width} x {height}")
    for warned in caught:
        print(f"    note: {warned.message}")
    _print_images(found, dataset)
    if dataset.has_labels:
        _print_classes(found, dataset)
    else:
        print("    no labels: training and segmenting work, scores are left out")
    for one in findings:
        print(f"    {'WRONG' if one.misleads else 'note'}: {one.text}")
    return not any(one.misleads for one in findings)


def _print_images(found: Survey, dataset: SegmentationDataset) -> None:
    """Facts about a split that no finding states."""
    if found.orientations and (dataset.rules.exif or not dataset.has_labels):
        ignored = "; they are left as stored" if dataset.rules.exif == "ignore" else ""
        print(f"    EXIF: {rotation_note(found, found.looked)}{ignored}")
    if found.depths and dataset.rules.range:
        black, white = dataset.rules.range
        print(f"    depth: {', '.join(sorted(found.depths))}, of which {black:,g} to {white:,g} become 8 bits")


def _print_classes(found: Survey, dataset: SegmentationDataset) -> None:
    seen, shares = int((found.classes[:-1] > 0).sum()), found.classes / found.classes.sum()
    print(
        f"    labels: {seen} of {len(dataset.classes)} classes in {found.maps}, {100 * shares[-1]:.1f} % of the pixels ignored"
    )
    cells = [f"{n[:24]:<24} {100 * share:5.1f} %" for n, share in zip(dataset.classes.names, shares, strict=False)]
    for row in range(0, len(cells), COLUMNS):
        print("      " + "   ".join(cells[row : row + COLUMNS]))
