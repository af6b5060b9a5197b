"""Extraction: the arrays of a feature store, filled by any number of processes at once."""

import math
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..backbone import Backbone
from ..datasets.intact import check_files
from ..runtime.errors import StegoError, brief
from ..runtime.files import Claims, checksum, explained, locked, read_json, write_json
from ..runtime.notices import notice
from ..runtime.progress import progress, say
from .arrays import ArrayFile, crc, create
from .prefetch import ReadAhead
from .source import NO_LABEL, Shapes, Source

KEEP_EVERY = 30.0
"""Seconds after which the rows computed so far are synced to the disk: a kill loses at most so much work."""
AHEAD = 1
"""Batches that are read while the backbone works on another."""
CLAIMS = ".claims"
"""File whose locks say which batches are being computed."""
LOOK_EVERY = 0.2
"""Seconds between two looks at whether other processes have finished."""


def usual_batch(backbone: Backbone) -> int:
    """Images that go through the backbone at once."""
    return 64 if backbone.device.type == "cuda" else 16


def needed_bytes(shapes: Shapes) -> int:
    """Bytes of the arrays."""
    return sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in shapes.values())


def taken_bytes(folder: Path) -> int:
    """Bytes that an unfinished store occupies on the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.glob("*.npy")) if folder.is_dir() else 0


def unfinished(folder: Path) -> Path:
    """Where the store `folder` lies while it is computed."""
    return folder.with_name(f".{folder.name}.part")


def ensure(source: Source, folder: Path, shapes: Shapes, batch: int | None = None) -> Path:
    """`folder` with the arrays named by `shapes`, computed now unless they are there and intact."""
    if problem(folder, shapes) is None:
        return folder
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock"), f"another process checks {folder}; waiting for it", wait=True):
            if folder.exists() and (reason := problem(folder, shapes)):
                notice(f"{folder} is damaged ({reason}); its features are computed anew")
                shutil.rmtree(folder)
        build(source, folder, shapes, batch)
    return folder


def problem(folder: Path, shapes: Shapes) -> str | None:
    """Why the store in `folder` cannot be used, or None: missing files, other shapes, other checksums."""
    try:
        sums = read_json(folder / "about.json")["sha256"]
        for name, (dtype, shape) in shapes.items():
            path = folder / f"{name}.npy"
            array = np.load(path, mmap_mode="r")
            if (array.dtype, array.shape) != (dtype, shape):
                return f"{path.name} holds {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}"
            state = path.stat()
            if _checksum(path, state.st_ino, state.st_size, state.st_mtime_ns) != sums[name]:
                return f"{path.name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except Exception as error:  # numpy's reader raises whatever it stumbles over
        return brief(error)
    return None


@cache
def _checksum(path: Path, *_state: int) -> str:
    """Computed once a process and state of the file: a store is read from end to end for it."""
    return checksum(path)


def build(source: Source, folder: Path, shapes: Shapes, batch: int | None = None) -> None:
    """Computes the arrays named by `shapes`; `folder` appears when all are complete.

    Any number of processes may call this at once, of one run or of several: each takes batches that no other has, and returns
    when the store is complete. Rows are written to a folder beside it, and recorded when they are synced to the disk; after a
    kill, extraction resumes behind the last record. A batch always has the same rows, so stores are equal to the bit.
    """
    part, size, own = unfinished(folder), batch or usual_batch(source.backbone), set[Path]()
    claims = None
    try:
        with _store_lock(source, folder):
            if folder.exists():
                return
            _prepare(source, folder, part, shapes)
            claims = Claims(part / CLAIMS)
        while not folder.exists():
            _fill(source, folder, part, shapes, size, claims, own)
            with _store_lock(source, folder):
                if not folder.exists() and _verified(part, shapes, size, own):
                    _describe(source, part, shapes)
                    part.rename(folder)
                    (folder / CLAIMS).unlink()
                    shutil.rmtree(folder / "chunks")  # last: an unfinished store without them starts again
    finally:
        with _store_lock(source, folder):
            if part.exists() and not list((part / "chunks").glob("*.json")):
                claims = claims or Claims(part / CLAIMS)
                if claims.alone():
                    shutil.rmtree(part)  # nothing is recorded: the disk is given back
            if claims:
                claims.close()


@contextmanager
def _store_lock(source: Source, folder: Path) -> Iterator[None]:
    busy = f"another process checks the features of {source}; waiting for it"
    with locked(folder.with_name(f".{folder.name}.lock"), busy, wait=True):
        yield


def _prepare(source: Source, folder: Path, part: Path, shapes: Shapes) -> None:
    """Makes the files of an unfinished store, unless there are fitting ones; raises StegoError for what would fail later."""
    _check_space(folder, source, shapes)
    try:
        arrays = {name: ArrayFile(part / f"{name}.npy") for name in shapes}
        if all((arrays[name].dtype, arrays[name].shape) == known for name, known in shapes.items()):
            return
    except (OSError, ValueError, EOFError):
        pass
    check_files(source.dataset)
    if "features" in shapes:
        say(f"features of {source}: {needed_bytes(shapes) / 1e9:.2f} GB, to be kept in {folder}")
    shutil.rmtree(part, ignore_errors=True)
    (part / "chunks").mkdir(parents=True)
    for name, known in shapes.items():
        create(part / f"{name}.npy", *known)


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


def _rows(number: int, batch: int, count: int) -> range:
    return range(number * batch, min((number + 1) * batch, count))


def _count(shapes: Shapes) -> int:
    return next(iter(shapes.values()))[1][0]


class _Finished:
    """The batches that records count as finished, by whichever process."""

    def __init__(self, part: Path, batch: int):
        self._folder, self._batch = part / "chunks", batch
        self.records: dict[Path, dict] = {}
        self.numbers: set[int] = set()
        self.update()

    def update(self) -> None:
        """Reads new records; removes broken ones, and those of another batch size."""
        for path in self._folder.glob("[!.]*"):
            if path in self.records:
                continue
            try:
                record = read_json(path)
                if record["batch"] != self._batch:
                    raise KeyError("batch")
                self.numbers |= set(record["batches"])
                self.records[path] = record
            except FileNotFoundError:  # another process has completed the store
                return
            except (StegoError, KeyError, TypeError):
                path.unlink(missing_ok=True)


def _fill(
    source: Source, folder: Path, part: Path, shapes: Shapes, batch: int, claims: Claims, own: set[Path]
) -> None:
    """Computes batches that no other process has, until all are finished. `own` collects the records written here."""
    count, labeled = _count(shapes), "labels" in shapes
    total, finished = math.ceil(count / batch), _Finished(part, batch)
    chunk = _Chunk(part / "chunks", batch, {name: ArrayFile(part / f"{name}.npy", write=True) for name in shapes}, claims, own)
    reader = ReadAhead(source.sample if labeled else source.image, source.dataset.images)
    todo, claimed, others = deque(range(total)), deque[int](), deque[int]()
    try:
        with progress((), f"features of {source}", total=total, initial=len(finished.numbers)) as bar:
            while not folder.exists():
                while todo and len(claimed) <= AHEAD:
                    number = todo.popleft()
                    if number in finished.numbers:
                        continue
                    if not claims.take(number):
                        others.append(number)
                        continue
                    finished.update()
                    if number in finished.numbers:  # between the last look and the claim
                        claims.release(number)
                        continue
                    reader.prefetch(_rows(number, batch, count))
                    claimed.append(number)
                if claimed:
                    rows = _rows(claimed[0], batch, count)
                    read = reader.take(rows)
                    images, labels = zip(*read, strict=True) if labeled else (read, ())
                    chunk.add(claimed.popleft(), rows, _computed(source, rows, torch.stack(list(images)), labels))
                else:
                    chunk.keep()
                    finished.update()
                    if len(finished.numbers) == total:
                        return
                    todo, others = others, deque()  # one of them may have died
                    time.sleep(LOOK_EVERY)
                bar.update(len(finished.numbers | set(chunk.batches)) - bar.n)
    finally:
        reader.close()


def _computed(source: Source, rows: range, images: Tensor, labels: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """The values of every array of a store at these rows."""
    found = source.features(images, rows)
    values = {"images": images, "features": found.half(), "pooled": found.mean((2, 3))}
    if labels:
        values["labels"] = torch.stack(list(labels))
    return {name: value.cpu().numpy() for name, value in values.items()}


class _Chunk:
    """Batches that are written and not yet recorded."""

    def __init__(
        self, folder: Path, batch: int, arrays: dict[str, ArrayFile], claims: Claims, own: set[Path]
    ):
        self._folder, self._batch, self._arrays, self._claims, self._own = folder, batch, arrays, claims, own
        self._clear()

    def _clear(self) -> None:
        self.batches: list[int] = []
        self._crc = dict.fromkeys(self._arrays, 0)
        self._start = time.monotonic()

    def add(self, number: int, rows: range, values: dict[str, np.ndarray]) -> None:
        """Writes a batch."""
        for name, array in self._arrays.items():
            array.write(rows, values[name])
            self._crc[name] = crc(values[name], self._crc[name])
        self.batches.append(number)
        if time.monotonic() - self._start > KEEP_EVERY:
            self.keep()

    def keep(self) -> None:
        """Syncs the batches to the disk, records them, and releases their claims."""
        if self.batches:
            for array in self._arrays.values():
                array.sync()
            path = self._folder / f"{self.batches[0]:08d}.json"
            write_json(path, {"batch": self._batch, "batches": self.batches, "crc": self._crc})
            self._own.add(path)
            for number in self.batches:
                self._claims.release(number)
        self._clear()


def _verified(part: Path, shapes: Shapes, batch: int, own: set[Path]) -> bool:
    """Whether all batches are recorded and intact. Records of other processes, which may have died, are checked by CRC."""
    count, finished = _count(shapes), _Finished(part, batch)
    arrays = {name: ArrayFile(part / f"{name}.npy") for name in shapes}
    intact = len(finished.numbers) == math.ceil(count / batch)
    for path in finished.records.keys() - own:
        record = finished.records[path]
        try:
            rows = [row for number in record["batches"] for row in _rows(number, batch, count)]
            good = all(_crc(arrays[name], rows) == record["crc"][name] for name in shapes)
        except (KeyError, TypeError, IndexError):
            good = False
        if not good:
            path.unlink()
            intact = False
    return intact


def _crc(array: ArrayFile, rows: list[int]) -> int:
    found = 0
    for row in rows:
        found = crc(array.read([row]), found)
    return found


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
