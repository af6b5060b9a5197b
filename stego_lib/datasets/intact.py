"""Checks every image and label map before long work begins."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ..utils.errors import StegoError
from ..utils.progress import progress
from .base import SegmentationDataset
from .formats import REMEDY, fills, label_palette, value_range

TOLD = 5
"""Files that a message names; of further ones it states the number."""
DEEP = {".png", ".apng", ".tif", ".tiff", ".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c", ".pgm", ".ppm", ".pnm"}
"""Endings of files that may hold more than 8 bits per channel."""


@dataclass
class Survey:
    """What the files of a split hold, as counts."""

    looked: int
    """Images that were read."""
    size: int
    """Images of the split."""
    classes: np.ndarray
    """Pixels of each class, and last of those ignored, int64 (classes + 1,); zeros without labels."""
    ids: np.ndarray
    """Pixels of each stored id up to 255, int64 (256,)."""
    orientations: Counter[int] = field(default_factory=Counter)
    """Images of each EXIF orientation but 1."""
    depths: Counter[str] = field(default_factory=Counter)
    """Images of each depth but 8 bits per channel."""
    transparent: int = 0
    """Images with transparent pixels."""
    clear: list[str] = field(default_factory=list)
    """Names of images that are transparent all over."""
    flat: list[str] = field(default_factory=list)
    """Names of images that look like label maps."""
    flat_gray: int = 0
    """Those of them with one channel."""
    paged: list[str] = field(default_factory=list)
    """Names of files that hold more images than the first, which is read."""
    palette: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Color of each id in the label maps that have palettes."""
    recolored: set[int] = field(default_factory=set)
    """Ids to which label maps give different colors."""
    first: tuple[int, int] = (0, 0)
    """Height and width of the first image."""

    @property
    def maps(self) -> str:
        """How many label maps were read, for a message."""
        maps = f"{self.looked:,} label map{'s' * (self.looked > 1)}"
        return maps if self.looked == self.size else f"a sample of {maps}"

    def add(self, one: "Seen") -> None:
        """Counts an image and its label map."""
        self.classes += one.classes
        self.ids += one.ids
        self.orientations[one.orientation] += one.orientation in range(2, 9)
        self.depths[one.depth or ""] += one.depth is not None
        self.transparent += one.transparent > 0
        self.clear += [one.name] if one.transparent == 1 else []
        self.flat += [one.name] if one.flat else []
        self.flat_gray += one.flat == "gray"
        self.paged += [one.name] if one.paged else []
        self.recolored |= {id_ for id_, color in one.palette.items() if self.palette.setdefault(id_, color) != color}
        self.first = self.first if any(self.first) else one.size


@dataclass(frozen=True, eq=False)
class Seen:
    """What one image and its label map hold."""

    name: str
    size: tuple[int, int]
    classes: np.ndarray
    ids: np.ndarray
    orientation: int
    depth: str | None
    transparent: float
    """Share of its pixels."""
    flat: str
    paged: bool
    palette: dict[int, tuple[int, ...]]


def see(dataset: SegmentationDataset, row: int) -> Seen:
    """Reads image and label map `row`; StegoError for what cannot be used."""
    read, stored = dataset.read(row), dataset.stored(row)
    label = dataset.meaning(stored, row, read)
    last = len(dataset.classes)
    classes, ids = np.zeros(last + 1, int), np.zeros(256, int)
    if stored is not None and label is not None:
        found = label.numpy().ravel()
        classes = np.bincount(np.where(found < 0, last, found), minlength=last + 1)
        ids = np.bincount(stored[(stored >= 0) & (stored < 256)], minlength=256)
    colors = label_palette(dataset.labels[row]) if stored is not None else None
    palette = {int(id_): colors[id_] for id_ in np.flatnonzero(ids) if id_ < len(colors)} if colors else {}
    share = 0.0 if read.transparent is None else float(read.transparent.mean())
    name, size = dataset.images[row].name, read.rgb.size[::-1]
    return Seen(name, size, classes, ids, read.orientation, read.depth, share, read.flat, read.paged, palette)


def survey(dataset: SegmentationDataset, rows: Sequence[int] | None = None) -> Survey:
    """Reads every image and label map once, or those of `rows`, and counts what they hold.

    Raises one StegoError that lists the files which cannot be used. Reading is a few per cent of the work of a backbone,
    which would else end at the first such file, hours later. Of crops, the whole images are looked at.
    """
    dataset = getattr(dataset, "whole", dataset)
    rows = range(len(dataset)) if rows is None else rows
    refuse_depths(dataset)
    found = Survey(len(rows), len(dataset), np.zeros(len(dataset.classes) + 1, int), np.zeros(256, int))

    def look(row: int) -> Seen | str:
        try:
            return see(dataset, row)
        except StegoError as error:
            return str(error)

    faults = []
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        for one in progress(pool.map(look, rows), f"files of {dataset.name} {dataset.split}", total=len(rows)):
            if isinstance(one, Seen):
                found.add(one)
            else:
                faults.append(one)
    found.orientations, found.depths = +found.orientations, +found.depths  # without those that are nowhere
    if len(faults) > 1:
        more = f"\n  and {len(faults) - TOLD} more" if len(faults) > TOLD else ""
        listed = "".join(f"\n  {fault}" for fault in faults[:TOLD])
        raise StegoError(
            f"{len(faults)} of {len(rows)} images of {dataset.name} {dataset.split} cannot be used:{listed}{more}"
        )
    if faults:
        raise StegoError(faults[0])
    return found


def refuse_depths(dataset: SegmentationDataset) -> None:
    """StegoError if images of more than 8 bits per channel do not fill their range, with the range of all of them."""
    if dataset.rules.range is not None:
        return
    paths = [path for path in dataset.images if path.suffix.lower() in DEEP]
    with ThreadPoolExecutor() as pool:
        looked = zip(paths, pool.map(value_range, paths), strict=True)
        found = {path: one for path, one in looked if one}
    ranges = list(found.values())
    if any(not fills(*one) for one in ranges):
        depths = " and ".join(sorted({depth for depth, _, _ in ranges}))
        low, high = min(low for _, low, _ in ranges), max(high for _, _, high in ranges)
        raise StegoError(
            f"{len(ranges)} of {len(dataset)} images of {dataset.name} {dataset.split} (such as {min(found)}) hold {depths} values from {low:,g} to "
            f"{high:,g}, and nothing says which are black and white: {REMEDY}"
        )


def check_files(dataset: SegmentationDataset) -> None:
    """StegoError that lists the unusable files of a dataset. A dataset is checked once."""
    whole = getattr(dataset, "whole", dataset)
    if not whole.files_checked:
        survey(whole)
        whole.files_checked = True
