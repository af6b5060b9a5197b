"""Stores of features, in shards on disk."""

import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backbone import Backbone
from ..datasets.base import Sample, SegmentationDataset
from ..datasets.layout import checksum_of
from ..datasets.transforms import Size, resize_image, resize_label
from ..utils import devices
from ..utils.errors import StegoError, enough_memory
from ..utils.files import atomic_folder, disk_errors, fingerprint, read_json, write_json
from ..utils.paths import shown_path
from ..utils.progress import progress, say
from ..utils.threads import READERS, in_threads
from .base import NO_LABEL, Features

# Version of the content and layout of stores; other versions are not used.
VERSION = 6
# Bytes of the header of a .npy file.
HEADER = 128
# Images per shard.
SHARD = 1024
# Share of a GPU's free memory that features may use; training needs the rest.
GPU_SHARE = 0.6
# Seconds to wait for the shards of other processes before computing them.
SHARD_TIMEOUT = 3600

# Name of an array -> type and shape of a row.
Arrays = dict[str, tuple[type, tuple[int, ...]]]
Encode = Callable[[Tensor, list[Sample]], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Source:
    """A split at one size and a backbone; computes rows. For `mirror` and `published` see `open_features`."""

    dataset: SegmentationDataset
    backbone: Backbone
    size: Size
    mirror: bool = False
    published: bool = False

    def __str__(self) -> str:
        return f"{self.dataset.name} {self.dataset.split}{' (mirrored)' if self.mirror else ''}"

    @property
    def image_size(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.dataset), self.backbone.dim, *self.backbone.grid(*self.image_size))

    def sample(self, row: int) -> Sample:
        """Reads an image, uint8 (3, H, W), and its label map, uint8 (H, W), resized."""
        sample = self.dataset.sample(row)
        label = None if sample.label is None else resize_label(sample.label, self.size)
        if label is not None:
            label = label.masked_fill(label < 0, NO_LABEL).to(torch.uint8)
        return replace(sample, image=resize_image(sample.image, self.size, self.published), label=label)

    def image(self, row: int) -> Tensor:
        return resize_image(self.dataset.image(row), self.size, self.published)

    def label(self, row: int) -> Tensor | None:
        return self.sample(row).label

    def features(self, images: Tensor) -> Tensor:
        """Features, float32 (B, C, h, w), of uint8 images (B, 3, H, W)."""
        with enough_memory(f"features of {self}", "Lower train_size or eval_size."):
            features = self.backbone(images.flip(-1) if self.mirror else images)
        if not features.half().isfinite().all():
            problem = f"features of {self} by backbone {self.backbone.name!r} overflow float16"
            raise StegoError(f"{problem}. Check its weights, or use precision='float32'.")
        return features

    @property
    def batch(self) -> int:
        """Batch size of the backbone; crops of one file stay together."""
        count = 64 if self.backbone.device.type == "cuda" else 16
        return count // self.dataset.pieces * self.dataset.pieces


