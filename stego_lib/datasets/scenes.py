"""`scenes`: the embedded default. Synthetic images, drawn once by `painter` and kept as a folder like your own."""

import shutil
import tempfile
from pathlib import Path

from PIL import Image

from ..utils.errors import StegoError
from ..utils.files import read_json, write_json
from ..utils.paths import user_path
from ..utils.progress import progress
from . import painter
from .base import SegmentationDataset
from .folder import open_folder

TRAIN, VAL = 300, 60
"""Images in each split."""
SEED = 0
"""Series that the dataset is drawn from."""
PRETRAINING_SEED = 1
"""Series that the embedded backbone was trained on; the dataset has none of its images."""
COLORS = {
    "sky": (86, 180, 233), "water": (0, 114, 178), "meadow": (170, 200, 60), "wall": (150, 150, 150),
    "tree": (0, 140, 100), "house": (213, 94, 0), "ball": (204, 121, 167), "zebra": (40, 40, 40),
}  # fmt: skip
"""Figure colors of the classes, distinct for color-blind readers (after Okabe and Ito)."""


def open_scenes(root: str | Path, split: str) -> SegmentationDataset:
    """Opens root/scenes, drawing it first if it is not there (about ten seconds)."""
    folder = user_path(root) / "scenes"
    if not folder.exists():
        draw_scenes(folder)
    drawn = read_json(folder / "drawn.json") if (folder / "drawn.json").exists() else {}
    if drawn.get("painter") != painter.VERSION:
        raise StegoError(f"{folder} was drawn by another version of this project; remove it, and it is drawn anew")
    return open_folder(folder, split, "scenes")


def draw_scenes(folder: Path, train: int = TRAIN, val: int = VAL, size: int = painter.SIZE, series: int = SEED) -> None:
    """Draws the first `train` and `val` scenes of a series, of `size` pixels, into `folder`, which appears when all is written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".scenes.") as temporary:
        unfinished = Path(temporary) / "scenes"
        for kind in ("imgs", "labels", "depth"):
            for split in ("train", "val"):
                (unfinished / kind / split).mkdir(parents=True)
        for index in progress(range(train + val), "drawing scenes"):
            split = "train" if index < train else "val"
            image, label, distance = painter.paint_with_distance(series, index, size)
            Image.fromarray(image).save(unfinished / "imgs" / split / f"{index:04d}.png")
            Image.fromarray(label).save(unfinished / "labels" / split / f"{index:04d}.png")
            Image.fromarray(distance).save(unfinished / "depth" / split / f"{index:04d}.png")
        names = painter.CLASSES
        write_json(unfinished / "classes.json", {"names": names, "colors": [COLORS[name] for name in names]})
        about = {"about": "synthetic images, drawn by code", "painter": painter.VERSION, "seed": series, "size": size}
        write_json(unfinished / "drawn.json", about)
        try:
            unfinished.rename(folder)
        except OSError:
            if not (folder / "drawn.json").exists():  # else: another process drew the same at the same time
                raise
            shutil.rmtree(unfinished)
