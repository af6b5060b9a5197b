"""Findings: what a person should know of a dataset before training on it. Skipped files, doubtful labels, odd images."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from ..utils.errors import StegoError
from ..utils.files import fingerprint, read_json, write_json
from ..utils.notices import notice
from .base import SegmentationDataset
from .classes import Finding, listed
from .formats import BROKEN, DEFAULT, SUFFIXES, Rules, depth_of, formats_of, several
from .images import read_image
from .intact import Survey, survey
from .layout import list_images, visible

COMPANIONS = {
    ".txt", ".md", ".rst", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".yaml", ".yml", ".toml", ".html", ".ini", ".db", ".py",
    ".ipynb", ".log", ".xmp", ".aae", ".tfw", ".jgw", ".pgw", ".wld", ".prj", ".ovr", ".aux", ".lnk", ".url", ".sha256", ".md5",
}  # fmt: skip
"""Endings of files that nobody expects to be read as images."""
LIMIT = 20_000
"""Largest number of files in subfolders that is counted."""
WEAK = "L|P|color|matte|alpha|gt"
"""Endings of label maps' names that photographs have as well."""
MASK = rf"masks?|labels?|labelids|labeltrainids|instanceids|trainids|seg|segmentation|groundtruth|ground_truth|annotations?|annot|(?P<weak>{WEAK})"
MASK_NAME = re.compile(rf"(?P<base>.+?)[ ._-](?:{MASK})\d*|masks?[ ._-](?P<rest>.+)", re.IGNORECASE)
"""Name of a label map beside its image."""
KEPT_VERSION = 1
"""Version of the findings: raise it when the same files give others."""


def look(
    source: SegmentationDataset | Path, found: Survey | None = None, keep: Path | None = None, rules: Rules = DEFAULT
) -> list[Finding]:
    """Looks for what may mislead.

    Parameters
    ----------
    source
        A dataset, all of whose files are read, or a folder of images, of which headers are read where they are enough.
    found
        What its files hold, if they have been read.
    keep
        Folder in which the findings of a dataset are kept, so that files that have not changed are read once.
    rules
        How the images of a folder are read.

    Raises
    ------
    StegoError
        For a dataset with files that cannot be used.
    """
    if isinstance(source, Path):
        paths = list_images(source)
        return [*skipped_files(source), *_masks(paths, _flat(paths), "segmented"), *_headers(paths, rules)]
    whole: SegmentationDataset = getattr(source, "whole", source)
    kept = keep / f".findings-{fingerprint(KEPT_VERSION, whole.state(), whole.published)}.json" if keep else None
    if kept is not None:
        return [*_beside(whole), *_kept(whole, kept)]
    return [*_beside(whole), *from_survey(whole, found or survey(whole))]


def show_findings(source: SegmentationDataset | Path, keep: Path | None = None, rules: Rules = DEFAULT) -> None:
    """Shows each finding of `look` as a notice, once per process."""

    def once(text: str) -> None:
        notice(text)  # its place is then this function, whoever asked, and Python shows a warning of one place once

    for finding in look(source, keep=keep, rules=rules):
        once(finding.text)


def _kept(dataset: SegmentationDataset, path: Path) -> list[Finding]:
    """The cached findings of these files, or new ones, which are cached."""
    try:
        return [Finding(**one) for one in read_json(path)]
    except (FileNotFoundError, StegoError, TypeError):
        found = from_survey(dataset, survey(dataset))
    dataset.files_checked = True
    write_json(path, [asdict(one) for one in found])
    return found


def _beside(dataset: SegmentationDataset) -> list[Finding]:
    """Findings on the files beside the images of a folder."""
    if dataset.name != "folder":
        return []
    return [*skipped_files(dataset.images[0].parent), *([] if dataset.has_labels else _unread_labels(dataset))]