class Reader:
    """Reads rows in threads. One thread reads all crops of a file, so the file is read once."""

    def __init__(self, read: Callable[[int], Any], pieces: int):
        self._read, self._pieces = read, pieces
        self._pool = ThreadPoolExecutor(os.cpu_count(), "reading")
        self._futures: dict[int, tuple[Future, int]] = {}

    def prefetch(self, rows: Sequence[int]) -> None:
        """Starts reading rows, unless they are being read."""
        new = [row for row in dict.fromkeys(rows) if row not in self._futures]
        for _, group in groupby(new, key=lambda row: row // self._pieces):
            crops = list(group)
            future = self._pool.submit(lambda numbers: [self._read(row) for row in numbers], crops)
            self._futures |= {row: (future, position) for position, row in enumerate(crops)}

    def take(self, rows: Sequence[int]) -> list:
        """Returns rows, or raises the error of one that cannot be read."""
        self.prefetch(rows)
        futures = {row: self._futures.pop(row) for row in dict.fromkeys(rows)}
        return [futures[row][0].result()[futures[row][1]] for row in rows]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def content_fingerprints(dataset: SegmentationDataset, root: Path) -> dict[str, str | None]:
    """Fingerprints of the content of a split's images and label maps.

    Reads all files, unless their names, sizes and modification times are those of a result cached in `root`.
    """
    path = _cache(root, _listing(dataset))
    if not path.exists():
        files = list(dict.fromkeys(filter(None, [*dataset.images, *dataset.labels])))  # crops share a file
        checksums = in_threads(checksum_of, files, READERS)
        bar = progress(checksums, f"checksums of {dataset.name}", total=len(files))
        digests: dict[Path | None, str | None] = {None: None} | dict(zip(files, bar, strict=True))
        write_json(path, _combine(dataset, [digests[p] for p in dataset.images], [digests[p] for p in dataset.labels]))
    return read_json(path)


def _cache(root: Path, listing: str) -> Path:
    return root / ".contents" / f"{listing}.json"


def _listing(dataset: SegmentationDataset) -> str:
    return fingerprint([*dataset.settings(labels=True), *dataset.listing()])


def _combine(dataset: SegmentationDataset, images: Sequence, labels: Sequence) -> dict[str, str | None]:
    """Combines the SHA-256 of the files of each row into fingerprints of images and label maps."""
    image_files = [(path.name, digest) for path, digest in zip(dataset.images, images, strict=True)]
    label_files = [(path.name, digest) for path, digest in zip(dataset.labels, labels, strict=True) if path]
    labeled = fingerprint([*dataset.settings(labels=True), label_files]) if dataset.has_labels else None
    return {"images": fingerprint([*dataset.settings(labels=False), image_files]), "labels": labeled}


class Store:
    """Arrays with one row per image, in shards: FOLDER/shard-00000/NAME.npy and shard.json.

    A complete shard appears by renaming; about.json follows the last one. The folder's name depends on the settings and
    on the names, sizes and modification times of the files, so a changed file gives a new store. If only the location
    or the modification times have changed, the existing store is used.
    """

    def __init__(self, source: Source, root: Path, kind: str, *settings: object):
        dataset, backbone = source.dataset, source.backbone
        self.source, self._root, self._listing = source, root, _listing(dataset)
        self._resident: dict[str, Tensor] = {}
        rows = SHARD // dataset.pieces * dataset.pieces
        self._shards = [range(start, min(start + rows, len(dataset))) for start in range(0, len(dataset), rows)]
        rules = (VERSION, *dataset.settings(labels=True), source.size, source.mirror, source.published)
        stem = f"{dataset.name}-{dataset.split}-{kind}-{fingerprint(*rules, backbone.fingerprint(), *settings)}"
        self.folder = root / f"{stem}-{self._listing}"
        others = () if (self.folder / "about.json").exists() else sorted(root.glob(f"{stem}-*/about.json"))
        for path in others:  # of files with other names or modification times
            about = read_json(path)
            if about["images"] == len(dataset) and about["fingerprints"] == content_fingerprints(dataset, root):
                self.folder = path.parent

    def complete(self, arrays: Arrays, encode: Encode) -> None:
        """Computes missing shards.

        arrays: the arrays to store in addition to "pooled". encode: converts float32 features (B, C, h, w) and samples
        to a batch of each array.
        """
        self.arrays: Arrays = arrays | {"pooled": (np.float32, (self.source.backbone.dim,))}
        self._encode = encode
        about = self.folder / "about.json"
        with disk_errors(self.folder):
            if missing := [number for number in range(len(self._shards)) if not self._shard(number).exists()]:
                self._extract(missing)
            if missing or not about.exists():
                write_json(about, self._about())
                for path in self.folder.glob(".shard-*"):  # left by killed processes
                    shutil.rmtree(path, ignore_errors=True)
        self.about = read_json(about)

    def read(self, name: str, index: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Reads rows of an array to `device`."""
        resident = self._resident.get(name)
        if resident is not None and resident.device == torch.device(device):
            return resident[index.to(device)]
        rows, (dtype, shape), size = index.tolist(), self.arrays[name], self._row_bytes(name)
        values: np.ndarray = np.empty((len(rows), *shape), dtype)
        # Not by memory maps: opening them takes a fifth more time, and open ones count as the process's memory.
        order = sorted(range(len(rows)), key=rows.__getitem__)
        for number, group in groupby(order, lambda i: rows[i] // len(self._shards[0])):
            path, shard = self._shard(number) / f"{name}.npy", self._shards[number]
            with disk_errors(path), open(path, "rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != HEADER + len(shard) * size:
                    raise StegoError(f"{path} is damaged. Delete the folder {path.parent}.")
                for i in group:
                    file.seek(HEADER + (rows[i] - shard.start) * size)
                    file.readinto(values[i])
        return torch.from_numpy(values).to(device)

    def keep_on(self, device: torch.device, names: tuple[str, ...], free: int | None = None) -> bool:
        """Copies arrays to a GPU if they fit, see `Features.keep_on`."""
        if free is None:
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        if len(self.source.dataset) * sum(map(self._row_bytes, names)) > GPU_SHARE * free:
            return False
        shards = [torch.tensor(shard) for shard in self._shards]
        try:
            self._resident = {name: torch.cat([self.read(name, shard, device) for shard in shards]) for name in names}
        except torch.OutOfMemoryError:  # other processes may use the GPU
            return False
        return True

    def _shard(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}"

    def _row_bytes(self, name: str) -> int:
        dtype, shape = self.arrays[name]
        return np.dtype(dtype).itemsize * math.prod(shape)

    def _extract(self, missing: list[int]) -> None:
        """Computes every n-th missing shard, and waits for the shards of other processes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = sum(len(self._shards[number]) for number in missing) * sum(map(self._row_bytes, self.arrays))
        free = shutil.disk_usage(self.folder).free
        if needed > 0.95 * free:
            raise StegoError(
                f"features of {self.source} need {needed / 1e9:.1f} GB, but {self._root} has {free / 1e9:.1f} GB free. "
                "Use another runs_dir, feature_store='compact' or feature_store='online'."
            )
        rank, count = (devices.read_ranks() or (0, 1))[:2]
        own = [number for number in missing if number % count == rank]
        if rank == 0:
            say(f"features of {self.source}: {needed / 1e9:.2f} GB in {shown_path(self.folder)}")
        reader = Reader(self.source.sample, self.source.dataset.pieces)
        total = sum(len(self._shards[number]) for number in own)
        with closing(reader), progress((), f"features of {self.source}", total=total) as bar:
            for number in own:
                self._compute(number, reader, bar.update)
            started = time.monotonic()
            for number in set(missing).difference(own):
                while not self._shard(number).exists() and time.monotonic() - started < SHARD_TIMEOUT:
                    time.sleep(0.2)
                self._compute(number, reader, bar.update)  # unless it exists

    def _compute(self, number: int, reader: Reader, advance: Callable[[int], object]) -> None:
        """Writes a shard to a temporary folder and renames it, unless it exists."""
        rows, shard = self._shards[number], self._shard(number)
        if shard.exists():
            return
        with atomic_folder(shard) as temporary:
            size, digests, pixels = self.source.batch, [], np.zeros(256, np.int64)
            for start in range(0, len(rows), size):
                batch = rows[start : start + size]
                samples = reader.take(batch)
                reader.prefetch(rows[start + size : start + 2 * size])
                features = self.source.features(torch.stack([sample.image for sample in samples]))
                arrays = self._encode(features, samples) | {"pooled": features.mean((2, 3))}
                for name, values in arrays.items():
                    _append(temporary / f"{name}.npy", values, len(rows))
                for sample in samples:
                    digests.append([sample.image_sha256, sample.label_sha256])
                    if sample.label is not None:
                        pixels += np.bincount(sample.label.numpy().ravel(), minlength=256)
                advance(len(batch))
            counts = pixels[: len(self.source.dataset.classes)].tolist()
            write_json(temporary / "shard.json", {"class_pixels": counts, "digests": digests})

    def _about(self) -> dict[str, Any]:
        """Content of about.json."""
        dataset = self.source.dataset
        shards = [read_json(self._shard(number) / "shard.json") for number in range(len(self._shards))]
        fingerprints = _combine(dataset, *zip(*(pair for shard in shards for pair in shard["digests"]), strict=True))
        write_json(_cache(self._root, self._listing), fingerprints)
        pixels = np.sum([shard["class_pixels"] for shard in shards], axis=0).tolist()
        pixels = pixels if dataset.has_labels else None
        return {"images": len(dataset), "fingerprints": fingerprints, "class_pixels": pixels}


def _append(path: Path, rows: Tensor, total: int) -> None:
    """Appends rows to a .npy file of `total` rows; creates the file if necessary."""
    array = rows.cpu().contiguous().numpy()
    with open(path, "ab") as file:
        if file.tell() == 0:
            header = {"descr": array.dtype.str, "fortran_order": False, "shape": (total, *array.shape[1:])}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(array.data)


class FullFeatures(Features):
    """Features, label maps and images stored on disk."""

    kind = "full"
    resident = ("features",)

    def __init__(self, source: Source, root: Path):
        super().__init__(source, root)
        arrays: Arrays = {"features": (np.float16, self.shape[1:]), "images": (np.uint8, (3, *self.image_size))}
        if source.dataset.has_labels:
            arrays["labels"] = (np.uint8, self.image_size)
        self.store = Store(source, root, "full")
        self.store.complete(arrays, self._encode)

    def _encode(self, features: Tensor, samples: list[Sample]) -> dict[str, Tensor]:
        arrays = {"features": features.half(), "images": torch.stack([sample.image for sample in samples])}
        labels = [sample.label for sample in samples if sample.label is not None]
        return arrays | ({"labels": torch.stack(labels)} if labels else {})

    def rows(self, index: Tensor, device: torch.device | str = "cpu") -> Tensor:
        # In channels-last order, the head's 1 x 1 convolutions are matrix products.
        return self.store.read("features", index, device).to(torch.float32, memory_format=torch.channels_last)

    def stored_labels(self, index: Tensor) -> Tensor:
        return self.store.read("labels", index)

    def image_rows(self, index: Tensor) -> Tensor:
        return self.store.read("images", index)
