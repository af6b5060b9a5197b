"""LabelMeFacade street photographs: 8 classes and void, in splits of this project by place. (Not in the paper.)"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from ..utils.errors import StegoError, check_choice
from .base import VOID, SegmentationDataset
from .classes import Classes, Rules
from .images import naming
from .layout import find_folder, list_images, pair_by_stem

# With the colors of the label maps.
CLASSES = Classes(
    ("building", "car", "door", "pavement", "road", "sky", "vegetation", "window"),
    (
        (128, 0, 0), (128, 0, 128), (128, 128, 0), (128, 128, 128),
        (128, 64, 0), (0, 128, 128), (0, 128, 0), (0, 0, 128),
    ),
)  # fmt: skip
# Color of pixels without a class ("various").
VOID_COLOR = (0, 0, 0)
# Words in the names of places that are in val and in test; the others are in train. The name of an image begins with
# its place, followed by "__". Places of one region, such as Greater Boston or Mallorca, are in the same split, as are
# Boston, Paris and the two collections with photographs of both. The 27 regions were randomly assigned with
# probabilities 0.6, 0.2 and 0.2, by the first seed that gives 60, 20 and 20 % of the images within 1 % and at least
# five regions per split, without looking at scores.
VAL = ("barcelona", "bolivia", "budapest", "cambridge_uk", "coruna", "galicia", "italy", "sarasota", "tinyimages")
TEST = (
    *("benavente", "gerona", "madrid", "mallorca", "montana", "newyork", "palafrugel", "palma", "pittsburgh"),
    *("village_outdoor", "wuhan"),
)
COMMIT = "a0dbc272351f9d6914805fbba62d75740308f52f"
LAYOUT = "images/*.jpg and labels/*.png (colors of the classes)"
SOURCE = "the repository cvjena/labelmefacade on GitHub (no registration, 113 MB; non-commercial research only)"


class LabelMeFacade(SegmentationDataset):
    """Label maps hold colors."""

    rules = Rules(exif="ignore")  # label maps match the stored pixels

    def read_label(self, path: Path, content: bytes) -> np.ndarray:
        """Converts the colors of a label map to ids, int64 (H, W)."""
        with naming(f"label map {path}"), Image.open(io.BytesIO(content), formats=("PNG",)) as file:
            colors = np.asarray(file.convert("RGB"))
            ids = np.full(colors.shape[:2], -1)
            for id_, color in ((VOID, VOID_COLOR), *enumerate(self.classes.colors)):
                ids[(colors == color).all(-1)] = id_
            if (ids < 0).any():
                unknown = tuple(colors[ids < 0][0].tolist())
                raise StegoError(f"contains color {unknown}, which no class has. Download the file again.")
        return ids


def split_of(image: Path) -> str:
    """The split of an image, by its place."""
    place = image.stem.partition("__")[0]
    return next((split for split, words in (("val", VAL), ("test", TEST)) if any(w in place for w in words)), "train")


def load(name: str, root: str | Path, split: str) -> LabelMeFacade:
    """Opens root/labelmefacade or root itself; splits train (569), val (196), test (180)."""
    check_choice("split", split, ("train", "val", "test"))
    folder = find_folder(root, (name, f"{name}/{name}-{COMMIT}"), ("images",), LAYOUT, SOURCE)
    images = [image for image in list_images(folder / "images") if split_of(image) == split]
    return LabelMeFacade(name, split, CLASSES, images, pair_by_stem(images, folder / "labels"))
