"""Segments a folder of images: `segment_folder`, and its command line.

python -m stego_lib.segment RUN IMAGES OUTPUT
torchrun --nproc-per-node 2 -m stego_lib.segment RUN IMAGES OUTPUT
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from .annotations.formats import PNG, WRITERS, chosen_writers
from .annotations.geotiff import GeoJson
from .annotations.names import NO_SEGMENT
from .annotations.outputs import MASKS, OutputFolder, Writer
from .datasets.classes import Rules, distinct_names, without_names
from .datasets.findings import few, folder_findings
from .datasets.images import StoredImage, read_image, rules_of
from .datasets.layout import by_name, checksum_of, list_images
from .predict import REFINEMENTS, uses_crf
from .raster import TILE, count_ids, is_large, label_raster, outline_raster
from .run import Run, load_run
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
# Files of an image, by its stem.
LABELS, OVERLAY, GEOTIFF = "labels/{}.png", "overlays/{}.jpg", "geotiff/{}.tif"


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
    paths = list_images(folder)
    by_name(paths, lambda path: path.stem.casefold())  # of results; some file systems ignore case
    if not 0 <= opacity <= 1:
        raise StegoError(f"opacity={opacity} is invalid. Use a number from 0 to 1.")
    run.check_fitted()
    kinds, rules = chosen_writers(format, masks), rules_of(paths[0], run.classes.rules)
    how = {"refine": refine, "size": size, "tile": tile}
    settings = _settings(run, how, opacity, rules)
    names = [kind.__name__ for kind in kinds]
    devices.join(run.experiment.device, fingerprint("segment", settings, str(folder), str(target), names, masks))
    out = OutputFolder(target, overwrite)
    writers = [kind(out, run.segments, masks) for kind in kinds]
    devices.once(lambda: _check_output(out, writers, paths))
    if devices.first():
        for finding in folder_findings(folder, paths):
            notice(finding.text)
        if not run.matched and without_names(run.segments) and not without_names(run.classes):
            text = f"{shown_path(run.folder)} was not evaluated, so its segments are clusters without names."
            notice(f"{text} Call evaluate(run) to match them to classes, or run.name_segments to name them.")
    start = time.perf_counter()
    own = _Segmenter(run, how, rules, opacity, settings, out, writers).segment(devices.share(paths))
    results = sorted(devices.gather_list(own), key=lambda result: result.path.name)
    table = _report(run, results, time.perf_counter() - start)
    devices.once(lambda: _finish(OutputFolder(target, overwrite), writers, results, table))
    return table


@dataclass
class _Result:
    """An image, and later its results."""

    path: Path
    # Fingerprint of image and settings.
    source: str = ""
    # Error of an unreadable image.
    problem: str = ""
    # Whether the results were up to date.
    kept: bool = False
    # Between reading and writing.
    image: StoredImage | None = None
    label: np.ndarray | None = None
    # Percentage of each segment, and results of `Writer.add`.
    areas: np.ndarray | None = None
    records: Sequence[Any] = ()


@dataclass
class _Segmenter:
    """Segments images. `settings` is the fingerprint of everything that determines results, except the image."""

    run: Run
    # refine, size and tile of `Run.predict`.
    how: dict[str, Any]
    rules: Rules
    opacity: float
    settings: str
    out: OutputFolder
    writers: list[Writer]

    def segment(self, paths: list[Path]) -> list[_Result]:
        """Segments images in three threads, for reading, prediction and writing; then large rasters one by one."""
        large = [path for path in paths if self.how["size"] is None and is_large(path)]
        small = [path for path in paths if path not in large]
        predicted = map(self.predict, in_threads(self.read, small, workers=1))
        results = list(progress(in_threads(self.write, predicted, workers=1), "segmenting", total=len(small)))
        results += map(self.segment_raster, large)
        if large:
            notice(f"{len(large)} large TIFFs: only GeoTIFFs and, with format='geojson', polygons are written.")
        return results

    def read(self, path: Path) -> _Result:
        """Reads an image, or its label map if the results are up to date."""
        try:
            source = fingerprint(self.settings, checksum_of(path))
            if all(self.out.source(name.format(path.stem)) == source for name in (LABELS, OVERLAY)):
                with Image.open(self.out.path / LABELS.format(path.stem)) as file:
                    return _Result(path, source, kept=True, label=np.array(file))
            return _Result(path, source, image=read_image(path, self.rules))
        except StegoError as error:
            return _Result(path, problem=str(error))

    def predict(self, result: _Result) -> _Result:
        """Predicts the label map."""
        if result.image is not None:
            result.label = self.run.predict(result.image.rgb, **self.how)
            if result.image.transparent is not None:
                result.label[result.image.transparent] = NO_SEGMENT
        return result

    def write(self, result: _Result) -> _Result:
        """Writes label map, overlay and annotations."""
        stem, source, image, label = result.path.stem, result.source, result.image, result.label
        result.image = result.label = None
        if label is None:
            return result
        if image is not None:
            stored = Image.fromarray(label)
            palette = np.array(self.run.segments.colors).ravel().tolist()
            stored.putpalette(palette + [255] * (768 - len(palette)))
            overlay = Image.blend(image.rgb, stored.convert("RGB"), self.opacity)
            overlay.thumbnail((MAX_JPEG_SIDE, MAX_JPEG_SIDE))
            with self.out.write(OVERLAY.format(stem), source) as temporary:
                overlay.save(temporary)
            with self.out.write(LABELS.format(stem), source) as temporary:
                stored.save(temporary)
        result.records = [writer.add(result.path, label, source) for writer in self.writers]
        result.areas = self.areas(np.array(Image.fromarray(label).histogram()))
        return result

    def segment_raster(self, path: Path) -> _Result:
        """Segments a large raster by a sliding window, unless its results are up to date."""
        run, out, name = self.run, self.out, GEOTIFF.format(path.stem)
        try:
            source = fingerprint(self.settings, checksum_of(path))
            kept = out.source(name) == source
            if not kept:
                with out.write(name, source) as temporary:
                    parts = temporary.with_name(f".{source}")
                    tile, crf = self.how["tile"] or TILE, uses_crf(run, self.how["refine"])
                    label_raster(run, path, temporary, parts, tile=tile, crf=crf, rules=self.rules)
            for file in [writer.file.format(path.stem) for writer in self.writers if isinstance(writer, GeoJson)]:
                if out.source(file) != source:
                    with out.write(file, source) as temporary:
                        outline_raster(out.path / name, temporary, run.segments)
            return _Result(path, source, kept=kept, areas=self.areas(count_ids(out.path / name)))
        except StegoError as error:
            return _Result(path, problem=str(error))

    def areas(self, pixels: np.ndarray) -> np.ndarray:
        """Percentage of each segment, NaN without segmented pixels. pixels: number of pixels of each id, (256,)."""
        known = pixels[: len(self.run.segments)].astype(float)
        return 100 * known / (known.sum() or np.nan)


def _report(run: Run, results: list[_Result], seconds: float) -> pd.DataFrame:
    """Creates the table of areas, and prints a summary. Raises StegoError if all images are unreadable."""
    broken = [result.problem for result in results if result.problem]
    if len(broken) == len(results):
        raise StegoError(broken[0])
    if broken:
        notice(f"{len(broken)} of {len(results)} images cannot be read, for example: {broken[0]}")
    kept = sum(result.kept for result in results)
    new = len(results) - len(broken) - kept
    if devices.first():
        again = f"; {kept} were up to date" if kept else ""
        say(f"{new} images segmented in {seconds:.1f} s, {new / seconds:.1f} images per second{again}")
    areas = {result.path.name: result.areas for result in results if not result.problem}
    columns = distinct_names(run.segments.names, [INDEX])
    return pd.DataFrame.from_dict(areas, orient="index", columns=columns).rename_axis(INDEX)


def _finish(out: OutputFolder, writers: list[Writer], results: list[_Result], table: pd.DataFrame) -> None:
    """Writes files for all images."""
    done = [result for result in results if not result.problem]
    everything = fingerprint(*(result.source for result in done))
    for number, writer in enumerate(writers):
        writer.output = out
        writer.finish([result.records[number] for result in done if result.records], everything)
    with out.write("areas.csv", everything) as temporary:
        # File names may be invalid Unicode.
        table.to_csv(temporary, float_format="%.2f", encoding="utf-8", errors="surrogateescape")


def _check_output(out: OutputFolder, writers: list[Writer], paths: list[Path]) -> None:
    """Raises StegoError if images or files of the user would be overwritten."""
    patterns = [LABELS, OVERLAY, *(writer.file for writer in writers)]
    names = [pattern.format(path.stem) for path in paths for pattern in patterns if pattern]
    names += ["areas.csv", *(writer.summary for writer in writers if writer.summary)]
    names += [GEOTIFF.format(path.stem) for path in paths if is_large(path)]
    if foreign := out.foreign(progress(names, "checking the output folder"), paths):
        raise StegoError(
            f"{len(foreign)} files in {out.path} were written or changed by others: {few(foreign)}. Move them, or use "
            "overwrite=True, which never replaces the images."
        )


def _settings(run: Run, how: dict[str, Any], opacity: float, rules: Rules) -> str:
    """Fingerprint of everything that determines results, except the image. how: arguments of `Run.predict`."""
    experiment, segments = run.experiment, run.segments
    values = [uses_crf(run, how["refine"]), how["size"] or experiment.eval_size, how["tile"], experiment.mirror]
    values += [repr(experiment.official), experiment.precision]
    weights = [list(pair) for pair in sorted(run.model.state_dict().items())]
    if run.taught is not None:
        weights += [[run.taught.method, run.taught.on], [run.taught.points, run.taught.ids]]
    drawn = [run.ids.tolist(), segments.names, segments.colors, float(opacity), repr(rules)]
    return fingerprint(run.backbone.weights_id, weights, values, drawn)


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
