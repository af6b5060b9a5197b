"""Cuts the raw ISPRS Potsdam tiles into the 200 x 200 patches of Potsdam-3, once."""

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..utils.errors import StegoError
from ..utils.files import read_json, write_json
from ..utils.progress import progress
from .classes import Finding
from .formats import Rules
from .images import read_image

RAW_IMAGES, RAW_LABELS, PATCHES = "2_Ortho_RGB", "5_Labels_all", "patches"
"""Folders of the raw images, the raw label maps, and what is made of them."""
AS_STORED = Rules(exif="ignore")
SHRINK, SIDE = 2, 200
"""Downsampling factor of a tile, and pixels per side of the patches it is cut into."""
COLORS = ((255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0))
"""Color of road, building, low vegetation, tree, car, clutter in the raw label maps; position = fine id."""
UNKNOWN = 255
"""Fine id of every other color."""
BLACK = (0, 0, 0)
"""Color of the ignored boundaries in the benchmark's label maps without boundaries."""
FEW, SOME, MOST = 0.01, 0.2, 0.5
"""Shares of a label tile: unknown colors that are reported, black that is reported, either that misleads."""
ABOUT = "about.json"

_LABELED = (
    *("2_10", "2_11", "2_12", "3_10", "3_11", "3_12", "4_10", "4_11", "4_12", "5_10", "5_11", "5_12"),
    *("6_7", "6_8", "6_9", "6_10", "6_11", "6_12", "7_7", "7_8", "7_9", "7_10", "7_11", "7_12"),
)
_OTHERS = (
    *("2_13", "2_14", "3_13", "3_14", "4_13", "4_14", "4_15"),
    *("5_13", "5_14", "5_15", "6_13", "6_14", "6_15", "7_13"),
)
_HELD_OUT = ("2_12", "4_11", "6_9", "7_10")
TILES = {
    "train": tuple(tile for tile in _LABELED if tile not in _HELD_OUT),
    "val": _HELD_OUT,
    "all": (*_LABELED, *_OTHERS),
}
"""Split -> tiles. The published 24 labeled tiles are those whose labels the ISPRS contest had made public; which four of
them are held out is this project's choice, one from each part of the town."""


def cut_tiles(folder: Path, tiles: tuple[str, ...]) -> list[Path]:
    """Cuts those of `tiles` that are not cut yet, or have changed since; returns the folder of each, patches/TILE with imgs/ and gt/.

    A tile's folder appears when all of it is written, so work that breaks off is taken up at the next tile. Raises
    StegoError for a tile that is missing, or whose size or label map does not fit.
    """
    wanted = [folder / PATCHES / tile for tile in tiles]
    todo = [path.name for path in wanted if not _up_to_date(folder, path)]
    missing = [name for name in map(_image_name, todo) if not (folder / RAW_IMAGES / name).exists()]
    if missing:
        raise StegoError(
            f"{folder / RAW_IMAGES}: {len(missing)} of the split's {len(tiles)} tiles are missing, the first is {missing[0]}"
        )
    for tile in progress(todo, "cutting Potsdam tiles"):
        _cut_tile(folder, tile)
    return wanted


def _sources(folder: Path, tile: str) -> tuple[Path, Path]:
    """The raw image and the raw label map of a tile, which may be missing."""
    return folder / RAW_IMAGES / _image_name(tile), folder / RAW_LABELS / f"top_potsdam_{tile}_label.tif"


def _state(folder: Path, tile: str) -> dict[str, list[int]]:
    """Size and time of change of a tile's files."""
    found = [path for path in _sources(folder, tile) if path.exists()]
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in found}


def _up_to_date(folder: Path, patches: Path) -> bool:
    """Whether a tile's patches were cut from its files as they are now; those whose raw tile was removed are."""
    if not patches.exists() or not _sources(folder, patches.name)[0].exists():
        return patches.exists()
    return _about(patches).get("files") == _state(folder, patches.name)


