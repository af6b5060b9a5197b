"""Cuts the raw ISPRS Potsdam tiles into the 200 x 200 patches of Potsdam-3, once."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..utils.errors import StegoError
from ..utils.files import read_json, write_json
from ..utils.progress import progress
from .images import read_image
from .layout import check_files

# Folders of the raw images, the raw label maps, and the patches.
RAW_IMAGES, RAW_LABELS, PATCHES = "2_Ortho_RGB", "5_Labels_all", "patches"
# Downsampling factor of a tile, and pixels per side of a patch.
SHRINK, SIDE = 2, 200
# Color of road, building, low vegetation, tree, car, clutter in the raw label maps; position = fine id.
COLORS = ((255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0))
# Fine id of every other color.
UNKNOWN = 255
# Shares of the pixels of a label tile that are reported: colors of no class, and black, which the benchmark's label
# maps without boundaries hold.
MAX_UNKNOWN, MAX_BLACK = 0.01, 0.2
ABOUT = "about.json"

LABELED = (
    *("2_10", "2_11", "2_12", "3_10", "3_11", "3_12", "4_10", "4_11", "4_12", "5_10", "5_11", "5_12"),
    *("6_7", "6_8", "6_9", "6_10", "6_11", "6_12", "7_7", "7_8", "7_9", "7_10", "7_11", "7_12"),
)
HELD_OUT = ("2_12", "4_11", "6_9", "7_10")
# Split -> tiles. The 24 labeled tiles are those whose labels the ISPRS contest had made public. Which four of them are
# held out is this project's choice: one from each part of the town.
TILES = {
    "train": tuple(tile for tile in LABELED if tile not in HELD_OUT),
    "val": HELD_OUT,
    "all": (
        *(*LABELED, "2_13", "2_14", "3_13", "3_14", "4_13", "4_14", "4_15"),
        *("5_13", "5_14", "5_15", "6_13", "6_14", "6_15", "7_13"),
    ),
}


def cut_tiles(folder: Path, tiles: tuple[str, ...]) -> list[Path]:
    """Cuts those of `tiles` that are not cut yet, or changed since; returns the folder of each, patches/TILE.

    A tile's folder, with imgs/ and gt/, appears when all of it is written.
    """
    patches = [folder / PATCHES / tile for tile in tiles]
    todo = [path.name for path in patches if not _up_to_date(folder, path)]
    check_files([_sources(folder, tile)[0] for tile in todo], "tiles")
    for tile in progress(todo, "cutting Potsdam tiles"):
        _cut_tile(folder, tile)
    return patches


def _sources(folder: Path, tile: str) -> tuple[Path, Path]:
    """The raw image and the raw label map of a tile, which may be missing; archives hold them in a folder or not."""
    names = (RAW_IMAGES, f"top_potsdam_{tile}_RGB.tif"), (RAW_LABELS, f"top_potsdam_{tile}_label.tif")
    image, label = (next((folder / kind).rglob(name), folder / kind / name) for kind, name in names)
    return image, label


def _state(folder: Path, tile: str) -> dict[str, list[int]]:
    """Size and time of change of a tile's files."""
    paths = [path for path in _sources(folder, tile) if path.exists()]
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def _up_to_date(folder: Path, patches: Path) -> bool:
    """Whether patches were cut from the tile's files as they are now, or the raw tile was removed since."""
    if not patches.exists() or not _sources(folder, patches.name)[0].exists():
        return patches.exists()
    return read_json(patches / ABOUT)["files"] == _state(folder, patches.name)


def tile_doubt(patches: list[Path]) -> str:
    """Which label tiles hold other colors than those of the classes, or ""."""
    bad = []
    for path in patches:
        about = read_json(path / ABOUT)
        if about.get("unknown", 0) > MAX_UNKNOWN or about.get("black", 0) > MAX_BLACK:
            bad.append(f"{path.name} {100 * (about['unknown'] + about['black']):.1f} %")
    text = f"{len(bad)} label tiles hold colors of no class, which are ignored: {', '.join(bad[:5])} of the pixels"
    return f"{text}; was one resized, or saved as JPEG?" if bad else ""


def decode_colors(colored: np.ndarray) -> np.ndarray:
    """Colors, uint8 (H, W, 3) -> fine ids, uint8 (H, W), `UNKNOWN` for other colors."""
    ids = np.full(colored.shape[:2], UNKNOWN, np.uint8)
    for id_, color in enumerate(COLORS):
        ids[(colored == color).all(-1)] = id_
    return ids


def _cut_tile(folder: Path, tile: str) -> None:
    source, labels = _sources(folder, tile)
    about: dict[str, Any] = {"files": _state(folder, tile)}  # first: what changes while it is read is cut again
    image = read_image(source).rgb
    if image.width % (SHRINK * SIDE) or image.height % (SHRINK * SIDE):
        raise StegoError(f"{source} is {image.width} x {image.height}. A tile has 6000 x 6000 pixels; get it again.")
    # As in the published patches: the mean of each 2 x 2 pixels, and the top left of their labels.
    layers = {"imgs": np.asarray(image.reduce(SHRINK))}
    if labels.exists() or tile in LABELED:
        check_files([labels], "label tiles")
        colored = np.asarray(read_image(labels).rgb)
        if colored.shape[:2] != (image.height, image.width):
            raise StegoError(f"{labels} and {source} differ in size. Get both again.")
        colored = colored[::SHRINK, ::SHRINK]
        layers["gt"] = decode_colors(colored)
        about["black"] = float((colored == 0).all(-1).mean())
        about["unknown"] = float((layers["gt"] == UNKNOWN).mean()) - about["black"]
    target = folder / PATCHES / tile
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{tile}.") as temporary:
        unfinished = Path(temporary) / tile
        for kind, layer in layers.items():
            (unfinished / kind).mkdir(parents=True)
            for row in range(layer.shape[0] // SIDE):
                for column in range(layer.shape[1] // SIDE):
                    patch = layer[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
                    Image.fromarray(patch).save(unfinished / kind / f"{tile}_{row:02d}_{column:02d}.png")
        write_json(unfinished / ABOUT, about)
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
