"""Potsdam-3: aerial images with three classes, as published (.mat files) or cut from the raw ISPRS tiles."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import scipy.io
from PIL import Image

from ..utils.errors import StegoError
from ..utils.files import read_text
from .base import IGNORED, UNKNOWN, SegmentationDataset
from .classes import Classes, Rules
from .images import Source, StoredImage
from .layout import check_files, check_split, find_folder, list_images, pair_by_stem
from .potsdam_tiles import RAW_IMAGES, TILES, cut_tiles, tile_doubt

CLASSES = Classes(
    ("road and car", "building and clutter", "vegetation and tree"), ((90, 90, 100), (213, 94, 0), (0, 140, 100))
)
# Stored id (road, building, low vegetation, tree, car, clutter) -> class.
FINE_TO_COARSE = (0, 1, 2, 2, 0, 1)
UNLABELED = 255
LISTS = {"train": "labeled_train.txt", "val": "labeled_test.txt", "all": "all.txt"}
LAYOUT = (
    "imgs/ID.mat, gt/ID.mat, labeled_train.txt, labeled_test.txt, all.txt (the published patches), "
    "or 2_Ortho_RGB/*_RGB.tif and 5_Labels_all/*_label.tif (the raw tiles)"
)
SOURCE = (
    "www.isprs.org, benchmark '2D Semantic Labeling Potsdam', after registration: 2_Ortho_RGB.zip and 5_Labels_all.zip "
    "(both in Potsdam.zip); or the published patches, potsdam.zip"
)


class Potsdam(SegmentationDataset):
    """Label maps hold six fine ids, which are merged to three classes.

    Where some patches have a label map, those without one count as ignored (split "all"), as in the authors' code.
    """

    rules = Rules(exif="ignore")
    release = "Potsdam has ids 0 to 5, and 255 where ignored. If ids start at 1, subtract 1"

    @property
    def has_labels(self) -> bool:
        """Whether any patch has a label map."""
        return any(path is not None for path in self.labels)

    def stored(self, index: int, file: BinaryIO | None = None) -> np.ndarray | None:
        if self.labels[index] is None and self.has_labels:
            return np.full(self.read(index).rgb.size[::-1], UNLABELED)
        return super().stored(index, file)

    def label_table(self) -> np.ndarray:
        """`published` makes all unknown ids class 0."""
        table = np.full(257, 0 if self.published else UNKNOWN)
        table[: len(FINE_TO_COARSE)] = FINE_TO_COARSE
        table[UNLABELED] = IGNORED
        return table

    def doubt(self, ids: np.ndarray) -> str:
        if ids[4] > 1.5 * ids[2]:
            return "id 4 (car) is more frequent than id 2 (low vegetation): are red and blue swapped in the label maps?"
        return tile_doubt(sorted({path.parent.parent for path in self.images if path.suffix == ".png"}))


class PotsdamPatches(Potsdam):
    """The published patches: images and label maps in MATLAB files."""

    def read(self, index: int, file: BinaryIO | None = None) -> StoredImage:
        stored = read_mat(file or self.images[index], "img")
        if stored.ndim != 3 or stored.shape[2] < 3 or stored.dtype != np.uint8:
            raise StegoError(f"{self.images[index]}: 'img' is not uint8 (height, width, 3 or 4). Get the file again.")
        return StoredImage(Image.fromarray(np.ascontiguousarray(stored[..., :3])), None, 1)  # the fourth is infrared

    def read_label(self, source: Source) -> np.ndarray:
        return read_mat(source, "gt").astype(np.int64)


def load(name: str, root: str | Path, split: str) -> Potsdam:
    """Opens root/potsdam, root/potsdam3 or root itself; images are 200 x 200.

    Published patches: train is labeled_train.txt (4,545, on which the authors' code trains), val labeled_test.txt
    (855), "all" all.txt (8,550); there, the patches without a label map are ignored in scores.

    Raw tiles: each 6000 x 6000 tile is shrunk by 2 and cut into 225 patches, once (see `potsdam_tiles`). The published
    split drew patches of 24 tiles at random, so raw tiles cannot give it. Here whole tiles are held out, which is
    stricter: val is 4 of the same 24 tiles (900 patches), train the other 20 (4,500), "all" all 38.
    """
    check_split(name, split, tuple(LISTS))
    folder = find_folder(root, ("potsdam", "potsdam3", "potsdam/potsdam"), ("imgs", RAW_IMAGES), LAYOUT, SOURCE)
    if not (folder / "imgs").exists():
        patches = cut_tiles(folder, TILES[split])
        images = [path for patch in patches for path in list_images(patch / "imgs")]
        stored = [path.parent.parent / "gt" / path.name for path in images]
        return Potsdam(name, split, CLASSES, images, [path if path.exists() else None for path in stored])
    check_files([folder / LISTS[split]], "lists of patches")
    images = [folder / "imgs" / f"{patch}.mat" for patch in read_text(folder / LISTS[split]).split()]
    check_files([*images], "patches")
    if split == "all":
        labels = [path if path.exists() else None for path in (folder / "gt" / path.name for path in images)]
    else:
        labels = pair_by_stem(images, folder / "gt", ".mat")
    return PotsdamPatches(name, split, CLASSES, images, labels)


def read_mat(source: Source, name: str) -> np.ndarray:
    """The array `name` of a MATLAB file (version 7 or older; no code is run)."""
    try:
        return scipy.io.loadmat(source, variable_names=[name])[name]
    except Exception as error:  # scipy raises a dozen types for a broken file
        path = getattr(source, "name", source) if not isinstance(source, Path) else source
        raise StegoError(f"{path} is no MATLAB file with an array {name!r} ({error}). Get it again.") from error