def _unread_labels(dataset: SegmentationDataset) -> list[Finding]:
    """Findings on files beside imgs/ that look like label maps and are not read."""
    images = dataset.images[0].parent
    if images.parent.name != "imgs":
        return []
    root = images.parent.parent
    if any((root / "labels" / split).is_dir() for split in ("train", "val")):
        return []  # one split alone may have labels
    beside = [path for path in sorted(root.iterdir()) if visible(path) and path.name not in ("imgs", "depth")]
    names = [path.name for path in beside if (path.is_dir() and _images_below(path)) or path.name == "labels"]
    if not names:
        return []
    return [
        Finding(
            f"{dataset.name} {dataset.split} counts as unlabeled: {_named(names)} in {root} is not read; label maps belong into "
            f"{root / 'labels' / dataset.split}, called like their images"
        )
    ]


def from_survey(dataset: SegmentationDataset, found: Survey) -> list[Finding]:
    """Findings on the content of the files of a split."""
    return [*_images(dataset, found), *_labels(dataset, found)]


def _images(dataset: SegmentationDataset, found: Survey) -> Iterator[Finding]:
    count, rules, what = found.looked, dataset.rules, f"{dataset.name} {dataset.split}"
    if dataset.name == "folder":
        yield from _masks(
            dataset.images, [] if len(found.flat) == count > found.flat_gray else found.flat, "trained on"
        )
    if found.orientations and dataset.has_labels and rules.exif is None:
        yield Finding(
            f"{what}: {rotation_note(found, count)}, and label maps are taken to be drawn on the turned images. If they are drawn on the "
            'stored pixels, write "exif": "ignore" into classes.json; "exif": "apply" there says that they are not'
        )
    if found.depths and rules.range is None:
        yield Finding(f"{what}: {_deep(found.depths, count)}")
    if found.paged:
        yield Finding(f"{what}: {_several(found.paged, count)}")
    if found.transparent:
        ignored = " and ignored in label maps" if dataset.has_labels else ""
        yield Finding(
            f"{what}: {found.transparent} of {count} images have transparent pixels, which are white{ignored}"
        )
    if found.clear:
        yield Finding(
            f"{what}: {len(found.clear)} of {count} images are transparent all over and so white ({_named(found.clear)}); is "
            "their fourth channel something else? save them as RGB",
            True,
        )


def rotation_note(found: Survey, count: int) -> str:
    """How many images are rotated by their EXIF data."""
    how = ", ".join(f"orientation {way}: {number}" for way, number in sorted(found.orientations.items()))
    return f"{sum(found.orientations.values())} of {count} images are turned upright as their EXIF data say ({how})"


def _several(names: list[str], count: int) -> str:
    return (
        f"{len(names)} of {count} image files hold several frames or pages ({_named(names)}), of which the first is read; save the "
        "others as files of their own"
    )


def _deep(depths: Counter[str], count: int) -> str:
    return (
        f"{sum(depths.values())} of {count} images hold {' and '.join(sorted(depths))}; 0 to 65,535 become 8 bits. If their range "
        'is another one, write "range": [LOW, HIGH] into classes.json'
    )


