"""Segments a folder of images: `segment_folder`, and its command line.

python -m stego_lib.segment RUN IMAGES OUTPUT
torchrun --nproc-per-node 2 -m stego_lib.segment RUN IMAGES OUTPUT
"""

import argparse
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from PIL import Image

from .annotations.formats import MASKS, PNG, WRITERS, check_masks, chosen_formats
from .annotations.geotiff import GeoJson
from .annotations.names import NO_SEGMENT
from .annotations.outputs import OutputFolder, Writer
from .datasets.classes import Classes, Rules, distinct_names, rules_of, without_names
from .datasets.findings import few, folder_findings
from .datasets.images import StoredImage, read_image
from .datasets.layout import checksum_of, list_images
from .raster import TILE, count_ids, is_large, label_raster, outline_raster
from .run import REFINEMENTS, Run, load_run
from .utils import devices
from .utils.errors import StegoError
from .utils.files import fingerprint
from .utils.notices import notice
from .utils.paths import shown_path, user_path
from .utils.progress import progress, say
from .utils.threads import in_threads
from .utils.torch_state import usual_modes

# Maximum side of a JPEG in pixels.
MAX_JPEG_SIDE = 65_500
# Column of areas.csv with the file names.
INDEX = "image"


@usual_modes()
def segment_folder(
    run: Run,
    images: str | Path,
    output: str | Path,
    opacity: float = 0.55,
    format: str | Sequence[str] = PNG,
    *,
    refine: str | None = None,
    size: int | None = None,
    tile: int | None = None,
    masks: str = "rle",
    overwrite: bool = False,
) -> pd.DataFrame:
    """Segments all images of a folder at their own resolution.

    Writes output/labels/NAME.png (ids of `Run.predict` as 8-bit palette PNG), output/overlays/NAME.jpg (colors over the
    image), output/areas.csv, and annotations. Names and colors are those of `Run.segments`.

    An interrupted call can be repeated: images with up-to-date results, according to output/origin.jsonl, are skipped.
    Processes started by torchrun or SLURM divide the images.

    Parameters
    ----------
    run
        A trained run. Segments are classes if it was evaluated, otherwise clusters, with a notice.
    images
        Folder of images, without subfolders.
    output
        Folder for the results.
    opacity
        Opacity of the colors in the overlays, 0 to 1.
    format
        "png", or one or several of

        * "coco-panoptic": panoptic.json and panoptic/NAME.png, one segment per name and image;
        * "coco-instances": instances.json. Each connected region is an instance: two touching cars are one, a car
          behind a pole is two;
        * "labelme": labelme/NAME.json, polygons of connected regions, simplified with a tolerance of a pixel;
        * "geotiff": geotiff/NAME.tif with the georeference of the image;
        * "geojson": geojson/NAME.geojson, polygons of connected regions in the coordinates of the image, for GIS.

        A TIFF of more than 50 megapixels is segmented by a sliding window (`tile`, 448 pixels by default) in little
        memory, to geotiff/NAME.tif and, with "geojson", polygons.
    refine, size, tile
        See `Run.predict`.
    masks
        Masks in instances.json: "rle" (run-length encoding) or "polygons".
    overwrite
        Replace files in `output` that were written or changed by others.

    Returns
    -------
    pandas.DataFrame
        One row per image, one column per segment: its percentage of the segmented pixels (NaN if there are none).

    Raises
    ------
    StegoError
        If all images are unreadable, two images have the same name, an argument is invalid, a package is missing, or a
        file would be overwritten. Single unreadable images give a notice.

    Examples
    --------
    >>> table = segment_folder(run, "my_images", "my_segments", format=("coco-instances", "labelme"))
    """
    folder, target = user_path(images), user_path(output)
    paths = _images_of(folder)
    run.check_fitted()
    formats, rules = chosen_formats(format), rules_of(paths[0], run.classes.rules)
    check_masks(masks)
    how = {"refine": refine, "size": size, "tile": tile}
    settings = _settings(run, how, opacity, rules)
    task = fingerprint("segment", settings, str(folder.absolute()), str(target.absolute()), formats, masks)
    devices.join(run.experiment.device, task)
    out = OutputFolder(target, overwrite)
    writers = [WRITERS[name](out, run.segments, masks) for name in formats]
    devices.once(lambda: _check_output(out, writers, paths))
    _show_remarks(run, folder)
    start = time.perf_counter()
    own = _segment(_Job(run, how, rules, opacity, settings, out, writers), devices.share(paths))
    results = sorted(devices.gather_list(own), key=lambda result: result.name)
    table = _report(results, run.segments, rules, time.perf_counter() - start)
    devices.once(lambda: _finish(OutputFolder(target, overwrite), writers, results, table))
    return table


