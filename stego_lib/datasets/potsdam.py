"""Potsdam-3: aerial images with three classes, as published (.mat files) or cut from the raw ISPRS tiles."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..utils.errors import StegoError, check_choice, explained
from ..utils.files import atomic_folder, read_text
from ..utils.notices import notice
from ..utils.progress import progress
from .base import IGNORED, UNKNOWN, VOID, Sample, SegmentationDataset
from .classes import Classes, Rules
from .images import StoredImage, read_image
from .layout import check_files, find_folder, list_images, pair_by_stem

CLASSES = Classes(
    ("road and car", "building and clutter", "vegetation and tree"), ((90, 90, 100), (213, 94, 0), (0, 140, 100))
)
# Class of each stored id (road, building, low vegetation, tree, car, clutter), and its color in the raw label maps.
FINE_TO_COARSE = (0, 1, 2, 2, 0, 1)
COLORS = ((255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0))
# Share of pixels in a label tile with the color of no class, above which a notice is shown.
MAX_UNKNOWN = 0.01
# Folders of the raw images, the raw label maps, and the patches.
RAW_IMAGES, RAW_LABELS, PATCHES = "2_Ortho_RGB", "5_Labels_all", "patches"
# Downsampling factor of a tile, and side of a patch in pixels.
SHRINK, SIDE = 2, 200
# The 24 tiles whose labels the ISPRS benchmark published first, and the 4 of them that this project holds out, one from
# each part of the town.
LABELED = (
    *(f"{row}_{column}" for row in (2, 3, 4, 5) for column in (10, 11, 12)),
    *(f"{row}_{column}" for row in (6, 7) for column in range(7, 13)),
)
HELD_OUT = ("2_12", "4_11", "6_9", "7_10")
OTHERS = (
    *("2_13", "2_14", "3_13", "3_14", "4_13", "4_14", "4_15"),
    *("5_13", "5_14", "5_15", "6_13", "6_14", "6_15", "7_13"),
)
# Split -> tiles, and the published list of patches.
TILES = {
    "train": tuple(tile for tile in LABELED if tile not in HELD_OUT), "val": HELD_OUT, "all": (*LABELED, *OTHERS),
}  # fmt: skip
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
    """Label maps hold six ids, which are merged into three classes.

    In the split "all", patches without a label map are ignored, as in the authors' code.
    """

    rules = Rules(exif="ignore")
    expected_ids = "Potsdam has ids 0 to 5, and 255 where ignored. If ids start at 1, subtract 1"

    @property
    def has_labels(self) -> bool:
        """Whether any patch has a label map."""
        return any(path is not None for path in self.labels)

    def sample(self, index: int) -> Sample:
        sample = super().sample(index)
        if sample.label is None and self.has_labels:
            sample = replace(sample, label=torch.full(sample.image.shape[1:], IGNORED))
        return sample

    def label_table(self) -> np.ndarray:
        """`published` maps all unknown ids to class 0."""
        table = np.full(257, 0 if self.published else UNKNOWN)
        table[: len(FINE_TO_COARSE)] = FINE_TO_COARSE
        table[VOID] = IGNORED
        return table


class PotsdamPatches(Potsdam):
    """The published patches, in MATLAB files."""

    def read(self, index: int, content: bytes | None = None) -> StoredImage:
        stored = read_mat(self.images[index], "img")
        return StoredImage(Image.fromarray(np.ascontiguousarray(stored[..., :3])), None, 1)  # the fourth is infrared

    def read_label(self, path: Path, content: bytes) -> np.ndarray:
        return read_mat(path, "gt").astype(np.int64)


def read_mat(path: Path, name: str) -> np.ndarray:
    """Reads the array "img" or "gt" of a MATLAB file of version 7 or older."""
    import scipy.io

    problem = f"{path} is not a MATLAB file with {name!r}"
    with explained(Exception, problem, "Get it again."):  # scipy raises many types for a broken file
        return scipy.io.loadmat(path, variable_names=[name])[name]


def load(name: str, root: str | Path, split: str) -> Potsdam:
    """Opens root/potsdam, root/potsdam3 or root itself; images are 200 x 200.

    Published patches: train is labeled_train.txt (4,545 patches, used by the authors' code), val is labeled_test.txt
    (855), "all" is all.txt (8,550).

    Raw tiles: each 6000 x 6000 tile is downsampled by 2 and cut into 225 patches, once. The published split assigns
    random patches of 24 tiles, which raw tiles cannot reproduce. Here whole tiles are held out, which is stricter: val
    is 4 of these 24 tiles (900 patches), train the other 20 (4,500), "all" all 38.
    """
    check_choice("split", split, LISTS)
    folder = find_folder(root, ("potsdam", "potsdam3", "potsdam/potsdam"), ("imgs", RAW_IMAGES), LAYOUT, SOURCE)
    if (folder / "imgs").exists():
        check_files([folder / LISTS[split]], "lists of patches")
        images = [folder / "imgs" / f"{patch}.mat" for patch in read_text(folder / LISTS[split]).split()]
        check_files([*images], "patches")
        if split != "all":
            return PotsdamPatches(name, split, CLASSES, images, pair_by_stem(images, folder / "gt", ".mat"))
    else:
        images = [path for patches in cut_tiles(folder, TILES[split]) for path in list_images(patches / "imgs")]
    labels = [path.parent.parent / "gt" / path.name for path in images]
    kind = PotsdamPatches if (folder / "imgs").exists() else Potsdam
    return kind(name, split, CLASSES, images, [path if path.exists() else None for path in labels])


def cut_tiles(folder: Path, tiles: tuple[str, ...]) -> list[Path]:
    """Cuts tiles into patches unless they exist; returns the folders patches/TILE, which hold imgs/ and gt/."""
    todo = [tile for tile in tiles if not (folder / PATCHES / tile).exists()]
    check_files([_sources(folder, tile)[0] for tile in todo], "tiles")
    for tile in progress(todo, "cutting Potsdam tiles"):
        _cut_tile(folder, tile)
    return [folder / PATCHES / tile for tile in tiles]


def _sources(folder: Path, tile: str) -> tuple[Path, Path]:
    """Paths of the raw image and label map of a tile, which may be in a subfolder."""
    names = (RAW_IMAGES, f"top_potsdam_{tile}_RGB.tif"), (RAW_LABELS, f"top_potsdam_{tile}_label.tif")
    image, label = (next((folder / kind).rglob(name), folder / kind / name) for kind, name in names)
    return image, label


def decode_colors(colored: np.ndarray) -> np.ndarray:
    """Converts colors, uint8 (H, W, 3), to stored ids, uint8 (H, W); other colors become `VOID`."""
    ids = np.full(colored.shape[:2], VOID, np.uint8)
    for id_, color in enumerate(COLORS):
        ids[(colored == color).all(-1)] = id_
    return ids


def _cut_tile(folder: Path, tile: str) -> None:
    source, labels = _sources(folder, tile)
    # As in the published patches: the mean of 2 x 2 pixels, and the label of the top left one.
    image = read_image(source).rgb
    layers, sizes = {"imgs": np.asarray(image.reduce(SHRINK))}, {image.size}
    if labels.exists() or tile in LABELED:
        check_files([labels], "label tiles")
        label = read_image(labels).rgb
        colored = np.asarray(label)[::SHRINK, ::SHRINK]
        layers["gt"], sizes = decode_colors(colored), {image.size, label.size}
        black = (colored == 0).all(-1)  # boundaries in one version of the label maps
        if (unknown := ((layers["gt"] == VOID) & ~black).mean()) > MAX_UNKNOWN:
            notice(f"{labels}: {100 * unknown:.1f} % of the pixels have the color of no class and are ignored")
    if len(sizes) > 1 or image.width % (SHRINK * SIDE) or image.height % (SHRINK * SIDE):
        raise StegoError(f"{source} and its label map are {sizes}, not 6000 x 6000 pixels. Download them again.")
    with atomic_folder(folder / PATCHES / tile) as unfinished:
        for kind, layer in layers.items():
            (unfinished / kind).mkdir(parents=True)
            for row, column in np.ndindex(layer.shape[0] // SIDE, layer.shape[1] // SIDE):
                patch = layer[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
                Image.fromarray(patch).save(unfinished / kind / f"{tile}_{row:02d}_{column:02d}.png")
