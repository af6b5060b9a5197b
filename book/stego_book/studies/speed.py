"""Time and memory: the results of `make bench`, the goals beside them, and a cost model."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from stego_lib.features.compact import MOST
from stego_lib.neighbors_approximate import EXACT
from stego_lib.utils.errors import StegoError
from stego_lib.utils.files import read_json

STEPS, BATCH = 7_000, 32
"""Of the paper's recipe for Cityscapes."""
CITYSCAPES_CROPS = 14_875
IMAGES = {
    "Potsdam": 4_545, "Cityscapes, five crops": CITYSCAPES_CROPS, "CocoStuff-27, five crops": 5 * 49_629, "a million": 1_000_000,
    "ten millions": 10_000_000,
}  # fmt: skip
"""Training images of the paper's datasets as its recipes cut them, and more."""
NETWORK = "ViT-S/8, 224 px"
"""What the cost model is of: a grid of 28 x 28 cells with 384 channels."""


def newest_results(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The newest result in `folder` that has every row of the table (or, if none has, the most of them), and its file.

    Results of a trial (`--tiny`) do not count. Raises StegoError where there is none.
    """
    found = [(path, read_json(path)) for path in sorted(folder.glob("*.json"))]
    found = [(path, result) for path, result in found if not result["settings"]["tiny"]]
    if not found:
        raise StegoError(f"{folder} holds no results; make bench measures them (half an hour)")
    return max(found, key=lambda item: (len(item[1]["rows"]), item[1]["machine"]["date"]))


def on_a_gpu(folder: Path) -> dict[str, Any]:
    """The newest row "full_recipe" that a GPU gave, by that name, with the "gpu" it was; empty where there is none."""
    results = [read_json(path) for path in folder.glob("*.json")]
    found = [result for result in results if result["machine"]["gpu"] and not result["settings"]["tiny"]]
    found = [result for result in found if "full_recipe" in result["rows"]]
    if not found:
        return {}
    newest = max(found, key=lambda result: result["machine"]["date"])
    return {"full_recipe": newest["rows"]["full_recipe"] | {"gpu": newest["machine"]["gpu"]}}


def exports(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """One row for each file of `make bench ARGS=exports`: megabytes, agreement with `Run.predict` in percent of pixels, seconds
    per image; and the machine that measured it.

    Raises StegoError where no result holds them.
    """
    measured, machine = newest_row(folder, "exports")
    lines = {}
    for kind, row in measured["kinds"].items():
        seconds = {way: times["median_s"] for way, times in row["ways"].items()}
        images = f"{kind}, {row['image'][0]} x {row['image'][1]}"
        lines[images, "Run.predict"] = [None, None, seconds["predict"]]
        for precision, file in row["files"].items():
            lines[images, precision] = [
                file["bytes"] / 1e6,
                100 * file["agreement"],
                seconds[f"onnxruntime, {precision}"],
            ]
    table = pd.DataFrame.from_dict(lines, orient="index", columns=["MB", "agreement (%)", "seconds per image"])
    table.index = pd.MultiIndex.from_tuples(table.index, names=["images", "file"])
    return table, machine


def goals(rows: dict[str, Any]) -> pd.DataFrame:
    """One line for each goal: the target, the measurement, and the limit set by the machine's matrix products.

    Factors are of the baseline in the same run. "not measured" where a row or way is missing.
    """
    lines = [
        ("training step from the store, batch 16", 25, _factor(rows, "step", "store"), None),
        ("training step online, float32, batch 16", None, _factor(rows, "step", "online float32"), "float32"),
        ("training step online, bfloat16, batch 16", 4, _factor(rows, "step", "online bfloat16"), "bfloat16"),
        (
            f"head, loss and probes, batch {rows.get('rest', {}).get('batch', 32)}",
            1.5,
            _factor(rows, "rest", "ours"),
            None,
        ),
        ("extraction, float32", 1.7, _factor(rows, "extraction", "float32"), "float32"),
        ("extraction, bfloat16", 6, _factor(rows, "extraction", "bfloat16"), "bfloat16"),
    ]
    table = []
    for work, goal, factor, precision in lines:
        most = None if precision is None else _most(rows, work, precision)
        table.append(
            [work, f"{goal} x" if goal else "", _times(factor), _times(most, ""), _verdict(factor, goal, most)]
        )
    for kind, found in rows.get("evaluation", {}).get("kinds", {}).items():
        for crf, goal in (("no CRF", 5), ("with CRF", 4)):
            factor, most = _evaluation(found["ways"], crf), _evaluation_most(rows, found["ways"], crf)
            work = f"evaluation, {crf}, {kind}"
            table.append([work, f"{goal} x", _times(factor), _times(most, ""), _verdict(factor, goal, most)])
    table += _absolute(rows)
    return pd.DataFrame(table, columns=["work", "goal", "measured", "at most here", "reached"]).set_index("work")


def later_goals(folder: Path) -> pd.DataFrame:
    """The goals of scale: target, measurement, reached or not, each from the newest result that has its row.

    What was skipped there, and rows that no result has, are "not measured".
    """
    table: list[tuple[str, str, str, str]] = []
    for name, lines in _LATER.items():
        try:
            found = lines(newest_row(folder, name)[0])
        except StegoError:
            found = []
        table += [(work, goal, shown, "yes" if good else "no") for work, goal, shown, good in found] or [
            (name, "", "not measured", "")
        ]
    return pd.DataFrame(table, columns=["work", "goal", "measured", "reached"]).set_index("work")


Goals: TypeAlias = list[tuple[str, str, str, bool]]
"""Work, goal, what was measured, and whether that is good enough."""


def _medians(row: dict[str, Any]) -> dict[str, float]:
    return {way: times["median_s"] for way, times in row["ways"].items()}


def _compact_goals(row: dict[str, Any]) -> Goals:
    seconds = _medians(row)
    share, error = row["bytes"]["full"] / row["bytes"]["compact"], row["error"]["measured"]
    factor = seconds["full store"] / seconds["compact store"]
    found = [
        ("compact store: bytes of features", "<= 1/6 of float16", f"1/{share:.1f}", share >= 6),
        ("compact store: mean error of a correspondence", "< 0.01", f"{error:.4f}", error < 0.01),
        ("compact store: a random batch, from memory", ">= 1 x the full store", f"{factor:.2f} x", factor >= 1),
    ]
    if "full store, from the disk" in seconds:
        cold = seconds["full store, from the disk"] / seconds["compact store, from the disk"]
        found.append(
            ("compact store: a random batch, from the disk", ">= 1 x the full store", f"{cold:.2f} x", cold >= 1)
        )
    return found


def _rest_goals(row: dict[str, Any]) -> Goals:
    seconds, found = _medians(row), []
    for probes, before in {"joint": "ours", "after": "ours, probes after"}.items():
        if f"{before}, channels first, float32" in seconds:
            now = min(value for way, value in seconds.items() if way in (before, f"{before}, bfloat16"))
            factor = seconds[f"{before}, channels first, float32"] / now
            found.append(
                (f"head, loss and optimizer, probes {probes}", ">= 1.5 x before", f"{factor:.2f} x", factor >= 1.5)
            )
    return found


def _recipe_goals(row: dict[str, Any]) -> Goals:
    minutes = row["total_s"] / 60
    return [("Cityscapes-sized recipe, two cores, extrapolated", "< 150 min", f"{minutes:.0f} min", minutes < 150)]


def _evaluation_goals(row: dict[str, Any]) -> Goals:
    found = []
    for kind, part in row["kinds"].items():
        seconds = _medians(part)
        if "ours, backbone alone" in seconds:
            share = seconds["ours, backbone alone"] / seconds["ours, no CRF"]
            found.append((f"backbone's share of evaluation, {kind}", ">= 80 %", f"{100 * share:.0f} %", share >= 0.8))
        if "busy" in part:
            found.append(
                (
                    f"busy cores, evaluation with CRF, {kind}",
                    ">= 90 %",
                    f"{100 * part['busy']:.0f} %",
                    part["busy"] >= 0.9,
                )
            )
    return found


def _neighbor_goals(row: dict[str, Any]) -> Goals:
    exact, size = row["extrapolated"], row["extrapolated"]["bytes"] / 1e9
    found = [
        (
            f"{exact['images']:,} images, exact neighbors, extrapolated",
            "< 8 GB",
            f"{size:.1f} GB, {exact['hours']:.1f} h",
            size < 8,
        )
    ]
    if "approximate" in row:
        near = row["approximate"]
        most, minutes, recall = near["extrapolated"], near["seconds"] / 60, near["recall"]
        all_pairs = f"< 60 min (all pairs: {near['exact_hours']:.1f} h)"
        found.append(
            (f"{near['images']:,} images, approximate neighbors", all_pairs, f"{minutes:.1f} min", minutes < 60)
        )
        found.append(
            (f"{near['images']:,} images, true neighbors among them", ">= 90 %", f"{100 * recall:.1f} %", recall >= 0.9)
        )
        size = most["bytes"] / 1e9
        found.append((f"{most['images']:,} images, approximate, extrapolated", "< 3 GB", f"{size:.2f} GB", size < 3))
    return found


def _memory_goals(row: dict[str, Any]) -> Goals:
    if "large" not in row:
        return []
    large, size = row["large"], row["large"]["peak_bytes"] / 1e9
    return [(f"{large['images']:,} images, store opened and trained from", "< 3 GB", f"{size:.2f} GB", size < 3)]


def _crf_goals(row: dict[str, Any]) -> Goals:
    seconds = _medians(row)
    if "pydensecrf" not in seconds:
        return []
    factor, same = seconds["lattice"] / seconds["pydensecrf"], row["same_labels"]
    return [
        ("own CRF: pixels with the same label", ">= 99.9 %", f"{100 * same:.2f} %", same >= 0.999),
        ("own CRF: time", "<= 3 x pydensecrf", f"{factor:.2f} x", factor <= 3),
    ]


_LATER: dict[str, Callable[[dict[str, Any]], Goals]] = {
    "compact": _compact_goals, "rest": _rest_goals, "recipe": _recipe_goals, "evaluation": _evaluation_goals,
    "neighbors": _neighbor_goals, "memory": _memory_goals, "crf_engines": _crf_goals,
}  # fmt: skip


def _absolute(rows: dict[str, Any]) -> list[list[str]]:
    """Goals that are no factors: agreement of bfloat16, the whole recipe, memory."""
    cosine = rows.get("extraction", {}).get("bfloat16_cosine", {}).get("mean")
    minutes = rows["recipe"]["total_s"] / 60 if "recipe" in rows else None
    full = rows["full_recipe"]["total_s"] / 60 if "full_recipe" in rows else None
    gpu = rows["full_recipe"]["gpu"] if "full_recipe" in rows else "one GPU"
    memory = rows.get("memory")
    store = f", store of {memory['store_bytes'] / 1e9:.1f} GB" if memory else ""
    peak = memory["peak_bytes"] / 1e9 if memory else None
    least = None  # minutes that the features alone take, in the faster precision
    if "limits" in rows:
        least = CITYSCAPES_CROPS * min(s[NETWORK] for s in rows["limits"]["least_s_per_image"].values()) / 60
    recipe = "Cityscapes-sized recipe, ViT-S/8 (extrapolated)"
    lines = [
        ("cosine of bfloat16 to float32 features", ">= 0.999", cosine, None, ".5f", lambda value: value >= 0.999),
        (recipe, "< 60 min", minutes, least, ".0f", lambda value: value < 60),
        (f"Cityscapes-sized recipe, ViT-B/8, {gpu}", "< 3 min", full, None, ".1f", lambda value: value < 3),
        (f"peak memory of training{store}", "< 3 GB", peak, None, ".2f", lambda value: value < 3),
    ]
    table = []
    for work, goal, value, bound, form, good in lines:
        shown = "not measured" if value is None else format(value, form)
        reached = "" if value is None else "yes" if good(value) else "no"
        if reached == "no" and bound is not None and not good(bound):
            reached = "impossible here"
        table.append([work, goal, shown, "" if bound is None else f"not below {bound:.0f} min", reached])
    return table


def _times(factor: float | None, missing: str = "not measured") -> str:
    return missing if factor is None else f"{factor:.{1 if factor >= 10 else 2}f} x"


def _verdict(factor: float | None, goal: float | None, most: float | None) -> str:
    if goal is None:
        return ""
    if factor is not None and factor >= goal:
        return "yes"
    return "impossible here" if most is not None and most < goal else "no" if factor is not None else ""


def _factor(rows: dict[str, Any], row: str, way: str) -> float | None:
    ways = rows.get(row, {}).get("ways", {})
    return ways["published"]["median_s"] / ways[way]["median_s"] if way in ways else None


def _most(rows: dict[str, Any], work: str, precision: str) -> float | None:
    """How many times faster than the baseline the backbone's matrix products alone would be, at the measured throughput."""
    row = "step" if work.startswith("training") else "extraction"
    if row not in rows or "limits" not in rows:
        return None
    images = 2 * rows[row]["batch"] if row == "step" else rows[row]["batch"]
    least = rows["limits"]["least_s_per_image"][precision][NETWORK]
    return rows[row]["ways"]["published"]["median_s"] / (images * least)


def _evaluation(ways: dict[str, Any], crf: str) -> float | None:
    published = _published_evaluation(ways, crf)
    return published / ways[f"ours, {crf}"]["median_s"] if published and f"ours, {crf}" in ways else None


def _published_evaluation(ways: dict[str, Any], crf: str) -> float | None:
    plain, refined = ways["published, no CRF"]["median_s"], ways.get("published, its CRFs")
    return plain if crf == "no CRF" else plain + refined["median_s"] if refined else None


def _evaluation_most(rows: dict[str, Any], ways: dict[str, Any], crf: str) -> float | None:
    """The same for two passes at 320 px in the faster precision; with CRF, its time shared by all cores comes on top."""
    published = _published_evaluation(ways, crf)
    if published is None or "limits" not in rows:
        return None
    least = 2 * min(times["ViT-S/8, 320 px"] for times in rows["limits"]["least_s_per_image"].values())
    if crf == "with CRF":
        least += ways["published, its CRFs"]["median_s"] / rows["limits"]["cores"]
    return published / least


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes that the parts of a training with ViT-S/8 at 224 px take on the machine they were measured on."""

    extraction_s: float
    """The backbone, an image."""
    step_s: float
    """A step of the recipe from a store."""
    pair_s: float
    """Neighbors, a pair of images."""
    published_extraction_s: float
    """The baseline's backbone, an image."""
    published_rest_s: float
    """The rest of the baseline's step."""
    near_s: float | None = None
    """Approximate neighbors, an image, divided by the square root of their number; None where they were not measured."""
    bytes: int = 2 * 384 * 28 * 28 + 4 * 224 * 224 + 4 * 384
    """An image in a store: features in float16, colors and labels in a byte each, the mean feature in float32."""
    compact_bytes: int = 384 // MOST * (28 * 28 + 4) + 4 * 384
    """An image in a compact store, at most: a third of the channels in a byte each, their units, and the mean feature."""

    def store(self, images: float, machines: int = 1) -> float:
        """Seconds of a training from a store: every image once through the backbone, shared out; neighbors; the steps."""
        return images * self.extraction_s / machines + self.neighbors(images) + STEPS * self.step_s

    def neighbors(self, images: float) -> float:
        """Seconds of finding neighbors: of all pairs; beyond `EXACT` images approximate ones, in N^1.5 (cells grow as N^0.5)."""
        if self.near_s is None or images <= EXACT:
            return images**2 * self.pair_s
        return images * self.near_s * images**0.5

    def online(self, images: float) -> float:
        """The same without a store: once for the neighbors, and two batches more at every step."""
        return self.store(images) + STEPS * 2 * BATCH * self.extraction_s

    def published(self, images: float) -> float:
        """The same in the published order of work."""
        first = images * self.published_extraction_s + images**2 * self.pair_s
        return first + STEPS * (2 * BATCH * self.published_extraction_s + self.published_rest_s)

    def shared_from(self) -> float:
        """Images above which their features take longer than the steps, so that a second machine saves most."""
        return STEPS * self.step_s / self.extraction_s


def costs(rows: dict[str, Any]) -> Costs:
    """The cost model from the rows of a result. StegoError names the rows that it lacks."""
    if missing := [name for name in ("extraction", "rest", "recipe", "neighbors") if name not in rows]:
        raise StegoError(f"the cost model needs the rows {', '.join(missing)}; make bench ARGS={' '.join(missing)!r}")
    extraction, many = rows["extraction"], rows["neighbors"]["many"]
    fastest = min(way["median_s"] for name, way in extraction["ways"].items() if name != "published")
    rest = rows["rest"]["ways"]["published"]["median_s"] / rows["rest"]["batch"]
    return Costs(
        extraction_s=fastest / extraction["batch"],
        step_s=rows["recipe"]["measured"]["step"]["median_s"],
        pair_s=many["seconds"] / many["images"] ** 2,
        near_s=near["seconds"] / near["images"] ** 1.5 if (near := rows["neighbors"].get("approximate")) else None,
        published_extraction_s=extraction["ways"]["published"]["median_s"] / extraction["batch"],
        published_rest_s=rest * BATCH,
    )


def plan(model: Costs, images: dict[str, int]) -> pd.DataFrame:
    """Hours of each way and size of the stores, one row per name and number of images, all of 224 px."""
    table = {
        f"{name}, {count:,} images": {
            "store": _hours(model.store(count)), "store, 8 machines": _hours(model.store(count, 8)),
            "online": _hours(model.online(count)), "published order": _hours(model.published(count)),
            "store takes": _size_text(count * model.bytes), "compact store takes at most": _size_text(count * model.compact_bytes),
        }
        for name, count in images.items()
    }  # fmt: skip
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("dataset")


def newest_row(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The newest measurement of one row, and the machine. StegoError where no result holds it."""
    results = [read_json(path) for path in folder.glob("*.json")]
    found = [result for result in results if name in result["rows"] and not result["settings"]["tiny"]]
    if not found:
        raise StegoError(f"{folder} holds no row {name!r}; make bench ARGS={name} measures it (minutes)")
    newest = max(found, key=lambda result: result["machine"]["date"])
    return newest["rows"][name], newest["machine"]


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.{0 if seconds > 36_000 else 1}f} h"


def _size_text(size: float) -> str:
    power = min(4, max(2, math.floor(math.log10(size) / 3)))
    return f"{size / 1000**power:.1f} {('MB', 'GB', 'TB')[power - 2]}"