class _Job(NamedTuple):
    """Arguments for all images of a call."""

    run: Run
    # refine, size and tile of `Run.predict`.
    how: dict[str, Any]
    rules: Rules
    opacity: float
    # Fingerprint of everything that determines results, except the image.
    settings: str
    out: OutputFolder
    writers: list[Writer]


# Path, source of the results or an error, image unless results are up to date, label map unless there is an error.
Work: TypeAlias = tuple[Path, str, StoredImage | None, np.ndarray | None]


class Result(NamedTuple):
    """The result of one image."""

    name: str
    # Fingerprint of image and settings.
    source: str = ""
    # Percentage of each segment; None for an unreadable image, with an error in `problem`.
    areas: np.ndarray | None = None
    problem: str = ""
    # Whether the results were up to date, and whether the image is rotated by its EXIF orientation.
    kept: bool = False
    rotated: bool = False
    # Results of `Writer.add`.
    records: Sequence[Any] = ()


def _show_remarks(run: Run, folder: Path) -> None:
    """Shows notices about the images, and about segments without names."""
    for finding in folder_findings(folder, list_images(folder)) if devices.first() else ():
        notice(finding.text)
    if not run.matched and without_names(run.segments) and not without_names(run.classes):
        notice(
            f"{shown_path(run.folder)} was not evaluated, so its segments are clusters without names. Call "
            "evaluate(run) to match them to classes, or run.name_segments to name them."
        )


def _segment(job: _Job, paths: list[Path]) -> list[Result]:
    """Segments images, and large rasters one by one."""
    large = [path for path in paths if job.how["size"] is None and is_large(path)]
    results = _segment_images(job, [path for path in paths if path not in large])
    results += [_segment_raster(job, path) for path in large]
    if large:
        notice(f"{len(large)} large TIFFs: only GeoTIFFs and, with format='geojson', polygons are written.")
    return results


def _segment_images(job: _Job, paths: list[Path]) -> list[Result]:
    """Segments images in three threads, for reading, prediction and writing; skips those that are up to date."""
    run, out, rules, count = job.run, job.out, job.rules, len(job.run.segments)

    def read(path: Path) -> tuple[str, StoredImage | None] | StegoError:
        """The source of the results, and the image, or None if the results are up to date."""
        try:
            source = fingerprint(job.settings, checksum_of(path))
            if all(out.source(name(path)) == source for name in (_label_name, _overlay_name)):
                return source, None
            return source, read_image(path, rules)
        except StegoError as error:
            return error

    def predicted() -> Iterator[Work]:
        for path, content in zip(paths, in_threads(read, paths, workers=1), strict=True):
            if isinstance(content, StegoError):
                yield path, str(content), None, None
                continue
            source, image = content
            if image is None:
                yield path, source, None, _read_label(out, path)
                continue
            label = run.predict(image.rgb, **job.how)
            if image.transparent is not None:
                label[image.transparent] = NO_SEGMENT
            yield path, source, image, label

    def write(work: Work) -> Result:
        path, source, image, label = work
        if label is None:
            return Result(path.name, problem=source)
        if image is not None:
            _write(job, path, source, image.rgb, label)
        records = [writer.add(path, label, source) for writer in job.writers]
        rotated = image is not None and image.orientation > 1 and rules.exif != "ignore"
        return Result(path.name, source, _areas(label, count), "", image is None, rotated, records)

    return list(progress(in_threads(write, predicted(), workers=1), "segmenting", total=len(paths)))


