"""Tells in one screen whether a data set is there and whether its labels mean what they should."""

from pathlib import Path

import numpy as np

from ..errors import StegoError
from ..progress import progress
from . import SegmentationDataset, open_dataset

COUNTS: dict[str, dict[str, tuple[int, ...]]] = {
    "camvid": {"train": (367,), "val": (101,)},
    "cityscapes": {"train": (2975,), "val": (500,)},
    "cocostuff27": {"train": (97702, 49629), "val": (2175,)},
    "cocostuff15": {"train": (49629,), "val": (2175,)},
    "cocostuff3": {"val": (1432,)},
    "potsdam3": {"train": (4545, 4500), "val": (855, 900)},
}
"""Pictures of each split: as published, then of the other list or layout that may stand in for it."""
SAMPLE = 40
"""Label maps of a split that are looked at, spread over it."""
COLUMNS = 3


def check(name: str, root: str | Path) -> bool:
    """Prints what is there of data set `name` below `root`; returns whether it can be used.

    It cannot if a split is missing, a picture or label map of the sample cannot be read or they differ in size, or no
    pixel of the sample has a class. Other than published numbers of pictures are told, and no fault.
    """
    print(f"{name} below {Path(root).expanduser().resolve()}")
    usable = {
        split: _check_split(name, root, split) for split in ("train", "val")
    }  # both are told, whatever the first is
    return all(usable.values())


def _check_split(name: str, root: str | Path, split: str) -> bool:
    try:
        dataset = open_dataset(name, root, split)
        picture = dataset.picture(0)
        shares = class_shares(dataset) if dataset.has_labels else None
    except StegoError as error:
        print(f"  {split}: MISSING or broken: " + str(error).replace("\n", "\n  "))
        return False
    height, width = picture.shape[1:]
    counts = COUNTS.get(name, {}).get(split, ())
    remark = "" if not counts or len(dataset) in counts else f" (published: {' or '.join(f'{c:,}' for c in counts)})"
    print(f"  {split}: {len(dataset):,} pictures{remark}, the first {width} x {height}")
    if shares is None:
        print("    no labels: training and segmenting work, scores are left out")
        return True
    sampled, seen = min(SAMPLE, len(dataset)), int((shares[:-1] > 0).sum())
    print(
        f"    labels: {seen} of {len(dataset.classes)} classes in a sample of {sampled}, {100 * shares[-1]:.1f} % of the pixels ignored"
    )
    cells = [f"{n[:24]:<24} {100 * share:5.1f} %" for n, share in zip(dataset.classes.names, shares, strict=False)]
    for row in range(0, len(cells), COLUMNS):
        print("      " + "   ".join(cells[row : row + COLUMNS]))
    if not seen:
        print("    WRONG: no pixel has a class; are these label maps those of this data set?")
    return seen > 0


def class_shares(dataset: SegmentationDataset) -> np.ndarray:
    """Share of the pixels of each class, and last of those ignored, float (classes + 1,), in a sample of label maps.

    The data set must have labels. Raises StegoError for a label map of another size than its picture.
    """
    counts = np.zeros(len(dataset.classes) + 1)
    rows = np.unique(np.linspace(0, len(dataset) - 1, SAMPLE).astype(int))
    for row in progress(rows, f"labels of {dataset.name} {dataset.split}"):
        label = dataset[int(row)][1]
        assert label is not None, "asked of data sets with labels alone"
        found = label.numpy().ravel()
        counts += np.bincount(np.where(found < 0, len(counts) - 1, found), minlength=len(counts))
    return counts / counts.sum()
