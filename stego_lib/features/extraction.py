"""From images to frozen features: what a row is made of, and how the rows of a store are filled."""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..backbone import Backbone
from ..datasets import SegmentationDataset
from ..datasets.intact import refuse_broken
from ..datasets.transforms import Size, resize_image, resize_label
from ..runtime.devices import ALONE, Processes
from ..runtime.errors import StegoError
from ..runtime.files import checksum, explained, fingerprint, read_json, write_json
from ..runtime.memory import enough_memory
from ..runtime.progress import progress, say
from .arrays import ArrayFile, crc, create
from .prefetch import ReadAhead

Shapes = dict[str, tuple[type, tuple[int, ...]]]
"""Name -> type and shape of an array."""
VERSION = 5
"""To be raised whenever what is stored changes, so that old stores are not used."""
NO_LABEL = 255
"""How ignored pixels are stored."""
KEEP_EVERY = 30.0
"""Seconds after which what is computed is made safe on the disk: at most so much is lost when it is broken off."""
AHEAD = 2
"""Batches that are read before the backbone asks for them."""


@dataclass(frozen=True, eq=False)
class Source:
    """Images of a dataset at one size, and the backbone that turns them into features.

    mirror: features of the mirrored images (images and labels stay as they are). published: images are brought to
    their size as the published code does, see `resize_image`.
    """

    dataset: SegmentationDataset
    backbone: Backbone
    size: Size
    mirror: bool = False
    published: bool = False

    def __str__(self) -> str:
        return f"{self.dataset.name} {self.dataset.split}{' (mirrored)' if self.mirror else ''}"

    def fingerprint(self, root: str | Path, *more: object) -> str:
        """Changes with what the files hold, size, resampling, backbone weights and precision, and `more`. `root`: see `content_id`."""
        own = (content_id(self.dataset, root), self.size, self.mirror, self.published, self.backbone.fingerprint())
        return fingerprint(VERSION, *own, *more)

    @property
    def shapes(self) -> Shapes:
        """Type and shape of each array of a store: features, images, pooled and, with labels, labels."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        count = len(self.dataset)
        shapes: Shapes = {
            "features": (np.float16, (count, self.backbone.dim, *self.backbone.grid(height, width))),
            "images": (np.uint8, (count, 3, height, width)),
            "pooled": (np.float32, (count, self.backbone.dim)),
        }
        return shapes | {"labels": (np.uint8, (count, height, width))} if self.dataset.has_labels else shapes

    def image(self, row: int) -> Tensor:
        """Image `row` at its size, uint8 (3, H, W)."""
        return resize_image(self.dataset.image(row), self.size, self.published)

    def label(self, row: int) -> Tensor:
        """Label map `row` as it is stored, uint8 (H, W)."""
        label = self.dataset.label(row)
        assert label is not None
        return _stored_label(label, self.size)

    def sample(self, row: int) -> tuple[Tensor, Tensor]:
        """Both."""
        image, label = self.dataset[row]
        assert label is not None
        return resize_image(image, self.size, self.published), _stored_label(label, self.size)

    def features(self, images: Tensor, rows: Sequence[int]) -> Tensor:
        """What the backbone makes of uint8 images (B, 3, H, W): float32 (B, C, h, w), on its device.

        Raises StegoError for a lack of memory and for features that float16 cannot hold; `rows` tell which they are.
        """
        knobs = "choose a smaller train_size or eval_size, precision='bfloat16' or device='cpu'"
        with enough_memory(f"features of {self}", knobs):
            found = self.backbone(images.flip(-1) if self.mirror else images)
        bad = ~found.half().isfinite().flatten(1).all(1)
        if bad.any():
            first = self.dataset.images[rows[int(bad.nonzero()[0])]]
            raise StegoError(
                f"backbone {self.backbone.name!r} gives {first} features that are not finite numbers, or too large to be stored; "
                "are its weights damaged? try precision='float32' or another backbone"
            )
        return found


def content_id(dataset: SegmentationDataset, root: str | Path, *, labels: bool = True) -> str:
    """Fingerprint of what a split holds, the same wherever its files lie and however their folder is spelled.

    Without `labels`, of its images alone. The files are read for it once; root/.contents remembers the result for their places,
    sizes and times of change.
    """
    known = Path(root) / ".contents" / f"{fingerprint(dataset.state(labels=labels))}.json"
    if known.exists():
        return read_json(known)
    found = fingerprint(dataset.identity(labels=labels))
    write_json(known, found)
    return found


def usual_batch(backbone: Backbone) -> int:
    """Images that go through the backbone at once."""
    return 64 if backbone.device.type == "cuda" else 16


def needed_bytes(shapes: Shapes) -> int:
    """Room on the disk that arrays take."""
    return sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in shapes.values())


def taken_bytes(folder: Path) -> int:
    """Room that an unfinished store has on the disk already."""
    return sum(path.stat().st_blocks * 512 for path in folder.glob("*.npy")) if folder.is_dir() else 0


def unfinished(folder: Path) -> Path:
    """Where the store `folder` is while it is computed."""
    return folder.with_name(f".{folder.name}.part")


def build(source: Source, folder: Path, shapes: Shapes, processes: Processes = ALONE, batch: int | None = None) -> None:
    """Computes the arrays named by `shapes` beside `folder`, which appears when all is written.

    What was broken off goes on after the last chunk that was made safe. Each process fills a part of the rows.
    """
    part, size = unfinished(folder), batch or usual_batch(source.backbone)
    try:
        with explained(folder):
            done: set[int] = set()
            if processes.first:
                _check_space(folder, source, shapes)
                refuse_broken(source.dataset)
                done = _take_up(part, shapes, size)
                if "features" in shapes:
                    say(f"features of {source}: {needed_bytes(shapes) / 1e9:.2f} GB, to be kept in {folder}")
            _fill(source, part, shapes, processes, size, processes.broadcast(done))
            processes.wait()
            if processes.first:
                _describe(source, part, shapes)
                part.rename(folder)
                shutil.rmtree(folder / "chunks")  # last: what is unfinished without them would begin anew
            processes.wait()
    finally:
        if processes.first and not list((part / "chunks").glob("*.json")):
            shutil.rmtree(part, ignore_errors=True)


def _stored_label(label: Tensor, size: Size) -> Tensor:
    resized = resize_label(label, size)
    return resized.masked_fill(resized < 0, NO_LABEL).to(torch.uint8)


def _check_space(folder: Path, source: Source, shapes: Shapes) -> None:
    dataset, root = source.dataset, folder.parent
    if "labels" in shapes and len(dataset.classes) > NO_LABEL:
        raise StegoError(f"{dataset.name} has {len(dataset.classes)} classes; {NO_LABEL} at most can be stored")
    needed = needed_bytes(shapes) - taken_bytes(unfinished(folder))
    free = shutil.disk_usage(root).free
    if needed > 0.95 * free:
        others = [path for path in root.glob(".*.part") if path != unfinished(folder)]
        left = f"; {others[0]} is unfinished and may be removed" if others else ""
        raise StegoError(
            f"the features of {source} take {needed / 1e9:.1f} GB, {root.parent} has {free / 1e9:.1f} GB free{left}; "
            "name a larger disk with runs_dir, or keep no features: feature_store='online'"
        )


def _take_up(part: Path, shapes: Shapes, batch: int) -> set[int]:
    """Numbers of the batches that an unfinished store holds safely; makes the files if there are none of these shapes.

    A chunk counts if the checksums of its rows are those that it was recorded with: that its record is on the disk does
    not prove that all its rows are.
    """
    files = {name: part / f"{name}.npy" for name in shapes}
    try:
        arrays = {name: ArrayFile(path) for name, path in files.items()}
        fitting = all((arrays[name].dtype, arrays[name].shape) == known for name, known in shapes.items())
    except (OSError, ValueError, EOFError):
        fitting = False
    if not fitting:
        shutil.rmtree(part, ignore_errors=True)
        (part / "chunks").mkdir(parents=True)
        for name, path in files.items():
            create(path, *shapes[name])
        return set()
    done: set[int] = set()
    count = next(iter(shapes.values()))[1][0]
    for path in sorted((part / "chunks").glob("*")):
        try:
            chunk = read_json(path)
            rows = [row for number in chunk["batches"] for row in _rows(number, batch, count)]
            good = chunk["batch"] == batch and all(_crc(arrays[name], rows) == chunk["crc"][name] for name in shapes)
        except (StegoError, KeyError, TypeError, IndexError):
            good = False
        if good:
            done |= set(chunk["batches"])
        else:
            path.unlink()
    return done


def _rows(number: int, batch: int, count: int) -> range:
    """The rows of batch `number`: the same whatever was computed before and by whoever, so that stores are alike."""
    return range(number * batch, min((number + 1) * batch, count))


def _crc(array: ArrayFile, rows: list[int]) -> int:
    found = 0
    for row in rows:
        found = crc(array.read([row]), found)
    return found


def _fill(source: Source, part: Path, shapes: Shapes, processes: Processes, batch: int, done: set[int]) -> None:
    """Computes this process's share of the batches that are not done, and records them chunk by chunk."""
    count = len(source.dataset)
    numbers = range(math.ceil(count / batch))
    todo = processes.share([number for number in numbers if number not in done])
    arrays = {name: ArrayFile(part / f"{name}.npy", write=True) for name in shapes}
    chunk = _Chunk(part / "chunks", batch, arrays)
    labeled = "labels" in shapes
    reader = ReadAhead(source.sample if labeled else source.image, source.dataset.images)
    bar = progress(
        range(len(todo)),
        f"features of {source}",
        initial=len(done) // processes.count,
        total=len(numbers) // processes.count,
        disable=not processes.first,
    )
    try:
        for place in bar:
            for number in todo[place : place + 1 + AHEAD]:
                reader.expect(_rows(number, batch, count))
            rows = _rows(todo[place], batch, count)
            read = reader.take(rows)
            images, labels = zip(*read, strict=True) if labeled else (read, ())
            chunk.add(todo[place], rows, _computed(source, rows, torch.stack(list(images)), labels))
        chunk.keep()
    finally:
        reader.close()


