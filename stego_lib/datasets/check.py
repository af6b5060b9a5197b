"""Checks a dataset in one pass: counts, sizes, unknown ids, left-out and broken files."""

import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..utils.errors import StegoError
from ..utils.notices import Notice, notice
from ..utils.paths import user_path
from ..utils.progress import progress
from . import SegmentationDataset, open_dataset
from .layout import has_images, left_out, list_images

# Images of each split: as published, then in other lists or layouts that are accepted.
COUNTS: dict[str, dict[str, tuple[int, ...]]] = {
    "camvid": {"train": (367,), "val": (101,)},
    "cityscapes": {"train": (2975,), "val": (500,)},
    "cocostuff27": {"train": (97702, 49629), "val": (2175,)},
    "cocostuff15": {"train": (49629,), "val": (2175,)},
    "cocostuff3": {"val": (1432,)},
    "potsdam3": {"train": (4545, 4500), "val": (855, 900)},
}
# Largest number of images that are read, spread over the split.
SAMPLE = 2000
# Name of a label map beside its image.
MASK_NAME = re.compile(
    r"(.+?)[ ._-](?:masks?|labels?|labelids|seg|segmentation|groundtruth|gt|annot(?:ations?)?|L|P)\d*|masks?[ ._-](.+)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Finding:
    """Something about a dataset to know before training on it."""

    text: str
    misleads: bool = False
    """Whether training or scores would mean something else than they seem to."""


@dataclass
class Survey:
    """What the files of a split hold."""

    classes: np.ndarray
    """Pixels of each class and, last, of those ignored: int64 (classes + 1,)."""
    ids: np.ndarray = field(default_factory=lambda: np.zeros(256, int))
    """Pixels of each stored id, int64 (256,)."""
    looked: int = 0
    rotated: int = 0
    """Images with an EXIF orientation other than 1."""
    transparent: int = 0
    invisible: int = 0
    """Images that are transparent all over."""
    broken: list[str] = field(default_factory=list)
    """Why files cannot be used."""

    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, dataset: SegmentationDataset, row: int) -> None:
        """Reads image and label map `row`, and counts what they hold."""
        try:
            read, stored = dataset.read(row), dataset.stored(row)
            label = dataset.meaning(stored, row, read)
        except StegoError as error:
            with self.lock:
                self.broken.append(str(error))
            return
        classes, ids = np.zeros_like(self.classes), np.zeros_like(self.ids)
        if stored is not None and label is not None:
            classes = np.bincount(label.numpy().ravel() % len(self.classes), minlength=len(self.classes))  # -1 is last
            ids = np.bincount(stored[(stored >= 0) & (stored < 256)], minlength=256)
        with self.lock:
            self.classes += classes
            self.ids += ids
            self.rotated += read.orientation > 1
            self.transparent += read.transparent is not None
            self.invisible += read.transparent is not None and bool(read.transparent.all())


def survey(dataset: SegmentationDataset) -> Survey:
    """Reads the images and label maps of a split, or a sample of `SAMPLE`, and counts what they hold."""
    rows = np.unique(np.linspace(0, len(dataset) - 1, SAMPLE).astype(int)).tolist()
    result = Survey(np.zeros(len(dataset.classes) + 1, int), looked=len(rows))
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        parts = pool.map(lambda row: result.add(dataset, row), rows)
        for _ in progress(parts, f"files of {dataset.name} {dataset.split}", total=len(rows)):
            pass
    result.broken.sort()
    return result


def find(
    source: SegmentationDataset | Path, class_pixels: list[int] | None = None, survey: Survey | None = None
) -> list[Finding]:
    """What may mislead in a dataset or a folder of images: from listing alone, and from counts where they are given."""
    whole = getattr(source, "whole", source)
    if isinstance(whole, Path):
        return _table(_listing(whole, list_images(whole)))
    rows = _listing(whole.images[0].parent, whole.images) if whole.name == "folder" else []
    if whole.name == "folder" and not whole.has_labels:
        rows.append(_unread_labels(whole))
    if class_pixels is not None or survey is not None:
        rows += _label_rows(whole, np.array(class_pixels if survey is None else survey.classes[:-1]), survey)
    if survey is not None:
        rows += _file_rows(whole, survey)
    return [Finding(f"{whole.name} {whole.split}: {row.text}", row.misleads) for row in _table(rows)]


# A possible finding: the condition, the text, whether it misleads.
Row = tuple[object, str, bool]


def _table(rows: list[Row]) -> list[Finding]:
    return [Finding(text, misleads) for condition, text, misleads in rows if condition]


def _listing(folder: Path, images: list[Path]) -> list[Row]:
    """Possible findings from the names of the files in a folder of images."""
    stems = {path.stem for path in images}
    matches = ((path.name, MASK_NAME.fullmatch(path.stem)) for path in images)
    masks = [name for name, match in matches if match and (match[1] or match[2]) in stems]
    skipped = left_out(folder)
    return [
        (skipped, f"left out of {folder}:{skipped}", False),
        (masks, f"{len(masks)} of {len(images)} images in {folder} are named like label maps ({_few(masks)}) and are "
         "used as images. Move them to labels/train and labels/val, named like their images.", True),
    ]  # fmt: skip


