"""A folder of images in, label maps out."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from .annotations.formats import PNG, WRITERS, chosen_formats
from .annotations.names import NOTHING
from .annotations.outputs import OutputFolder
from .datasets.classes import Classes, Rules, distinct_names, read_classes, without_names
from .datasets.findings import show_findings
from .datasets.images import StoredImage, read_image
from .datasets.layout import checksum_of, list_images
from .run import Run
from .utils.errors import StegoError
from .utils.files import fingerprint
from .utils.notices import notice
from .utils.paths import shown_path, user_path
from .utils.progress import progress, say
from .utils.threads import in_threads

# Pixels per side of the largest JPEG.
MAX_JPEG_SIDE = 65_500
# Column of areas.csv with the file names.
INDEX = "image"


def segment_folder(
    run: Run,
    images: str | Path,
    output: str | Path,
    opacity: float = 0.55,
    format: str | Sequence[str] = PNG,
    *,
    overwrite: bool = False,
) -> pd.DataFrame:
    """Segments every image of a folder, at its own resolution.

    Writes output/labels/NAME.png (8-bit palette PNG of the ids of `Run.predict`, 255 for none),
    output/overlays/NAME.jpg (the colors over the image), output/areas.csv, and the annotations that
    `format` names. Segments have the names and colors of `Run.segments`.

    It may be interrupted and called again: images whose results were made from the same file, by the same run and
    settings, are not segmented again. output/origin.txt records the source and the checksum of every file.

    Parameters
    ----------
    run
        The trained run. If it was evaluated, segments are classes; otherwise they are clusters, and a notice says so.
    images
        Folder with the images; its subfolders are not searched.
    output
        Folder for the results.
    opacity
        Of the colors in the overlays, 0 to 1.
    format
        "png", or one or several of

        * "coco-panoptic": panoptic.json and panoptic/NAME.png, one segment of each name per image;
        * "coco-instances": instances.json. Every connected region is an instance: two cars that touch are one, a car
          behind a pole is two;
        * "labelme": labelme/NAME.json, polygons of connected regions, each simplified by at most a pixel;
        * "geotiff": geotiff/NAME.tif with the georeference of the image.
    overwrite
        Replace files in `output` that this function did not write, or that were changed since.

    Returns
    -------
    pandas.DataFrame
        One row per image, one column per segment: its percentage of the pixels that belong to one (NaN without any).
        Equal names of segments are followed by their id.

    Raises
    ------
    StegoError
        For a folder without readable images, two images of one name, an opacity out of range, an unknown format or
        missing package, and a file in `output` that would be overwritten. A notice counts single unreadable images.

    Examples
    --------
    >>> table = segment_folder(run, "my_images", "my_segments", format=("coco-instances", "labelme"))
    """
    if not 0 <= opacity <= 1:
        raise StegoError(f"opacity={opacity!r} must be between 0 (image alone) and 1 (colors alone).")
    folder, out = user_path(images), OutputFolder(user_path(output), overwrite)
    paths = _images_of(folder)
    run.check_fitted()
    segments = run.segments
    writers = [WRITERS[name](out, segments) for name in chosen_formats(format)]
    targets = [name(path) for path in paths for name in (_label_name, _overlay_name, *(w.file for w in writers))]
    out.check(filter(None, [*targets, "areas.csv", *(w.summary for w in writers)]), paths)
    rules = read_classes(folder / "classes.json", run.classes).rules  # of these images, else of the training images
    show_findings(folder)
    if not run.matched and without_names(segments) and not without_names(run.classes):
        notice(
            f"{shown_path(run.folder)} was not scored with labels, so its segments are clusters without names. "
            "evaluate(run) matches them to classes, and run.name_segments names them."
        )

    settings = _settings(run, segments, opacity, rules)
    sources = {path: fingerprint(settings, checksum_of(path)) for path in paths}
    areas = _segment(run, sources, out, opacity, rules)
    done = [path for path in paths if path.name in areas]
    everything = fingerprint(*(sources[path] for path in done))
    for writer in writers:
        for path in progress(done, type(writer).__name__):
            writer.add(path, _read_label(out, path), sources[path])
        writer.finish(everything)
    columns = distinct_names(segments.names, [INDEX])
    table = pd.DataFrame.from_dict(areas, orient="index", columns=columns).rename_axis(INDEX)
    with out.write("areas.csv", everything) as temporary:
        table.to_csv(temporary, float_format="%.2f", encoding="utf-8", errors="surrogateescape")  # names may be no text
    if outdated := out.outdated({everything, *sources.values()}):
        notice(
            f"{len(outdated)} files in {shown_path(out.path)} are of an earlier call with other images or settings; "
            f"the first is {outdated[0]}. Remove them, or request their format again."
        )
    return table


def _segment(
    run: Run, sources: dict[Path, str], out: OutputFolder, opacity: float, rules: Rules
) -> dict[str, np.ndarray]:
    """Segments the images that are not up to date; returns the areas of each by file name."""
    segments, start = run.segments, time.perf_counter()
    areas: dict[str, np.ndarray] = {}
    broken: list[StegoError] = []
    turned = kept = 0

    def read(path: Path) -> StoredImage | StegoError | None:
        """The image, why it cannot be read, or None if its results are up to date."""
        if all(out.source(name(path)) == sources[path] for name in (_label_name, _overlay_name)):
            return None
        try:
            return read_image(path, rules)
        except StegoError as error:
            return error

    reading = progress(in_threads(read, sources, workers=1), "segmenting", total=len(sources))
    for path, image in zip(sources, reading, strict=True):
        if isinstance(image, StegoError):
            broken.append(image)
            continue
        if image is None:
            kept += 1
            label = _read_label(out, path)
        else:
            turned += image.orientation > 1 and rules.exif != "ignore"
            label = run.predict(image.rgb)
            if image.transparent is not None:
                label[image.transparent] = NOTHING
            _write(out, path, sources[path], image.rgb, label, segments, opacity)
        areas[path.name] = _areas(label, len(segments))

    if broken and not areas:
        raise broken[0]
    if broken:
        notice(f"{len(broken)} of {len(sources)} images cannot be read and are left out. The first: {broken[0]}")
    if turned:
        notice(
            f"{turned} of {len(sources)} images and their label maps are turned upright by their EXIF orientation. "
            'To keep them as stored, write {"exif": "ignore"} into classes.json beside them.'
        )
    new, seconds = len(areas) - kept, time.perf_counter() - start
    again = f"; {kept} were up to date" if kept else ""
    say(f"{new} images segmented in {seconds:.1f} s, {new / seconds:.1f} images per second{again}")
    return areas


def _write(
    out: OutputFolder, path: Path, source: str, image: Image.Image, label: np.ndarray, segments: Classes, opacity: float
) -> None:
    """Writes the label map and the overlay of an image."""
    stored = Image.fromarray(label)
    palette = np.array(segments.colors).ravel().tolist()
    stored.putpalette(palette + [255] * (768 - len(palette)))
    overlay = Image.blend(image, stored.convert("RGB"), opacity)
    overlay.thumbnail((MAX_JPEG_SIDE, MAX_JPEG_SIDE))
    with out.write(_overlay_name(path), source) as temporary:
        overlay.save(temporary)
    with out.write(_label_name(path), source) as temporary:
        stored.save(temporary)


def _label_name(image: Path) -> str:
    return f"labels/{image.stem}.png"


def _overlay_name(image: Path) -> str:
    return f"overlays/{image.stem}.jpg"


def _read_label(out: OutputFolder, image: Path) -> np.ndarray:
    with Image.open(out.path / _label_name(image)) as file:
        return np.array(file)


def _settings(run: Run, segments: Classes, opacity: float, rules: Rules) -> str:
    """Fingerprint of all that results depend on, except the image."""
    names = ("eval_size", "mirror", "crf", "official", "precision")
    values = [repr(getattr(run.experiment, name)) for name in names]
    weights = [list(pair) for pair in sorted(run.model.state_dict().items())]
    drawn = [run.ids.tolist(), segments.names, segments.colors, float(opacity), repr(rules)]
    return fingerprint(run.backbone.weights_id, weights, values, drawn)


def _images_of(folder: Path) -> list[Path]:
    """The images of a folder. Raises StegoError for none, and for two whose results would have one name."""
    paths = list_images(folder)
    stem, count = Counter(path.stem for path in paths).most_common(1)[0]
    if count > 1:
        raise StegoError(f"{folder} holds {count} images called {stem}. Rename them, or their results would collide.")
    return paths


def _areas(label: np.ndarray, count: int) -> np.ndarray:
    """Percentage of each of `count` ids among the pixels that have one, float64 (count,); NaN if none has."""
    pixels = np.array(Image.fromarray(label).histogram()[:count], float)
    return 100 * pixels / (pixels.sum() or np.nan)
