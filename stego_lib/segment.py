"""A folder of images in, label maps out."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .annotations.formats import PNG, WRITERS, chosen_formats
from .datasets.check import show_findings
from .datasets.classes import Classes, Rules, distinct_names, read_classes, without_names
from .datasets.images import BROKEN, StoredImage, read_image
from .datasets.layout import checksum_of, list_images
from .run import NOTHING, Run
from .utils.errors import StegoError
from .utils.files import atomic, fingerprint
from .utils.notices import notice
from .utils.paths import shown_path, user_path
from .utils.progress import progress, say

LONGEST_JPEG = 65_500
"""Pixels per side of the largest JPEG that can be written."""
STRIP = 256
"""Rows of an image that are colored at once."""
INDEX = "image"
"""Column of areas.csv with the file names."""
THREADS = 2
"""Threads that read, and as many that write: the backbone needs the cores."""
AHEAD = 4
"""Images that are read ahead at most, and as many that wait to be written."""
LARGE = 8_000_000
"""Pixels of an image after which the next ones are read and written one at a time, to save memory."""
SOURCE = "stego_lib"
"""Text in a label map's PNG that says what it was made from, see `_source`."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def segment_folder(
    run: Run, images: str | Path, output: str | Path, opacity: float = 0.55, format: str | Sequence[str] = PNG
) -> pd.DataFrame:
    """Segments every image of a folder, at its own resolution.

    Writes output/labels/NAME.png (8-bit palette PNG of the ids of `Run.predict`, in the colors of `Run.segments`; 255 where the
    image is transparent or a cluster was dropped), output/overlays/NAME.jpg (the colors over the image) and output/areas.csv;
    then the annotations that `format` names, made from the label maps. The names are those of `Run.name_segments`.

    It may be interrupted and called again: images whose label map was made from the same file, by the same run and settings,
    are not segmented again; a line says how many these are. To segment all again, remove output/labels.

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
    format
        "png", or one or several of these, which are written beside it:

        * "coco-panoptic": panoptic.json and panoptic/NAME.png, one segment of each name an image;
        * "coco-instances": instances.json for pycocotools. Every connected region is an instance. Connected regions are not
          objects: two cars that touch are one instance, a car behind a pole is two;
        * "labelme": labelme/NAME.json, polygons of connected regions, each simplified by at most a pixel. Holes are covered by
          the polygons that lie in them, because the largest polygons come first;
        * "geotiff": geotiff/NAME.tif with the georeference of a GeoTIFF image.

        In COCO's files, category = id in the label map + 1.

    Returns
    -------
    pandas.DataFrame
        One row per image, one column per segment: its percentage of the pixels that belong to one (NaN without any).
        Rows sum to 100. Columns are the names of `Run.segments`; equal names are followed by their id.

    Raises
    ------
    StegoError
        For a folder without images, two images of one name, an opacity out of range, an unknown format or a package that it
        needs, an output folder with other label maps, and if no image can be read. A notice counts single images that cannot.

    Examples
    --------
    >>> table = segment_folder(load_run("runs/my_run"), "my_images", "my_segments", format=("coco-instances", "labelme"))
    """
    if isinstance(opacity, bool) or not isinstance(opacity, int | float) or not 0 <= opacity <= 1:
        raise StegoError(f"opacity = {opacity!r}: it is a number from 0 (the image alone) to 1 (the colors alone)")
    folder, output = user_path(images), user_path(output)
    paths = _images_of(folder)
    formats = chosen_formats(format, paths)
    run.check_fitted()
    _refuse_other_labels(output, paths)
    segments = run.segments
    if not run.matched and without_names(segments) and not without_names(run.classes):
        notice(
            f"{shown_path(run.folder)} was not scored with labels, so its segments are clusters without names; "
            "evaluate(run) matches them to classes, and run.name_segments names them"
        )
    rules = read_classes(folder / "classes.json", run.classes).rules  # of these images, else of the training images
    show_findings(folder)
    work = _Work(output, segments, opacity, rules, _settings(run, segments, opacity, rules))
    rows = _segment(run, paths, work)
    for name in formats:
        writer = WRITERS[name](output, segments)
        done = [path for path in paths if path.name in rows]
        for path, label in zip(done, progress(_in_order(work.label, done), name, total=len(done)), strict=True):
            assert label is not None, f"{work.label_path(path)} was removed meanwhile"
            writer.add(path, label)
        writer.finish()
    table = pd.DataFrame.from_dict(rows, orient="index", columns=distinct_names(segments.names, [INDEX])).rename_axis(
        INDEX
    )
    with atomic(output / "areas.csv") as temporary:
        table.to_csv(temporary, float_format="%.2f", encoding="utf-8", errors="surrogateescape")  # names may be no text
    return table