def _labels(dataset: SegmentationDataset, found: Survey) -> Iterator[Finding]:
    if not dataset.has_labels:
        return
    counts, names, what = found.classes[:-1], dataset.classes.names, f"{dataset.name} {dataset.split}"
    ids = [id_ for id_ in range(256) if found.ids[id_]]
    absent = [i for i, count in enumerate(counts) if not count]
    present = len(counts) - len(absent)
    told = f"ids seen: {listed(ids)}"
    hint = ""
    if absent and dataset.name == "folder":
        if 255 in ids:
            hint = "; 255 means ignored: where it is the object, save it as the id of its class"
        elif 0 in absent and len(counts) - 1 in ids:
            hint = "; ids start at 0"
    if not present:
        yield Finding(f"{what}: no pixel of {found.maps} has a class ({told}); are these its label maps?{hint}", True)
    elif present == 1:
        only = names[int(counts.argmax())]
        yield Finding(
            f"{what}: {only!r} is the only class in {found.maps} ({told}), so a score of 100 would mean nothing{hint}",
            True,
        )
    elif absent and found.looked == found.size:
        few = ", ".join(repr(names[i]) for i in absent[:5]) + (", ..." if len(absent) > 5 else "")
        swallowed = dataset.name == "folder" and bool(found.ids[255] > counts.sum() - counts.max())
        yield Finding(
            f"{what}: {len(absent)} of {len(counts)} classes occur in none of {found.maps}: {few} ({told}){hint}",
            swallowed,
        )
    if found.recolored:
        yield Finding(
            f"{what}: label maps color the same id otherwise (id {listed(sorted(found.recolored))}), so it may be another class in "
            "each: save them with one palette for all",
            True,
        )
    for doubt in dataset.doubts(found.ids):
        yield Finding(f"{what}: {doubt.text}", doubt.misleads)


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _masks(paths: list[Path], flat: list[str], used: str) -> Iterator[Finding]:
    """Findings on images that are named, or look, like label maps of others."""
    stems, found = {path.stem for path in paths}, set(flat)
    for path in paths:
        match = MASK_NAME.fullmatch(path.stem)
        if match and (match["base"] or match["rest"]) in stems and (not match["weak"] or _looks_flat(path)):
            found.add(path.name)
    if found:
        yield Finding(
            f"{len(found)} of {len(paths)} images in {paths[0].parent} look like label maps ({_named(sorted(found))}) and are "
            f"{used} as images: move them out of the folder (to labels/train and labels/val, called like their images)",
            0 < len(found) < len(paths),
        )


def _looks_flat(path: Path) -> bool:
    try:
        return bool(read_image(path).flat)
    except StegoError:
        return False  # whoever uses it says so


def _flat(paths: list[Path]) -> list[str]:
    """Names of the files with one channel that look like label maps."""
    found = []
    for path in paths:
        try:
            with Image.open(path, formats=formats_of(path)) as file:
                likely = file.mode in ("1", "L", "P")
        except BROKEN:
            continue
        if likely and _looks_flat(path):
            found.append(path.name)
    return found


def _headers(paths: list[Path], rules: Rules) -> Iterator[Finding]:
    """Findings on bit depth, pages and transparency of the images of a folder."""
    depths, transparent, paged = Counter[str](), 0, []
    for path in paths:
        try:
            with Image.open(path, formats=formats_of(path)) as file:
                depth, layered = depth_of(file), file.has_transparency_data
                paged += [path.name] if several(file) else []
            depths.update([depth] if depth else [])
            transparent += layered and read_image(path, rules).transparent is not None
        except (*BROKEN, StegoError):
            continue
    if depths and rules.range is None:
        yield Finding(_deep(depths, len(paths)))
    if paged:
        yield Finding(_several(paged, len(paths)))
    if transparent:
        yield Finding(f"{transparent} of {len(paths)} images have transparent pixels, which belong to no segment")


def skipped_files(folder: Path) -> list[Finding]:
    """Findings on files of a folder that are not read, and on images in its subfolders."""
    suffixes, nested, inner = Counter[str](), 0, []
    for path in sorted(folder.iterdir()):
        if not visible(path):
            continue
        if path.is_dir():
            count = _images_below(path)
            nested += count
            inner += [path.name] if count else []
        elif path.suffix.lower() not in SUFFIXES | COMPANIONS:
            suffixes[path.suffix.lower()] += 1
    if not nested + suffixes.total():
        return []
    parts = [f"{count} {suffix or 'without an ending'}" for suffix, count in suffixes.most_common()]
    told = [f"{', '.join(parts)} (not read; save them as JPEG or PNG)"] if parts else []
    told += [f"images in subfolders: {nested} ({_named(inner)}; only the folder itself is read)"] if nested else []
    return [Finding(f"left out of {folder}: {', '.join(told)}")]


def _images_below(folder: Path) -> int:
    count = looked = 0
    for _, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        count += sum(Path(name).suffix.lower() in SUFFIXES and not name.startswith(".") for name in files)
        looked += len(files)
        if looked > LIMIT:
            break
    return count