def _segment_raster(job: _Job, path: Path) -> Result:
    """Segments a large raster by a sliding window, unless its results are up to date."""
    run, out, how, name = job.run, job.out, job.how, f"geotiff/{path.stem}.tif"
    outlines = [writer.file(path) for writer in job.writers if isinstance(writer, GeoJson)]
    try:
        source = fingerprint(job.settings, checksum_of(path))
        kept = out.source(name) == source
        if not kept:
            with out.write(name, source) as temporary:
                parts = temporary.with_name(f".{source}")
                tile, crf = how["tile"] or TILE, run.uses_crf(how["refine"])
                label_raster(run, path, temporary, parts, tile=tile, crf=crf, rules=job.rules)
        for file in outlines:
            if out.source(file) != source:
                with out.write(file, source) as temporary:
                    outline_raster(out.path / name, temporary, run.segments)
        counts = count_ids(out.path / name)[: len(run.segments)]
    except StegoError as error:
        return Result(path.name, problem=str(error))
    return Result(path.name, source, 100 * counts / (counts.sum() or np.nan), "", kept)


def _report(results: list[Result], segments: Classes, rules: Rules, seconds: float) -> pd.DataFrame:
    """Creates the table of areas, and prints a summary. Raises StegoError if all images are unreadable."""
    broken = [result.problem for result in results if result.areas is None]
    if len(broken) == len(results):
        raise StegoError(broken[0])
    if broken:
        notice(f"{len(broken)} of {len(results)} images cannot be read, for example: {broken[0]}")
    if rotated := sum(result.rotated for result in results):
        notice(
            f"{rotated} of {len(results)} images and their label maps are rotated by EXIF. To change this, write "
            '{"exif": "ignore"} into classes.json in the folder of the images.'
        )
    kept = sum(result.kept for result in results)
    new = len(results) - len(broken) - kept
    again = f"; {kept} were up to date" if kept else ""
    if devices.first():
        say(f"{new} images segmented in {seconds:.1f} s, {new / seconds:.1f} images per second{again}")
    areas = {result.name: result.areas for result in results if result.areas is not None}
    columns = distinct_names(segments.names, [INDEX])
    return pd.DataFrame.from_dict(areas, orient="index", columns=columns).rename_axis(INDEX)


def _finish(out: OutputFolder, writers: list[Writer], results: list[Result], table: pd.DataFrame) -> None:
    """Writes files for all images, and shows a notice about outdated files."""
    done = [result for result in results if result.areas is not None]
    everything = fingerprint(*(result.source for result in done))
    for number, writer in enumerate(writers):
        writer.output = out
        writer.finish([result.records[number] for result in done if result.records], everything)
    with out.write("areas.csv", everything) as temporary:
        # File names may be invalid Unicode.
        table.to_csv(temporary, float_format="%.2f", encoding="utf-8", errors="surrogateescape")
    if outdated := out.outdated({everything, *(result.source for result in done)}):
        notice(
            f"{len(outdated)} files in {shown_path(out.path)} are from other images or settings, for example "
            f"{outdated[0]}. Delete them, or request their format again."
        )


def _check_output(out: OutputFolder, writers: list[Writer], paths: list[Path]) -> None:
    """Raises StegoError if images or files of the user would be overwritten."""
    names = [name(path) for path in paths for name in (_label_name, _overlay_name, *(w.file for w in writers))]
    names += ["areas.csv", *(writer.summary for writer in writers)]
    names += [f"geotiff/{path.stem}.tif" for path in paths if is_large(path)]
    if foreign := out.foreign(filter(None, progress(names, "checking the output folder")), paths):
        raise StegoError(
            f"{len(foreign)} files in {out.path} were written or changed by others: {few(foreign)}. Move them, or use "
            "overwrite=True, which never replaces the images."
        )


