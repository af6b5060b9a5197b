"""Potsdam-3: aerial images with three classes, as published (.mat files) or cut from the raw ISPRS tiles."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import scipy.io
from PIL import Image

from ..utils.errors import StegoError
from ..utils.files import read_text
from .base import IGNORED, SegmentationDataset
from .classes import Classes, Finding, refuse_ids
from .formats import Rules
from .images import StoredImage
from .layout import check_split, find_folder, list_images, pair_by_stem
from .potsdam_tiles import RAW_IMAGES, TILES, cut_tiles, tile_doubts

CLASSES = Classes(
    ("road and car", "building and clutter", "vegetation and tree"), ((90, 90, 100), (213, 94, 0), (0, 140, 100))
)
FINE_TO_COARSE = np.array([0, 1, 2, 2, 0, 1])
"""Stored id (road, building, low vegetation, tree, car, clutter) -> class."""
UNLABELED = 255
"""Stored id of pixels without a label."""
LISTS = {"train": "labeled_train.txt", "val": "labeled_test.txt", "all": "all.txt"}
LAYOUT = (
    "imgs/ID.mat, gt/ID.mat, labeled_train.txt, labeled_test.txt, all.txt (the published patches), "
    "or 2_Ortho_RGB/*_RGB.tif and 5_Labels_all/*_label.tif (the raw tiles)"
)
SOURCE = (
    "www.isprs.org, benchmark '2D Semantic Labeling Potsdam', after registration: 2_Ortho_RGB.zip and 5_Labels_all.zip (both "
    "in Potsdam.zip); or the published patches, potsdam.zip"
)


class Potsdam(SegmentationDataset):
    """Label maps hold six fine ids, which `decode` merges to three classes.

    Where some patches have a label map, those without one count as ignored throughout (in "all"), as in the published code.
    """

    rules = Rules(exif="ignore")

    @property
    def has_labels(self) -> bool:
        """Whether the label map exists."""
        return any(path is not None for path in self.labels)

    def stored(self, index: int, file: BinaryIO | None = None) -> np.ndarray | None:
        if self.labels[index] is None and self.has_labels:
            return np.full(self.read(index).rgb.size[::-1], UNLABELED)
        return super().stored(index, file)

    def doubts(self, ids: np.ndarray) -> list[Finding]:
        tiles = {path.parent.parent for path in self.images if path.suffix == ".png"}
        found = tile_doubts(sorted(tiles))
        if ids[4] > 1.5 * ids[2]:
            text = "id 4 (car) is more frequent than id 2 (low vegetation): are red and blue swapped in the label maps?"
            found.append(Finding(text, True))
        return found

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """255 and -1 are ignored, other ids than the six a StegoError; `published` makes all but 255 class 0, as published."""
        known = (stored >= 0) & (stored < len(FINE_TO_COARSE))
        if not self.published:
            release = f"Potsdam has ids 0 to {len(FINE_TO_COARSE) - 1}, and {UNLABELED} where ignored"
            refuse_ids(stored, known | np.isin(stored, (-1, UNLABELED)), release, {6: "Do ids start at 1? Subtract 1"})
        others = np.where(stored == UNLABELED, IGNORED, 0) if self.published else IGNORED
        return np.where(known, FINE_TO_COARSE[np.where(known, stored, 0)], others)


class PotsdamPatches(Potsdam):
    """The published patches: images and label maps in MATLAB files."""

    def read(self, index: int, file: BinaryIO | None = None) -> StoredImage:
        stored = read_mat(file or self.images[index], "img")
        if stored.ndim != 3 or stored.shape[2] < 3 or stored.dtype != np.uint8:
            raise StegoError(
                f"{self.images[index]}: 'img' is {stored.dtype} {stored.shape}, not uint8 (height, width, 3 or 4)"
            )
        rgb = Image.fromarray(np.ascontiguousarray(stored[..., :3]))  # the fourth is infrared
        return StoredImage(rgb, None, 1, None, "", False)

    def read_label(self, source: Path | BinaryIO) -> np.ndarray:
        return read_mat(source, "gt")


def open_potsdam3(root: str | Path, split: str) -> Potsdam:
    """Opens root/potsdam, root/potsdam3 or root itself; images are 200 x 200.

    Published patches: train is labeled_train.txt (4,545, on which the published code trains), val labeled_test.txt
    (855), "all" all.txt (8,550); there, the patches without a label map are ignored in scores, not class 0.

    Raw tiles: each 6000 x 6000 tile is shrunk by 2 and cut into 225 patches, once (see `potsdam_tiles`). The published
    split drew patches of 24 tiles at random, and under shuffled names, so it cannot be had again from raw tiles. Here
    whole tiles are held out, which is stricter: val is 4 of the same 24 tiles (900 patches), train the other 20 (4,500),
    "all" all 38. Say so beside scores. Raises DataNotFound, or StegoError for missing tiles and broken files.
    """
    check_split("potsdam3", split, tuple(LISTS))
    folder = find_folder(root, ("potsdam", "potsdam3"), ("imgs", RAW_IMAGES), LAYOUT, SOURCE)
    if not (folder / "imgs").exists():
        patches = cut_tiles(folder, TILES[split])
        images = [path for patch in patches for path in list_images(patch / "imgs")]
        stored = [path.parent.parent / "gt" / path.name for path in images]
        return Potsdam("potsdam3", split, CLASSES, images, [path if path.exists() else None for path in stored])
    ids = folder / LISTS[split]
    if not ids.exists():
        raise StegoError(f"{ids} is missing; it lists the patches of split {split}, one a line; {LAYOUT}")
    images = [folder / "imgs" / f"{name}.mat" for name in read_text(ids).split()]
    missing = [path for path in images if not path.exists()]
    if missing or not images:
        raise StegoError(
            f"{ids} lists {len(images)} patches, {len(missing)} are missing{f', the first is {missing[0]}' if missing else ''}"
        )
    if split == "all":
        labels = [path if path.exists() else None for path in (folder / "gt" / path.name for path in images)]
    else:
        labels = pair_by_stem(images, folder / "gt", ".mat")
    return PotsdamPatches("potsdam3", split, CLASSES, images, labels)


def read_mat(source: Path | BinaryIO, name: str) -> np.ndarray:
    """The array `name` of a MATLAB file (version 7 or older; no code is run); StegoError names a file that is broken."""
    path = source if isinstance(source, Path) else source.name
    try:
        return scipy.io.loadmat(source, variable_names=[name])[name]
    except Exception as error:  # the reader of this old format raises whatever it stumbles over
        raise StegoError(f"{path} cannot be read as a MATLAB file that holds {name!r} ({error}); replace it") from error