def _about(patches: Path) -> dict:
    return read_json(patches / ABOUT) if (patches / ABOUT).exists() else {}


def tile_doubts(patches: list[Path]) -> list[Finding]:
    """What label tiles hold besides the colors of the classes, worst first."""
    about = {path.name: _about(path) for path in patches}
    found = []
    for share, least, what in (("unknown", FEW, "colors that mean no class"), ("black", SOME, "black (no class)")):
        bad = sorted(
            ((one.get(share, 0), tile) for tile, one in about.items() if one.get(share, 0) > least), reverse=True
        )
        if bad:
            told = ", ".join(f"{tile} {100 * part:.1f} %" for part, tile in bad[:5]) + (", ..." if len(bad) > 5 else "")
            text = (
                f"{len(bad)} of {len(patches)} label tiles hold {what}, which are ignored: {told} of the pixels; was one "
                "resized, or saved as JPEG? get them again from the archive"
            )
            found.append(Finding(text, bad[0][0] > MOST))
    return found


def decode_colors(colored: np.ndarray) -> np.ndarray:
    """Colors, uint8 (H, W, 3) -> fine ids, uint8 (H, W); colors that mean nothing become `UNKNOWN`."""
    packed, known = _packed(colored), _packed(np.array(COLORS, np.uint8))
    found = np.full(packed.shape, UNKNOWN, np.uint8)
    for id_, color in enumerate(known):
        found[packed == color] = id_
    return found


def _packed(colors: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 -> (...) int32: one number for each color."""
    red, green, blue = np.moveaxis(colors.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def _image_name(tile: str) -> str:
    return f"top_potsdam_{tile}_RGB.tif"


def _cut_tile(folder: Path, tile: str) -> None:
    source, labels = _sources(folder, tile)
    about: dict[str, Any] = {"files": _state(folder, tile)}  # before they are read: what changes meanwhile is cut anew
    image = read_image(source, AS_STORED).rgb
    if image.width % (SHRINK * SIDE) or image.height % (SHRINK * SIDE):
        raise StegoError(f"{source} is {image.width} x {image.height}; a tile is 6000 x 6000 pixels")
    # The published patches were made alike: the mean of each 2 x 2 pixels, and of its labels the top left one.
    layers = {"imgs": np.asarray(image.reduce(SHRINK))}
    if labels.exists():
        colored = np.asarray(read_image(labels, AS_STORED).rgb)
        if colored.shape[:2] != (image.height, image.width):
            raise StegoError(f"{labels} and {source} differ in size; download them again")
        colored = colored[::SHRINK, ::SHRINK]
        layers["gt"] = decode_colors(colored)
        about["black"] = float((colored == BLACK).all(-1).mean())
        about["unknown"] = float((layers["gt"] == UNKNOWN).mean()) - about["black"]
    elif tile in _LABELED:
        other = sorted(path.name for path in labels.parent.glob(f"*_{tile}_*")) if labels.parent.is_dir() else []
        raise StegoError(
            f"label map {labels} is missing{f'; there is {other[0]}, of another release' if other else ''}"
        )
    (folder / PATCHES).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder / PATCHES, prefix=f".{tile}.") as temporary:
        unfinished = Path(temporary) / tile
        for kind, layer in layers.items():
            (unfinished / kind).mkdir(parents=True)
            for row in range(layer.shape[0] // SIDE):
                for column in range(layer.shape[1] // SIDE):
                    patch = layer[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
                    Image.fromarray(patch).save(unfinished / kind / f"{tile}_{row:02d}_{column:02d}.png")
        write_json(unfinished / ABOUT, about)
        with suppress(OSError):  # there may be none
            (folder / PATCHES / tile).rename(Path(temporary) / "old")
        try:
            unfinished.rename(folder / PATCHES / tile)
        except OSError:
            if not (folder / PATCHES / tile).exists():  # else: another process cut the same tile at the same time
                raise