def _write(job: _Job, path: Path, source: str, image: Image.Image, label: np.ndarray) -> None:
    """Writes the label map and the overlay of an image."""
    stored = Image.fromarray(label)
    palette = np.array(job.run.segments.colors).ravel().tolist()
    stored.putpalette(palette + [255] * (768 - len(palette)))
    overlay = Image.blend(image, stored.convert("RGB"), job.opacity)
    overlay.thumbnail((MAX_JPEG_SIDE, MAX_JPEG_SIDE))
    with job.out.write(_overlay_name(path), source) as temporary:
        overlay.save(temporary)
    with job.out.write(_label_name(path), source) as temporary:
        stored.save(temporary)


def _label_name(image: Path) -> str:
    return f"labels/{image.stem}.png"


def _overlay_name(image: Path) -> str:
    return f"overlays/{image.stem}.jpg"


def _read_label(out: OutputFolder, image: Path) -> np.ndarray:
    with Image.open(out.path / _label_name(image)) as file:
        return np.array(file)


def _settings(run: Run, how: dict[str, Any], opacity: float, rules: Rules) -> str:
    """Fingerprint of everything that determines results, except the image. how: arguments of `Run.predict`."""
    experiment, segments = run.experiment, run.segments
    values = [run.uses_crf(how["refine"]), how["size"] or experiment.eval_size, how["tile"], experiment.mirror]
    values += [repr(experiment.official), experiment.precision]
    weights = [list(pair) for pair in sorted(run.model.state_dict().items())]
    if run.taught is not None:
        weights += [[run.taught.method, run.taught.on], [run.taught.points, run.taught.ids]]
    drawn = [run.ids.tolist(), segments.names, segments.colors, float(opacity), repr(rules)]
    return fingerprint(run.backbone.weights_id, weights, values, drawn)


def _images_of(folder: Path) -> list[Path]:
    """The images of a folder. Raises StegoError if there are none, or if the names of results would collide."""
    paths = list_images(folder)
    # Some file systems ignore case and normalize Unicode.
    stems = Counter(unicodedata.normalize("NFC", path.stem).casefold() for path in paths)
    stem, count = stems.most_common(1)[0]
    if count > 1:
        raise StegoError(f"{folder} holds {count} images called {stem}, whose results would collide. Rename them.")
    return paths


def _areas(label: np.ndarray, count: int) -> np.ndarray:
    """Percentage of each of `count` ids among all pixels with such an id, float64 (count,); NaN without them."""
    pixels = np.array(Image.fromarray(label).histogram()[:count], float)
    return 100 * pixels / (pixels.sum() or np.nan)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `segment_folder` from the command line."""
    parser = argparse.ArgumentParser(prog="python -m stego_lib.segment", description="Segments a folder of images.")
    parser.add_argument("run", help="run folder, or released checkpoint (.ckpt)")
    parser.add_argument("images", help="folder of images")
    parser.add_argument("output", help="folder for the results")
    parser.add_argument("--format", nargs="+", default=[PNG], choices=(PNG, *WRITERS), help="see segment_folder")
    parser.add_argument("--refine", choices=REFINEMENTS, help="refine borders by a CRF; default: as trained")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="shorter side of resized images")
    parser.add_argument("--tile", type=int, metavar="PIXELS", help="side of a sliding window")
    parser.add_argument("--masks", default=MASKS[0], choices=MASKS, help="masks of coco-instances")
    parser.add_argument("--opacity", type=float, default=0.55, help="opacity of colors in overlays, 0 to 1")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--overwrite", action="store_true", help="replace files written or changed by others")
    options = vars(parser.parse_args(arguments))
    try:
        run = load_run(options.pop("run"), device=options.pop("device"))
        segment_folder(run, options.pop("images"), options.pop("output"), **options)
    except StegoError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