def _segment(run: Run, paths: list[Path], work: "_Work") -> dict[str, np.ndarray]:
    """Segments the images that were not, in order; the areas of each by file name. Reading and writing run beside it."""
    rows: dict[str, np.ndarray] = {}
    broken, rotated, kept, begun = [], 0, 0, time.perf_counter()
    writing: deque[Future[None]] = deque()
    with ThreadPoolExecutor(THREADS, "writing") as pool:
        for path, found in zip(
            paths, progress(_in_order(work.read, paths), "segmenting", total=len(paths)), strict=True
        ):
            if isinstance(found, StegoError):
                broken.append(str(found))
                continue
            if isinstance(found, np.ndarray):
                rows[path.name] = found
                kept += 1
                continue
            rotated += found.orientation > 1 and work.rules.exif != "ignore"
            label = run.predict(found.rgb)
            if found.transparent is not None:
                label[found.transparent] = NOTHING
            rows[path.name] = _areas(label, len(work.segments))
            writing.append(pool.submit(work.write, path, found.rgb, label))
            while writing and (len(writing) > AHEAD or label.size > LARGE):
                writing.popleft().result()
        while writing:
            writing.popleft().result()
    seconds, fresh = time.perf_counter() - begun, len(rows) - kept
    if broken and not rows:
        raise StegoError(broken[0])
    if broken:
        notice(f"{len(broken)} of {len(paths)} images are left out, for they cannot be read; the first: {broken[0]}")
    if rotated:
        notice(
            f"{rotated} of {len(paths)} images are turned upright as their EXIF data say, and so are their label maps; to leave "
            f'them as stored, write {{"exif": "ignore"}} into {shown_path(paths[0].parent / "classes.json")}'
        )
    told = (
        [f"{fresh} images segmented in {seconds:.1f} s, {fresh / max(seconds, 1e-9):.1f} images per second"]
        if fresh
        else []
    )
    told += [f"{kept} were segmented before by this run with these settings, and are kept"] if kept else []
    say("; ".join(told))
    return rows


@dataclass(frozen=True, eq=False)
class _Work:
    """What threads need to read and to write one image."""

    output: Path
    segments: Classes
    opacity: float
    rules: Rules
    settings: str
    """Fingerprint of all that a label map depends on, but the image."""

    def label_path(self, image: Path) -> Path:
        """Where the label map of an image goes."""
        return self.output / "labels" / f"{image.stem}.png"

    def read(self, path: Path) -> StoredImage | np.ndarray | StegoError:
        """The image; its areas if it was segmented before; or why it cannot be read."""
        try:
            label = self.label(path)
            if label is not None and (self.output / "overlays" / f"{path.stem}.jpg").exists():
                return _areas(label, len(self.segments))
            return read_image(path, self.rules)
        except StegoError as error:
            return error

    def label(self, path: Path) -> np.ndarray | None:
        """The label map of an image, uint8 (H, W), if it was made from this file by this run and these settings."""
        try:
            with Image.open(self.label_path(path), formats=["PNG"]) as file:
                return np.array(file) if file.info.get(SOURCE) == self.source(path) and file.mode == "P" else None
        except BROKEN:  # missing, or not a file of ours
            return None

    def source(self, path: Path) -> str:
        """Fingerprint of all that the label map and the overlay of an image depend on; it is written into the label map."""
        return fingerprint(self.settings, checksum_of(path))

    def write(self, path: Path, image: Image.Image, label: np.ndarray) -> None:
        """Writes overlay, then label map. The colors are laid over `image` in place, strip by strip, to save memory."""
        palette = np.full((256, 3), 255, np.uint8)
        palette[: len(self.segments)] = self.segments.colors
        for top in range(0, len(label), STRIP):
            colors = Image.fromarray(palette[label[top : top + STRIP]])
            below = image.crop((0, top, colors.width, top + colors.height))
            image.paste(Image.blend(below, colors, self.opacity), (0, top))
        image.thumbnail((LONGEST_JPEG, LONGEST_JPEG))
        with atomic(self.output / "overlays" / f"{path.stem}.jpg") as temporary:
            image.save(temporary)
        stored, about = Image.fromarray(label), PngInfo()
        stored.putpalette(palette.tobytes())
        about.add_text(SOURCE, self.source(path))
        with atomic(self.label_path(path)) as temporary:
            stored.save(temporary, pnginfo=about)


def _settings(run: Run, segments: Classes, opacity: float, rules: Rules) -> str:
    """Fingerprint of weights, names and settings."""
    experiment, weights = run.experiment, sorted(run.model.state_dict().items())
    fields = [
        getattr(experiment, name) for name in ("eval_size", "mirror", "published", "features", "block", "precision")
    ]
    about = [segments.names, segments.colors, float(opacity), repr(rules)]
    return fingerprint(
        run.backbone.weights_id, run._ids.tolist(), [list(pair) for pair in weights], [repr(f) for f in fields], about
    )


def _in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of each item, computed in threads `AHEAD` items ahead; one item ahead after an image above `LARGE`."""
    todo, coming = iter(items), deque[Future[Result]]()
    ahead = 1  # the first may be large
    with ThreadPoolExecutor(THREADS, "reading") as pool:
        try:
            while True:
                while len(coming) < ahead and (item := next(todo, None)) is not None:
                    coming.append(pool.submit(function, item))
                if not coming:
                    return
                result = coming.popleft().result()
                ahead = 1 if _pixels(result) > LARGE else AHEAD
                yield result
        finally:
            for one in coming:
                one.cancel()


def _pixels(result: object) -> int:
    """Pixels of an image or a label map, 0 for anything else."""
    if isinstance(result, StoredImage):
        return result.rgb.width * result.rgb.height
    return result.size if isinstance(result, np.ndarray) else 0


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
