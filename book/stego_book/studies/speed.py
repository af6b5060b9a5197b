"""Time and memory: results of `make bench`, goals, and a cost model."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from stego_lib.utils.errors import StegoError
from stego_lib.utils.files import read_json

# Steps and batch size of the paper's recipe for Cityscapes.
STEPS, BATCH = 7_000, 32
CITYSCAPES_CROPS = 14_875
# Number of training images (with crops) of the paper's datasets and of larger ones.
IMAGES = {
    "Potsdam": 4_545,
    "Cityscapes, five crops": CITYSCAPES_CROPS,
    "CocoStuff-27, five crops": 5 * 49_629,
    "a million": 1_000_000,
    "ten million": 10_000_000,
}


def read_results(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The results in `folder` and their files, oldest first, without trials (`--tiny`)."""
    results = [(path, read_json(path)) for path in sorted(folder.glob("*.json"))]
    results = [(path, result) for path, result in results if not result["settings"]["tiny"]]
    if not results:
        raise StegoError(f"{folder} contains no results. Measure them with make bench (half an hour).")
    return sorted(results, key=lambda item: item[1]["machine"]["date"])


def newest_results(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The latest result with the most rows, and its file."""
    return max(read_results(folder), key=lambda item: (len(item[1]["rows"]), item[1]["machine"]["date"]))


def newest_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The latest measurement of each row, with its "machine"."""
    return {
        name: row | {"machine": result["machine"]}
        for _, result in read_results(folder)
        for name, row in result["rows"].items()
    }


def exports(row: dict[str, Any]) -> pd.DataFrame:
    """One row per exported file: megabytes, pixels (%) with the label of `Run.predict`, seconds per image."""
    lines = {}
    for kind, measured in row["kinds"].items():
        images = f"{kind}, {measured['image'][0]} x {measured['image'][1]}"
        seconds = _medians(measured)
        lines[images, "Run.predict"] = [None, None, seconds["predict"]]
        for precision, file in measured["files"].items():
            time = seconds[f"onnxruntime, {precision}"]
            lines[images, precision] = [file["bytes"] / 1e6, 100 * file["agreement"], time]
    table = pd.DataFrame.from_dict(lines, orient="index", columns=["MB", "agreement (%)", "seconds per image"])
    return table.set_axis(pd.MultiIndex.from_tuples(table.index, names=["images", "file"]))


def label_maps(rows: dict[str, Any]) -> pd.DataFrame:
    """Seconds, peak memory in GB, and megapixels (MP) per second of `Run.predict` and of a large raster."""
    lines = {
        name: (value["seconds"], value["peak_bytes"] / 1e9, value["pixels"] / 1e6 / value["seconds"])
        for name, value in rows["predict"]["images"].items()
    }
    large = rows["raster"]
    values = (large["seconds"], large["peak_bytes"] / 1e9, large["megapixels"] / large["seconds"])
    lines[f"GeoTIFF of {large['megapixels']:.0f} MP, tiles"] = values
    columns = ["seconds", "peak memory (GB)", "MP per second"]
    return pd.DataFrame.from_dict(lines, orient="index", columns=columns).rename_axis("image")


def goals(rows: dict[str, Any]) -> pd.DataFrame:
    """One row per goal: target, measurement, reached. Factors are relative to the baseline in the same run."""
    lines: dict[str, tuple[str, str, str]] = {}

    def add(work: str, goal: str, value: float, form: str, reached: bool) -> None:
        measured = (form.format(value), "yes" if reached else "no")
        lines[work] = (goal, *(("not measured", "") if math.isnan(value) else measured))

    def factor(work: str, goal: float, row: Any, slow: str, fast: str) -> None:
        seconds = _medians(row) if row else {}
        ratio = seconds.get(slow, math.nan) / seconds.get(fast, math.nan)
        add(work, f"{goal:g} x", ratio, "{:.2f} x", ratio >= goal)

    factor("training step from the store, batch 16", 25, rows.get("step"), "published", "store")
    factor("training step online, bfloat16, batch 16", 4, rows.get("step"), "published", "online bfloat16")
    factor("head, loss and probes", 1.5, rows.get("rest"), "published", "ours")
    factor("extraction, float32", 1.7, rows.get("extraction"), "published", "float32")
    factor("extraction, bfloat16", 6, rows.get("extraction"), "published", "bfloat16")
    for kind, row in rows.get("evaluation", {}).get("kinds", {}).items():
        factor(f"evaluation, no CRF, {kind}", 5, row, "published, no CRF", "ours, no CRF")
        seconds = _medians(row)
        if {"published, its CRFs", "ours, with CRF"} <= set(seconds):
            published = seconds["published, no CRF"] + seconds["published, its CRFs"]
            ratio = published / seconds["ours, with CRF"]
            add(f"evaluation, with CRF, {kind}", "4 x", ratio, "{:.2f} x", ratio >= 4)
    cosine = _get(rows, "extraction", "bfloat16_cosine", "mean")
    add("cosine of bfloat16 to float32 features", ">= 0.999", cosine, "{:.5f}", cosine >= 0.999)
    minutes = _get(rows, "recipe", "total_s") / 60
    add("Cityscapes-sized recipe, ViT-S/8, extrapolated", "< 60 min", minutes, "{:.1f} min", minutes < 60)
    minutes = _get(rows, "full_recipe", "total_s") / 60
    add("Cityscapes-sized recipe, ViT-B/8, one GPU", "< 3 min", minutes, "{:.1f} min", minutes < 3)
    size = _get(rows, "memory", "peak_bytes") / 1e9
    add("peak memory of training, store of 10 GB", "< 3 GB", size, "{:.2f} GB", size < 3)
    size = _get(rows, "neighbors", "extrapolated", "bytes") / 1e9
    add("neighbors of 600,000 images, extrapolated", "< 8 GB", size, "{:.2f} GB", size < 8)
    share = _get(rows, "compact", "bytes", "full") / _get(rows, "compact", "bytes", "compact")
    add("compact store: bytes of features", "<= 1/6 of float16", share, "1/{:.1f}", share >= 6)
    error = _get(rows, "compact", "error", "measured")
    add("compact store: mean error of a correspondence", "< 0.01", error, "{:.4f}", error < 0.01)
    factor("compact store: a random batch, of the full store", 1, rows.get("compact"), "full store", "compact store")
    table = pd.DataFrame.from_dict(lines, orient="index", columns=["goal", "measured", "reached"])
    return table.rename_axis("work")


def _medians(row: dict[str, Any]) -> dict[str, float]:
    return {way: times["median_s"] for way, times in row["ways"].items()}


def _get(values: Any, *keys: str) -> float:
    """A number inside nested dictionaries, or NaN."""
    for key in keys:
        values = (values or {}).get(key)
    return math.nan if values is None else values


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes of the parts of training with ViT-S/8 at 224 px on the measured machine."""

    extraction_s: float
    """Backbone, per image."""
    step_s: float
    """Training step from a store."""
    pair_s: float
    """Neighbor search, per pair of images."""
    published_extraction_s: float
    """Backbone of the baseline, per image."""
    published_rest_s: float
    """Rest of the baseline's training step."""
    bytes: int = 2 * 384 * 28 * 28 + 4 * 224 * 224 + 4 * 384
    """Store, per image: float16 features, uint8 image and labels, float32 mean feature."""
    compact_bytes: int = 128 * (28 * 28 + 4) + 4 * 384
    """Compact store, per image, at most: a third of the channels as uint8, their scales, float32 mean feature."""

    def store(self, images: float, machines: int = 1) -> float:
        """Training time from a store: feature extraction split over machines, neighbors, steps."""
        return images * self.extraction_s / machines + images**2 * self.pair_s + STEPS * self.step_s

    def online(self, images: float) -> float:
        """Training time without a store: features once for the neighbors, and of two batches at every step."""
        return self.store(images) + STEPS * 2 * BATCH * self.extraction_s

    def published(self, images: float) -> float:
        """Training time in the published order of work."""
        first = images * self.published_extraction_s + images**2 * self.pair_s
        return first + STEPS * (2 * BATCH * self.published_extraction_s + self.published_rest_s)

    def shared_from(self) -> float:
        """Number of images above which feature extraction takes longer than the steps."""
        return STEPS * self.step_s / self.extraction_s


def costs(rows: dict[str, Any]) -> Costs:
    """The cost model from the rows of a result. Raises StegoError if rows are missing."""
    if missing := [name for name in ("extraction", "rest", "recipe", "neighbors") if name not in rows]:
        raise StegoError(f"the cost model needs more rows. Run make bench ARGS={' '.join(missing)!r}.")
    extraction, rest, many = rows["extraction"], rows["rest"], rows["neighbors"]["many"]
    seconds = _medians(extraction)
    return Costs(
        extraction_s=min(value for way, value in seconds.items() if way != "published") / extraction["batch"],
        step_s=rows["recipe"]["measured"]["step"]["median_s"],
        pair_s=many["seconds"] / many["images"] ** 2,
        published_extraction_s=seconds["published"] / extraction["batch"],
        published_rest_s=_medians(rest)["published"] / rest["batch"] * BATCH,
    )


def plan(model: Costs, images: dict[str, int]) -> pd.DataFrame:
    """Training time and store sizes, one row per dataset size, for images of 224 px."""
    table = {}
    for name, count in images.items():
        hours = {"store": model.store(count), "store, 8 machines": model.store(count, 8)}
        hours |= {"online": model.online(count), "published order": model.published(count)}
        sizes = {"store takes": count * model.bytes, "compact store takes at most": count * model.compact_bytes}
        shown = {way: f"{seconds / 3600:.{0 if seconds > 36_000 else 1}f} h" for way, seconds in hours.items()}
        table[f"{name}, {count:,} images"] = shown | {title: _size_text(size) for title, size in sizes.items()}
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("dataset")


def _size_text(size: float) -> str:
    power = min(4, max(2, math.floor(math.log10(size) / 3)))
    return f"{size / 1000**power:.1f} {('MB', 'GB', 'TB')[power - 2]}"
