"""Checks a dataset: number of images, share of each class, unreadable files, and what may be misleading."""

import warnings
from pathlib import Path

import numpy as np

from ..utils.errors import StegoError
from ..utils.paths import user_path
from ..utils.progress import progress
from ..utils.threads import READERS, in_threads
from . import open_dataset
from .base import SegmentationDataset
from .findings import dataset_findings

# Images of each split: as published, then in other lists or layouts that are accepted.
COUNTS: dict[str, dict[str, tuple[int, ...]]] = {
    "camvid": {"train": (367,), "val": (101,)},
    "cityscapes": {"train": (2975,), "val": (500,)},
    "cocostuff27": {"train": (97702, 49629), "val": (2175,)},
    "cocostuff15": {"train": (49629,), "val": (2175,)},
    "cocostuff3": {"val": (1432,)},
    "potsdam3": {"train": (4545, 4500), "val": (855, 900)},
    "labelmefacade": {"train": (569,), "val": (196,)},
}
# Number of images that are read, evenly spaced over a larger split.
SAMPLE = 2000


def check(name: str, root: str | Path) -> bool:
    """Prints the content of dataset `name` in the folder `root`; returns whether it is usable.

    It is not if a split is missing, a file is unreadable or labels are misleading. Numbers of images that differ from
    the published ones are printed only.
    """
    print(f"{name} in {user_path(root).resolve()}")
    usable = [_check_split(name, root, split) for split in ("train", "val")]
    return all(usable)


def _check_split(name: str, root: str | Path, split: str) -> bool:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dataset = open_dataset(name, root, split)
            rows = np.unique(np.linspace(0, len(dataset) - 1, SAMPLE).astype(int)).tolist()
            pixels, unreadable = _read(dataset, rows)
    except StegoError as error:
        print(f"  {split}: MISSING or broken: " + str(error).replace("\n", "\n  "))
        return False
    counts = COUNTS.get(name, {}).get(split, ())
    remark = "" if not counts or len(dataset) in counts else f" (published: {' or '.join(f'{c:,}' for c in counts)})"
    sample = "" if len(rows) == len(dataset) else f", {len(rows):,} of them read"
    print(f"  {split}: {len(dataset):,} images{remark}{sample}")
    findings = dataset_findings(dataset, pixels[:-1].tolist(), all_read=len(rows) == len(dataset))
    if dataset.has_labels:
        shares = 100 * pixels / max(1, pixels.sum())
        print(f"    labels: {shares[-1]:.1f} % of the pixels ignored")
        for class_name, share in zip(dataset.classes.names, shares, strict=False):
            print(f"      {class_name[:24]:<24} {share:5.1f} %")
    else:
        print("    no labels: training and segmentation work, evaluation does not")
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"    note: {text}")
    for finding in findings:
        print(f"    {'WRONG' if finding.misleads else 'note'}: {dataset.name} {split}: {finding.text}")
    if unreadable:
        print(f"    WRONG: {len(unreadable)} of {len(rows)} images cannot be used, for example:")
        print("\n".join(f"      {text}" for text in unreadable[:5]))
    return not unreadable and not any(finding.misleads for finding in findings)


def _read(dataset: SegmentationDataset, rows: list[int]) -> tuple[np.ndarray, list[str]]:
    """Pixels of each class and, last, of those ignored, int64 (n_classes + 1,), and the errors of unreadable files."""
    count = len(dataset.classes) + 1

    def pixels(row: int) -> np.ndarray | StegoError:
        try:
            label = dataset.sample(row).label
        except StegoError as error:
            return error
        return np.zeros(count, int) if label is None else np.bincount(label.numpy().ravel() % count, minlength=count)

    title = f"files of {dataset.name} {dataset.split}"
    results = list(progress(in_threads(pixels, rows, READERS), title, total=len(rows)))
    counted = [result for result in results if not isinstance(result, StegoError)]
    return np.sum([np.zeros(count, int), *counted], 0), [str(r) for r in results if isinstance(r, StegoError)]
