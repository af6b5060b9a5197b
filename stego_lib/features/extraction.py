"""Extraction: the arrays of a feature store, filled by any number of processes at once."""

import math
import shutil
import time
import zlib
from collections import deque
from contextlib import AbstractContextManager, closing
from functools import cache
from pathlib import Path

import numpy as np
import torch

from ..backbone import Backbone
from ..utils.errors import StegoError, brief
from ..utils.files import Claims, checksum, disk_errors, locked, read_json, write_json
from ..utils.notices import notice
from ..utils.progress import progress, say
from .arrays import create, read_rows, sync, write_rows
from .prefetch import ReadAhead
from .source import NO_LABEL, Shapes, Source

CHECKPOINT_EVERY = 30.0
"""Seconds after which the rows computed so far are synced to the disk: a kill loses at most so much work."""
PREFETCH = 1
"""Batches that are read while the backbone works on another."""
CLAIMS = ".claims"
"""File whose locks say which batches are being computed."""
POLL_EVERY = 0.2
"""Seconds between two looks at whether other processes have finished."""


def usual_batch(backbone: Backbone) -> int:
    """Images that go through the backbone at once."""
    return 64 if backbone.device.type == "cuda" else 16


def needed_bytes(shapes: Shapes) -> int:
    """Bytes of the arrays."""
    return sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in shapes.values())


def missing_bytes(folder: Path, shapes: Shapes) -> int:
    """Bytes that the store `folder` still needs on the disk; a partial store has taken its own already."""
    taken = sum(path.stat().st_blocks * 512 for path in partial(folder).glob("*.npy"))
    return needed_bytes(shapes) - taken


def partial(folder: Path) -> Path:
    """Where the store `folder` lies while it is computed."""
    return folder.with_name(f".{folder.name}.part")


def ensure(source: Source, folder: Path, shapes: Shapes, batch: int | None = None) -> Path:
    """`folder` with the arrays named by `shapes`, computed now unless they are there and intact."""
    if problem(folder, shapes) is None:
        return folder
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _store_lock(folder):
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


def _store_lock(folder: Path) -> AbstractContextManager[None]:
    return locked(
        folder.with_name(f".{folder.name}.lock"), f"another process checks {folder}; waiting for it", wait=True
    )


@cache
def _checksum(path: Path, *_state: int) -> str:
    """Computed once a process and state of the file: a store is read from end to end for it."""
    return checksum(path)


def build(source: Source, folder: Path, shapes: Shapes, batch: int | None = None) -> None:
    """Computes the arrays named by `shapes`; `folder` appears when all are complete.

    Any number of processes, of one run or of several, may call this at once. Each takes batches that no other has, and
    returns when the store is complete. Rows are written to a folder beside it, and recorded when they are synced to the
    disk; after a kill, extraction resumes behind the last record. A batch always has the same rows, so stores are
    identical to the bit.
    """
    work = _Extraction(source, folder, shapes, batch or usual_batch(source.backbone))
    try:
        with _store_lock(folder):
            if folder.exists():
                return
            work.prepare()
        while not folder.exists():
            work.compute()
            with _store_lock(folder):
                if not folder.exists() and work.verify():
                    work.finish()
    finally:
        with _store_lock(folder):
            work.leave()


