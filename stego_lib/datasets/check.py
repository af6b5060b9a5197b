"""Checks a dataset: counts of images, sizes, unknown ids, left-out and broken files."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..utils.errors import StegoError
from ..utils.notices import Notice
from ..utils.paths import user_path
from ..utils.progress import progress
from . import open_dataset
from .base import SegmentationDataset
from .findings import Finding, file_findings, label_findings

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
# Largest number of images that are read, spread over the split.
SAMPLE = 2000


class Survey:
    """What the files of a split hold, or a sample of `SAMPLE` of them."""

    def __init__(self, dataset: SegmentationDataset):
        self.dataset = dataset
        self.rows = np.unique(np.linspace(0, len(dataset) - 1, SAMPLE).astype(int)).tolist()
        # Pixels of each class and, last, of those ignored; pixels of each stored id.
        self.classes, self.ids = np.zeros(len(dataset.classes) + 1, int), np.zeros(256, int)
        # Images that EXIF turns, that have transparent pixels, that have no others.
        self.rotated = self.transparent = self.invisible = 0
        # Why files cannot be used.
        self.broken: list[str] = []
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
            results = pool.map(self._read, self.rows)
            for result in progress(results, f"files of {dataset.name} {dataset.split}", total=len(self.rows)):
                if isinstance(result, StegoError):
                    self.broken.append(str(result))
                    continue
                self.rotated += result[0]
                self.transparent += result[1]
                self.invisible += result[2]
                self.classes += result[3]
                self.ids += result[4]

    def _read(self, row: int) -> StegoError | tuple[bool, bool, bool, np.ndarray | int, np.ndarray | int]:
        try:
            image, stored = self.dataset.read(row), self.dataset.stored(row)
            label = self.dataset.meaning(stored, row, image)
        except StegoError as error:
            return error
        transparent = np.zeros(1, bool) if image.transparent is None else image.transparent
        flags = image.orientation > 1, bool(transparent.any()), bool(transparent.all())
        if stored is None or label is None:
            return *flags, 0, 0
        count = len(self.classes)
        classes = np.bincount(label.numpy().ravel() % count, minlength=count)  # -1 becomes the last
        return *flags, classes, np.bincount(stored[(stored >= 0) & (stored < 256)], minlength=256)

    def findings(self) -> list[Finding]:
        """What may mislead in the dataset."""
        dataset, looked = self.dataset, len(self.rows)
        findings = file_findings(dataset)
        if dataset.has_labels:
            findings += label_findings(dataset, self.classes[:-1], looked == len(dataset), self.ids)
        if self.broken:
            lines = [*self.broken[:5], *([f"and {len(self.broken) - 5} more"] if len(self.broken) > 5 else [])]
            text = "\n      ".join([f"{len(self.broken)} of {looked} images cannot be used:", *lines])
            findings.append(Finding(text, misleads=True))
        if doubt := dataset.doubt(self.ids):
            findings.append(Finding(doubt, misleads=True))
        if self.rotated and dataset.has_labels and dataset.rules.exif is None:
            choice = 'label maps must match; "exif": "ignore" in classes.json leaves images as stored'
            findings.append(Finding(f"{self.rotated} of {looked} images are turned upright by EXIF; {choice}"))
        if self.transparent:
            findings.append(Finding(f"{self.transparent} of {looked} images have transparent pixels, which are void"))
        if self.invisible:
            text = f"{self.invisible} of {looked} images are fully transparent: is the fourth channel alpha?"
            findings.append(Finding(text, misleads=True))
        return findings


def check(name: str, root: str | Path) -> bool:
    """Prints what is there of dataset `name` below `root`; returns whether it can be used.

    It cannot if a split is missing, files are broken or a finding misleads. Other numbers of images than the published
    ones are printed, and are no fault.
    """
    print(f"{name} below {user_path(root).resolve()}")
    usable = [_check_split(name, root, split) for split in ("train", "val")]
    return all(usable)


def _check_split(name: str, root: str | Path, split: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Notice)  # the findings say the same
            dataset = open_dataset(name, root, split)
            survey = Survey(dataset)
    except StegoError as error:
        print(f"  {split}: MISSING or broken: " + str(error).replace("\n", "\n  "))
        return False
    counts = COUNTS.get(name, {}).get(split, ())
    remark = "" if not counts or len(dataset) in counts else f" (published: {' or '.join(f'{c:,}' for c in counts)})"
    sample = "" if len(survey.rows) == len(dataset) else f", of which {len(survey.rows):,} were read"
    print(f"  {split}: {len(dataset):,} images{remark}{sample}")
    if dataset.has_labels:
        shares = 100 * survey.classes / max(1, survey.classes.sum())
        print(f"    labels: {shares[-1]:.1f} % of the pixels ignored")
        for name, share in zip(dataset.classes.names, shares, strict=False):
            print(f"      {name[:24]:<24} {share:5.1f} %")
    else:
        print("    no labels: training and segmenting work, scores are left out")
    findings = survey.findings()
    for finding in findings:
        print(f"    {'WRONG' if finding.misleads else 'note'}: {dataset.name} {split}: {finding.text}")
    return not any(finding.misleads for finding in findings)