def _computed(source: Source, rows: range, images: Tensor, labels: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """Every array of a store at these rows."""
    found = source.features(images, rows)
    values = {"images": images, "features": found.half(), "pooled": found.mean((2, 3))}
    if labels:
        values["labels"] = torch.stack(list(labels))
    return {name: value.cpu().numpy() for name, value in values.items()}


class _Chunk:
    """Rows that were written and not yet made safe."""

    def __init__(self, folder: Path, batch: int, arrays: dict[str, ArrayFile]):
        self._folder, self._batch, self._arrays = folder, batch, arrays
        self._begin()

    def _begin(self) -> None:
        self._batches: list[int] = []
        self._crc = dict.fromkeys(self._arrays, 0)
        self._began = time.monotonic()

    def add(self, number: int, rows: range, values: dict[str, np.ndarray]) -> None:
        """Writes a batch."""
        for name, array in self._arrays.items():
            array.write(rows, values[name])
            self._crc[name] = crc(values[name], self._crc[name])
        self._batches.append(number)
        if time.monotonic() - self._began > KEEP_EVERY:
            self.keep()

    def keep(self) -> None:
        """Records the batches when they are on the disk."""
        if self._batches:
            for array in self._arrays.values():
                array.sync()
            record = {"batch": self._batch, "batches": self._batches, "crc": self._crc}
            write_json(self._folder / f"{self._batches[0]:08d}.json", record)
        self._begin()


def _describe(source: Source, part: Path, shapes: Shapes) -> None:
    """Writes about.json, without which no folder is a store."""
    about = {
        "dataset": source.dataset.name,
        "split": source.dataset.split,
        "backbone": source.backbone.name,
        "precision": str(source.backbone.precision),
        "mirror": source.mirror,
        "labels": source.dataset.has_labels,
        "n_classes": len(source.dataset.classes),
        "sha256": {name: checksum(part / f"{name}.npy") for name in shapes},
    }
    write_json(part / "about.json", about)