class _Extraction:
    """What one process does for a store that is not complete."""

    def __init__(self, source: Source, folder: Path, shapes: Shapes, batch: int):
        self.source, self.folder, self.part, self.shapes, self.batch = source, folder, partial(folder), shapes, batch
        self.paths = {name: self.part / f"{name}.npy" for name in shapes}
        self.count = next(iter(shapes.values()))[1][0]
        self.total = math.ceil(self.count / batch)
        self.claims: Claims | None = None
        self.records: dict[Path, dict] = {}
        self.own: set[Path] = set()
        self._start_chunk()

    def prepare(self) -> None:
        """Makes the files of a partial store unless it exists; raises StegoError for what would fail later."""
        self._check_space()
        try:
            arrays = {name: np.load(path, mmap_mode="r") for name, path in self.paths.items()}
            fitting = all((arrays[name].dtype, arrays[name].shape) == known for name, known in self.shapes.items())
        except (OSError, ValueError, EOFError):
            fitting = False
        if not fitting:
            if "features" in self.shapes:
                say(f"features of {self.source}: {needed_bytes(self.shapes) / 1e9:.2f} GB, to be kept in {self.folder}")
            shutil.rmtree(self.part, ignore_errors=True)
            (self.part / "chunks").mkdir(parents=True)
            for name, known in self.shapes.items():
                create(self.paths[name], *known)
        self.claims = Claims(self.part / CLAIMS)

    def _check_space(self) -> None:
        dataset, root = self.source.dataset, self.folder.parent
        if "labels" in self.shapes and len(dataset.classes) > NO_LABEL:
            raise StegoError(f"{dataset.name} has {len(dataset.classes)} classes; {NO_LABEL} at most can be stored")
        needed, free = missing_bytes(self.folder, self.shapes), shutil.disk_usage(root).free
        if needed > 0.95 * free:
            others = [path for path in root.glob(".*.part") if path != self.part]
            left = f"; {others[0]} is unfinished and may be removed" if others else ""
            raise StegoError(
                f"the features of {self.source} take {needed / 1e9:.1f} GB, {root.parent} has {free / 1e9:.1f} GB free"
                f"{left}; name a larger disk with runs_dir, or keep less (feature_store='compact') or none ('online')"
            )

    def compute(self) -> None:
        """Computes batches that no other process has, until all are finished."""
        try:
            self._compute()
        except FileNotFoundError:  # where no claims are possible, another process may complete the store meanwhile
            if not self.folder.exists():
                raise

    def _compute(self) -> None:
        assert self.claims
        source, finished = self.source, self._finished()
        reader = ReadAhead(source.sample if "labels" in self.shapes else source.image, source.dataset.images)
        todo, claimed, others = deque(range(self.total)), deque[int](), deque[int]()
        bar = progress((), f"features of {source}", total=self.total, initial=len(finished))
        with closing(reader), bar:
            while not self.folder.exists():
                while todo and len(claimed) <= PREFETCH:
                    number = todo.popleft()
                    if number in finished:
                        continue
                    if not self.claims.take(number):
                        others.append(number)
                        continue
                    finished = self._finished()
                    if number in finished:  # between the last look and the claim
                        self.claims.release(number)
                        continue
                    reader.prefetch(self._rows(number))
                    claimed.append(number)
                if claimed:
                    self._write(claimed[0], reader.take(self._rows(claimed[0])))
                    claimed.popleft()
                else:
                    self._checkpoint()
                    finished = self._finished()
                    if finished.issuperset(range(self.total)):
                        return
                    todo, others = others, deque()  # one of the processes that have them may have died
                    time.sleep(POLL_EVERY)
                bar.update(len(finished | set(self.chunk)) - bar.n)

    def _rows(self, number: int) -> range:
        return range(number * self.batch, min((number + 1) * self.batch, self.count))

    def _finished(self) -> set[int]:
        """The batches that records count as finished, by whichever process.

        Removes records that are broken, and those of another batch size.
        """
        known, self.records, found = self.records, {}, set[int]()
        for path in (self.part / "chunks").glob("[!.]*"):
            try:
                record = known.get(path) or read_json(path)
                if record["batch"] != self.batch:
                    raise KeyError("batch")
                found |= set(record["batches"])
                self.records[path] = record
            except FileNotFoundError:  # another process has removed it or completed the store
                continue
            except (StegoError, KeyError, TypeError):
                path.unlink(missing_ok=True)
        return found

    def _write(self, number: int, read: list) -> None:
        """Computes a batch from its images (and labels), and writes it."""
        rows, labeled = self._rows(number), "labels" in self.shapes
        images = torch.stack([image for image, _ in read] if labeled else read)
        features = self.source.features(images, rows)
        values = {"images": images, **self.source.stored(features), "pooled": features.mean((2, 3))}
        if labeled:
            values["labels"] = torch.stack([label for _, label in read])
        for name, path in self.paths.items():
            array = values[name].cpu().contiguous().numpy()
            write_rows(path, rows.start, array)
            self.crc[name] = zlib.crc32(array, self.crc[name])
        self.chunk.append(number)
        if time.monotonic() - self.started > CHECKPOINT_EVERY:
            self._checkpoint()

    def _start_chunk(self) -> None:
        self.chunk: list[int] = []
        self.crc, self.started = dict.fromkeys(self.shapes, 0), time.monotonic()

    def _checkpoint(self) -> None:
        """Syncs the batches of this chunk to the disk, records them, and releases their claims."""
        assert self.claims
        if self.chunk:
            for path in self.paths.values():
                sync(path)
            record = self.part / "chunks" / f"{self.chunk[0]:08d}.json"
            write_json(record, {"batch": self.batch, "batches": self.chunk, "crc": self.crc})
            self.own.add(record)
            for number in self.chunk:
                self.claims.release(number)
        self._start_chunk()

    def verify(self) -> bool:
        """Whether all batches are recorded and intact; those of other processes, which may have died, are checked by CRC."""
        intact = self._finished().issuperset(range(self.total))
        for path in self.records.keys() - self.own:
            try:
                batches, crc = self.records[path]["batches"], self.records[path]["crc"]
                good = all(self._crc(name, batches) == crc[name] for name in self.shapes)
            except (KeyError, TypeError):
                good = False
            if not good:
                path.unlink()
                intact = False
        return intact

    def _crc(self, name: str, batches: list[int]) -> int:
        found = 0
        for number in batches:
            found = zlib.crc32(read_rows(self.paths[name], self._rows(number)).data, found)
        return found

    def finish(self) -> None:
        """Writes about.json, without which no folder is a store, and renames the folder."""
        dataset, backbone = self.source.dataset, self.source.backbone
        about = {
            "dataset": dataset.name,
            "split": dataset.split,
            "backbone": backbone.name,
            "precision": str(backbone.precision),
            "mirror": self.source.mirror,
            "labels": dataset.has_labels,
            "n_classes": len(dataset.classes),
            "sha256": {name: checksum(path) for name, path in self.paths.items()},
        }
        write_json(self.part / "about.json", about)
        self.part.rename(self.folder)
        (self.folder / CLAIMS).unlink()
        shutil.rmtree(self.folder / "chunks")

    def leave(self) -> None:
        """Releases the claims; gives the disk back where nothing is recorded and nobody else works."""
        if self.part.exists() and not any((self.part / "chunks").glob("*.json")):
            self.claims = self.claims or Claims(self.part / CLAIMS)
            if self.claims.alone():
                shutil.rmtree(self.part)
        if self.claims:
            self.claims.close()