def _unread_labels(dataset: SegmentationDataset) -> Row:
    """The possible finding that label maps of an unlabeled folder lie in a place where they are not read."""
    images = dataset.images[0].parent
    root = images.parent.parent if images.parent.name == "imgs" else images
    used = {"imgs", "depth", "overlays"} | ({"labels"} if (root / "labels" / "val").is_dir() else set())
    names = [path.name for path in sorted(root.iterdir()) if path.name not in used and has_images(path)]
    text = f"unlabeled; {_few(names)} in {root} is not read. Label maps belong to labels/train and labels/val."
    return names, text, False


def _label_rows(dataset: SegmentationDataset, counts: np.ndarray, survey: Survey | None) -> list[Row]:
    """Possible findings from the number of labeled pixels of each class."""
    if not dataset.has_labels:
        return []
    names, present = dataset.classes.names, np.flatnonzero(counts).tolist()
    absent = [name for i, name in enumerate(names) if not counts[i]]
    seen = present if survey is None else np.flatnonzero(survey.ids).tolist()
    ids = f"ids seen: {', '.join(map(str, seen[:10]))}{', ...' if len(seen) > 10 else ''}"
    if dataset.name == "folder":
        ids += "; ids start at 0, and 255 means ignored: where it is an object, store the id of its class"
    # Counts of training are of resized label maps, which may lose the rarest of many classes.
    complete = dataset.name == "folder" if survey is None else survey.looked == len(dataset)
    only = names[present[0]] if present else ""
    return [
        (not present, f"no pixel of the label maps has a class ({ids})", True),
        (len(present) == 1, f"{only!r} is the only class in the label maps ({ids}): scores would mean nothing", True),
        (len(present) > 1 and absent and complete,
         f"{len(absent)} of {len(names)} classes occur in no label map: {_few(absent)} ({ids})", False),
    ]  # fmt: skip


def _file_rows(dataset: SegmentationDataset, survey: Survey) -> list[Row]:
    """Possible findings from the content of the files."""
    broken = "".join(f"\n      {text}" for text in survey.broken[:5])
    more = f"\n      and {len(survey.broken) - 5} more" if len(survey.broken) > 5 else ""
    doubt = dataset.doubt(survey.ids)
    choice = 'label maps must match; "exif": "ignore" in classes.json leaves images as stored'
    looked = survey.looked
    rotated = survey.rotated and dataset.has_labels and dataset.rules.exif is None
    return [
        (survey.broken, f"{len(survey.broken)} of {survey.looked} images cannot be used:{broken}{more}", True),
        (doubt, doubt, True),
        (rotated, f"{survey.rotated} of {survey.looked} images are turned upright by EXIF; {choice}", False),
        (survey.transparent, f"{survey.transparent} of {looked} images have transparent pixels, which are void", False),
        (survey.invisible, f"{survey.invisible} of {looked} images are fully transparent: is the fourth channel alpha?",
         True),
    ]  # fmt: skip


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def show_findings(source: SegmentationDataset | Path, class_pixels: list[int] | None = None) -> None:
    """Shows as notices, once per process, what may mislead in a dataset or a folder of images; opens no file.

    class_pixels: labeled pixels of each class, for classes that occur in no label map.
    """
    for finding in find(source, class_pixels):
        _show(finding.text)


def _show(text: str) -> None:
    notice(text)  # its place is always `show_findings`, and Python shows a warning of one place once


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
            result = survey(dataset)
    except StegoError as error:
        print(f"  {split}: MISSING or broken: " + str(error).replace("\n", "\n  "))
        return False
    counts = COUNTS.get(name, {}).get(split, ())
    remark = "" if not counts or len(dataset) in counts else f" (published: {' or '.join(f'{c:,}' for c in counts)})"
    sample = "" if result.looked == len(dataset) else f", of which {result.looked:,} were read"
    print(f"  {split}: {len(dataset):,} images{remark}{sample}")
    if dataset.has_labels:
        shares = 100 * result.classes / max(1, result.classes.sum())
        print(f"    labels: {shares[-1]:.1f} % of the pixels ignored")
        cells = [f"{n[:24]:<24} {share:5.1f} %" for n, share in zip(dataset.classes.names, shares, strict=False)]
        for row in range(0, len(cells), 3):
            print("      " + "   ".join(cells[row : row + 3]))
    else:
        print("    no labels: training and segmenting work, scores are left out")
    findings = find(dataset, survey=result)
    for finding in findings:
        print(f"    {'WRONG' if finding.misleads else 'note'}: {finding.text}")
    return not any(finding.misleads for finding in findings)
