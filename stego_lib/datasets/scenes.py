"""The default dataset `scenes`: synthetic images, drawn once by `painter` and stored in the layout of `folder`."""

from pathlib import Path

from PIL import Image

from ..utils.errors import StegoError
from ..utils.files import atomic_folder, read_json, write_json
from ..utils.progress import progress
from . import folder as own_folder
from . import painter
from .base import SegmentationDataset

# Images per split.
TRAIN, VAL = 300, 60
# Seeds of the dataset and of the training images of the embedded backbone.
SEED, PRETRAINING_SEED = 0, 1
# Colors of the classes in figures, suitable for color-blind readers (after Okabe and Ito).
COLORS = {
    "sky": (86, 180, 233), "water": (0, 114, 178), "meadow": (170, 200, 60), "wall": (150, 150, 150),
    "tree": (0, 140, 100), "house": (213, 94, 0), "ball": (204, 121, 167), "zebra": (40, 40, 40),
}  # fmt: skip


def load(name: str, root: Path, split: str) -> SegmentationDataset:
    """Opens root/scenes. If it is missing, draws it first, which takes about ten seconds."""
    folder = root / "scenes"
    if not folder.exists():
        draw_scenes(folder)
    about = folder / "drawn.json"
    if not about.exists() or read_json(about).get("painter") != painter.VERSION:
        raise StegoError(f"{folder} was drawn by another version of this project. Remove it to draw it again.")
    return own_folder.load(name, root, split)


def draw_scenes(folder: Path, train: int = TRAIN, val: int = VAL, size: int = painter.SIZE, series: int = SEED) -> None:
    """Draws `train` and `val` scenes of a series into `folder`, which appears when all are written."""
    with atomic_folder(folder) as unfinished:
        for kind in ("imgs", "labels", "depth"):
            for split in ("train", "val"):
                (unfinished / kind / split).mkdir(parents=True)
        for index in progress(range(train + val), "drawing scenes"):
            split = "train" if index < train else "val"
            arrays = painter.paint_with_distance(series, index, size)
            for kind, array in zip(("imgs", "labels", "depth"), arrays, strict=True):
                Image.fromarray(array).save(unfinished / kind / split / f"{index:04d}.png")
        write_json(unfinished / "classes.json", {"names": painter.CLASSES, "colors": list(COLORS.values())})
        about = {"about": "synthetic images, drawn by code", "painter": painter.VERSION, "seed": series, "size": size}
        write_json(unfinished / "drawn.json", about)
