"""A folder of images in, label maps out."""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from .datasets.findings import show_findings
from .datasets.folder import distinct_names, read_classes, without_names
from .datasets.images import read_image
from .datasets.layout import list_images
from .run import NOTHING, Run
from .runtime.errors import StegoError
from .runtime.files import atomic
from .runtime.notices import notice
from .runtime.paths import shown_path, user_path
from .runtime.progress import progress

LONGEST_JPEG = 65_500
"""Pixels per side of the largest JPEG that can be written."""
STRIP = 256
"""Rows of an image that are colored at once."""
INDEX = "image"
"""Column of areas.csv with the file names."""


def segment_folder(run: Run, images: str | Path, output: str | Path, opacity: float = 0.55) -> pd.DataFrame:
    """Segments every image of a folder, at its own resolution.

    Writes output/labels/NAME.png (8-bit palette PNG of the ids of `Run.predict`, in the colors of `Run.segments`; 255 where the
    image is transparent), output/overlays/NAME.jpg (the colors over the image) and output/areas.csv. Images that were
    segmented before are segmented again.

    Parameters
    ----------
    run
        The trained run. If it was evaluated, its segments are classes; else they are clusters, and a notice says so.
    images
        Folder with the images; its subfolders are not searched, and a notice names what is left out.
    output
        Folder for the results.
    opacity
        Of the colors in the overlays, 0 to 1.

    Returns
    -------
    pandas.DataFrame
        One row per image, one column per segment: its percentage of the pixels that are not transparent (NaN without any).
        Rows sum to 100. Columns are the names of `Run.segments`; equal names are followed by their id.

    Raises
    ------
    StegoError
        For a folder without images, two images of one name, an opacity out of range, an output folder with other label maps,
        and if no image can be read. A notice counts single images that cannot.

    Examples
    --------
    >>> table = segment_folder(load_run("runs/my_run"), "my_images", "my_segments")
    """
    if isinstance(opacity, bool) or not isinstance(opacity, int | float) or not 0 <= opacity <= 1:
        raise StegoError(f"opacity = {opacity!r}: it is a number from 0 (the image alone) to 1 (the colors alone)")
    folder, output = user_path(images), user_path(output)
    paths = _images_of(folder)
    run.refuse_unfitted()
    _refuse_other_labels(output, paths)
    segments = run.segments
    if not run.matched and not without_names(run.classes):
        notice(
            f"{shown_path(run.folder)} was not scored with labels, so its segments are clusters without names; "
            "evaluate(run) matches them to classes"
        )
    palette = np.full((256, 3), 255, np.uint8)
    palette[: len(segments)] = segments.colors
    rules = read_classes(folder / "classes.json", run.classes).rules  # of these images, else of the training images
    show_findings(folder, rules=rules)
    rows, rotated, broken = {}, 0, []
    for path in progress(paths, "segmenting"):
        try:
            read = read_image(path, rules)
        except StegoError as error:
            broken.append(str(error))
            continue
        rotated += read.orientation > 1 and rules.exif != "ignore"
        label = run.predict(read.rgb)
        if read.transparent is not None:
            label[read.transparent] = NOTHING
        rows[path.name] = _areas(label, len(segments))
        _write(output, path.stem, read.rgb, label, palette, opacity)
    if broken and not rows:
        raise StegoError(broken[0])
    if broken:
        notice(f"{len(broken)} of {len(paths)} images are left out, for they cannot be read; the first: {broken[0]}")
    if rotated:
        notice(
            f"{rotated} of {len(paths)} images are turned upright as their EXIF data say, and so are their label maps; to leave "
            f'them as stored, write {{"exif": "ignore"}} into {shown_path(folder / "classes.json")}'
        )
    table = pd.DataFrame.from_dict(rows, orient="index", columns=distinct_names(segments.names, [INDEX])).rename_axis(INDEX)
    with atomic(output / "areas.csv") as temporary:
        table.to_csv(temporary, float_format="%.2f", encoding="utf-8", errors="surrogateescape")  # names may be no text
    return table


def _images_of(folder: Path) -> list[Path]:
    """The images of a folder. Raises StegoError for none, and for two whose results would have one name."""
    if not folder.is_dir():
        raise StegoError(f"{folder.resolve()} is not a folder; name the folder that holds the images")
    paths = list_images(folder)
    if not paths:
        raise StegoError(f"{folder.resolve()} holds no images (.jpg, .png, ...)")
    stems = [path.stem for path in paths]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise StegoError(f"{folder}: several images are called {twice[0]}; their label maps would overwrite each other")
    return paths


def _refuse_other_labels(output: Path, paths: list[Path]) -> None:
    """StegoError if output/labels holds label maps of these names from elsewhere: ground truth, say."""
    if (output / "overlays").is_dir():  # written first
        return
    there = [path.stem for path in paths if (output / "labels" / f"{path.stem}.png").exists()]
    if there:
        raise StegoError(
            f"{output / 'labels'} holds {there[0]}.png already, which was not made by segmenting; name another output folder"
        )


def _areas(label: np.ndarray, count: int) -> np.ndarray:
    """Percentage of each of `count` ids among the pixels that have one, float64 (count,); NaN if none has."""
    pixels = np.zeros(256)
    for top in range(0, len(label), STRIP):
        pixels += np.bincount(label[top : top + STRIP].ravel(), minlength=256)
    pixels = pixels[:count]
    return 100 * pixels / (pixels.sum() or np.nan)


def _write(
    output: Path, stem: str, image: Image.Image, label: np.ndarray, palette: np.ndarray, opacity: float
) -> None:
    """Writes overlay and label map. The colors are laid over `image` in place, strip by strip, to save memory."""
    for top in range(0, len(label), STRIP):
        colors = Image.fromarray(palette[label[top : top + STRIP]])
        below = image.crop((0, top, colors.width, top + colors.height))
        image.paste(Image.blend(below, colors, opacity), (0, top))
    image.thumbnail((LONGEST_JPEG, LONGEST_JPEG))
    with atomic(output / "overlays" / f"{stem}.jpg") as temporary:
        image.save(temporary)
    stored = Image.fromarray(label)
    stored.putpalette(palette.tobytes())
    with atomic(output / "labels" / f"{stem}.png") as temporary:
        stored.save(temporary)
