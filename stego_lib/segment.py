"""A folder of pictures in, label maps out."""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from .datasets.base import list_pictures, open_picture
from .errors import StegoError
from .files import atomic
from .paths import user_path
from .progress import progress
from .run import Run

NO_CLASS = 255
"""Stored id of pixels in a cluster that is matched to no class."""


def segment_folder(run: Run, pictures: str | Path, output: str | Path, opacity: float = 0.55) -> pd.DataFrame:
    """Segments every picture of a folder, at its own resolution.

    Writes output/labels/NAME.png (8-bit class ids in the colours of the classes, 255 = no class), output/overlays/NAME.jpg
    (the colours over the picture, `opacity` in [0, 1]) and output/areas.csv. Returns the table: one row a picture, the
    percentage of its pixels in each class. Pictures already done are done again. Raises StegoError for a folder without
    pictures, for two pictures of one name, and for a picture that cannot be read.
    """
    folder, output = user_path(pictures), user_path(output)
    if not folder.is_dir():
        raise StegoError(f"{folder.resolve()} is not a folder; name the folder that holds the pictures")
    paths = list_pictures(folder)
    if not paths:
        raise StegoError(f"{folder.resolve()} holds no pictures (.jpg, .png, ...)")
    stems = [path.stem for path in paths]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise StegoError(
            f"{folder}: several pictures are called {twice[0]}; their label maps would overwrite each other"
        )
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(run.classes)] = run.classes.colors
    palette[NO_CLASS] = 255
    rows = {}
    for path in progress(paths, "segmenting"):
        picture = open_picture(path)
        label = run.predict(picture)[0]
        stored = Image.fromarray(label)
        stored.putpalette(palette.tobytes())
        overlay = Image.blend(picture, Image.fromarray(palette[label]), opacity)
        for image, kind, suffix in ((stored, "labels", ".png"), (overlay, "overlays", ".jpg")):
            with atomic(output / kind / f"{path.stem}{suffix}") as temporary:
                image.save(temporary)
        share = np.bincount(label.ravel(), minlength=256) * 100 / label.size
        rows[path.name] = {name: share[i] for i, name in enumerate(run.classes.names)} | {"no class": share[NO_CLASS]}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("picture")
    with atomic(output / "areas.csv") as temporary:
        table.to_csv(temporary, float_format="%.2f", errors="surrogateescape")  # names may be no text
    return table
