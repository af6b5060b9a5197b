"""Run records, the tables made from them, and the published figures beside them."""

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from stego_lib.datasets.check import COUNTS
from stego_lib.experiment import PRESETS, Experiment
from stego_lib.utils.errors import StegoError, did_you_mean
from stego_lib.utils.files import atomic, read_json, read_text
from stego_lib.utils.paths import user_path

METHODS = {
    "kmeans_colors": "k-means on colors",
    "kmeans_features": "k-means on backbone features",
    "kmeans_features_crf": "k-means on backbone features + CRF",
    "kmeans_pca": "k-means on their principal components",
    "cluster": "STEGO, cluster probe",
    "cluster_crf": "STEGO, cluster probe + CRF",
    "linear_features": "linear probe on backbone features (labels)",
    "linear": "STEGO, linear probe (labels)",
    "linear_crf": "STEGO, linear probe + CRF (labels)",
    "best_by_label": "not a result: STEGO, cluster probe, step chosen by these labels",
}
"""Methods in a run record, in the order of tables -> their names in tables. "(labels)": trained with labels."""

PUBLISHED = Path(__file__).with_name("published_results.csv")
"""Figures of the paper, of its released checkpoints and of other methods, each with its source."""
NETWORKS = {"dino_vits8": "ViT-S/8", "dino_vitb8": "ViT-B/8"}
"""Backbone of a recipe -> its name in the published figures."""
PUBLISHED_AS = {
    "kmeans_features": ("DINO + k-means", "cluster"),
    "cluster_crf": ("STEGO", "cluster"),
    "linear_crf": ("STEGO", "linear"),
}
"""Method in a run record -> method and protocol of the published figure (STEGO's are after the CRF)."""
NOT_COMPARED = ("seed", "device", "precision", "published", "n_classes", "validate_every")
"""Fields of an experiment that no row of the paper prescribes."""

ADDED = {"method": "stego"}
"""Fields of an experiment that records of version 0.2.0 and before lack, and what they meant there."""
NAMES = {
    "stego": "STEGO", "smooseg": "SmooSeg", "primaps": "PriMaPs-EM", "hp": "HP", "cause": "CAUSE-MLP", "depthg": "DepthG",
}  # fmt: skip
"""`Experiment.method` -> its name in tables and figures."""


def method_names(record: dict[str, Any]) -> dict[str, str]:
    """`METHODS` with the name of the record's own method in place of STEGO's."""
    own = NAMES[record.get("experiment", ADDED).get("method", "stego")]
    return {key: title.replace("STEGO", own) for key, title in METHODS.items()}


def is_record(content: Any) -> bool:
    """Whether the content of a JSON file is a run record."""
    return isinstance(content, dict) and {"experiment", "scores", "step"} <= set(content)


def read_record(path: str | Path) -> dict[str, Any]:
    """One run record; StegoError if the file is not one. Fields of `ADDED` that it lacks get their value."""
    if not is_record(record := read_json(path)):
        raise StegoError(f"{path} is not a run record (metrics.json of an evaluated run)")
    return record | {"experiment": ADDED | record["experiment"]}


def read_records(folder: str | Path) -> list[dict[str, Any]]:
    """The run records (JSON) in a folder, sorted by file name. StegoError if there is none."""
    found = sorted((folder := user_path(folder)).glob("*.json"))
    if not found:
        raise StegoError(f"{folder.resolve()} holds no run record (*.json)")
    return [read_record(path) for path in found]


def results_table(root: str | Path) -> pd.DataFrame:
    """All run records below `root`, one row per record and method: experiment, scores in percent, hardware, versions.

    `book/records/results.csv` holds it. The JSON records stay beside it: a table has no room for confusion matrices, IoUs of
    each class and the whole experiment, which figures and `Study` read; and runs at the same time each write their own file.

    Returns
    -------
    pandas.DataFrame
        Columns: study (folder below root), record (file), dataset, split, images, backbone, weights (fingerprint), precision,
        seed, step, method, accuracy, miou, machine, python, torch, timm, date.

    Examples
    --------
    >>> table = pd.read_csv("book/records/results.csv")
    >>> table[table.method == "cluster"].groupby("study").miou.agg(["mean", "std", "count"])
    """
    root, rows = user_path(root), []
    for path in sorted(root.rglob("*.json")):
        if not is_record(record := read_json(path)):
            continue  # curves, maps and other data of figures
        values, environment = record["experiment"], record.get("environment", {})
        about = {
            "study": path.parent.relative_to(root).as_posix(),
            "record": path.stem,
            "dataset": values["dataset"],
            "split": record.get("split", "val"),
            "images": record.get("images"),
            "backbone": values["backbone"],
            "weights": record.get("backbone_weights"),
            "precision": record.get("precision", values.get("precision")),
            "seed": values["seed"],
            "step": record["step"],
        }
        machine = {key: environment.get(key) for key in ("machine", "python", "torch", "timm", "date")}
        for method, found in record["scores"].items():
            scores = {key: round(found[key], 3) for key in ("accuracy", "miou")}
            rows.append(about | {"method": method} | scores | machine)
    return pd.DataFrame(rows)


def scored(record: dict[str, Any]) -> dict[str, Any]:
    """The record if it holds scores; StegoError that says why it does not."""
    if not record["scores"]:
        raise StegoError(record.get("unscored", "the run record holds no scores"))
    return record


def score_table(records: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per method and record: method, seed, accuracy, miou (percent). StegoError if a record has no scores."""
    if unscored := [record for record in records if not record["scores"]]:
        reasons = "; ".join(dict.fromkeys(record.get("unscored", "no reason given") for record in unscored))
        raise StegoError(f"{len(unscored)} of {len(records)} records have no scores: {reasons}")
    rows = [
        {
            "method": method,
            "seed": record["experiment"]["seed"],
            **{key: found[method][key] for key in ("accuracy", "miou")},
        }
        for record in records
        for found in [record["scores"] | {key: record[key] for key in ("best_by_label",) if key in record}]
        for method in METHODS
        if method in found
    ]
    return pd.DataFrame(rows, columns=["method", "seed", "accuracy", "miou"])


def summary(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Mean and standard deviation over seeds, one row per method: columns (accuracy | miou, mean | std), percent.

    StegoError if the records are not of one experiment that differs in nothing but seed and folders. Records with and without
    the CRF go together: it touches no row but its own, and a run that is on record both ways counts once in the others.
    """
    fixed = [
        {k: v for k, v in r["experiment"].items() if k not in ("seed", "crf")}
        | {k: r.get(k) for k in ("split", "backbone_weights")}
        for r in records
    ]
    for other in fixed[1:]:
        differing = [key for key in fixed[0] | other if other.get(key) != fixed[0].get(key)]
        if differing:
            raise StegoError(
                f"records of different experiments cannot be averaged; they differ in {', '.join(differing)}"
            )
    table = score_table(records).drop_duplicates().groupby("method")[["accuracy", "miou"]].agg(["mean", "std"])
    return table.reindex([method for method in METHODS if method in table.index])


def collapses(records: list[dict[str, Any]]) -> list[str]:
    """One line for each run whose codes collapsed or scattered: its seed, the finding and its step."""
    return [
        f"seed {record['experiment']['seed']}: {record['codes']['seen']}"
        for record in records
        if record.get("collapsed")
    ]


def markdown_table(records: list[dict[str, Any]], published: pd.DataFrame | None = None) -> str:
    """The summary as a Markdown table, mean ± standard deviation over seeds.

    published: figures to print beside it, with their source (see `published_figures`). Methods without a measurement are blank.
    """
    titles, measured, names = ["method", "accuracy", "mIoU"], summary(records), method_names(records[0])
    counts = score_table(records).groupby("method").seed.nunique()
    known = measured.index
    if published is not None:
        titles += ["published accuracy", "published mIoU", "source of the published figures"]
        known = known.union(published.index)
    lines = []
    for method in (method for method in METHODS if method in known):
        some = method in counts and counts[method] < counts.max()
        label = f"{names[method]}, {counts[method]} of {counts.max()} seeds" if some else names[method]
        lines.append([label, *_measured_cells(measured, method)])
        if published is not None:
            lines[-1] += _published_cells(published, method)
    return _markdown(titles, lines)


def _markdown(titles: list[str], lines: list[list[str]]) -> str:
    return "\n".join([_line(titles), "|" + "---|" * len(titles), *map(_line, lines)])


TEST = "camvid_test.csv"
"""Scores on CamVid's test split, which no choice of this project has seen: one row per method, backbone and seed."""
OVERVIEW = ("kmeans_features", "kmeans_features_crf", "cluster", "cluster_crf", "linear_features")
"""Methods of the table and the chart on the first page."""
MAIN = {
    "scenes": ("scenes val", "scenes_vit_tiny8"),
    "camvid": ("CamVid val", "streets_vit_tiny8_d6"),
    "camvid_photos_d6": ("CamVid val", "photos_vit_tiny8_d6"),
    "camvid_photos": ("CamVid val", "photos_vit_tiny8"),
}
"""Folder of the main run records -> what was scored, and the backbone."""


def main_scores(root: str | Path) -> pd.DataFrame:
    """Scores of the main runs below `root` and on CamVid's test split.

    Returns
    -------
    pandas.DataFrame
        Columns: data ("CamVid val"), backbone, method, seed, accuracy, miou (percent); in the order of tables.
    """
    root, parts = user_path(root), []
    for folder, (data, backbone) in MAIN.items():
        parts.append(score_table(read_records(root / folder)).assign(data=data, backbone=backbone))
    test = pd.read_csv(root / TEST)
    parts.append(test.assign(data="CamVid test"))
    found = pd.concat(parts, ignore_index=True)
    return found[["data", "backbone", "method", "seed", "accuracy", "miou"]]


def overview_table(root: str | Path) -> str:
    """mIoU of the methods in `OVERVIEW` on each of the main data and backbones, as a Markdown table."""
    scores = main_scores(root)
    columns = list(dict.fromkeys(zip(scores["data"], scores["backbone"], strict=True)))
    found = scores.groupby(["data", "backbone", "method"])["miou"].agg(["mean", "std"])
    lines = []
    for method in OVERVIEW:
        keys = [(*column, method) for column in columns]
        lines.append(
            [METHODS[method], *(mean_and_spread(*found.loc[key]) if key in found.index else "" for key in keys)]
        )
    return _markdown(["mIoU (%)", *(f"{data}, `{backbone}`" for data, backbone in columns)], lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _measured_cells(measured: pd.DataFrame, method: str) -> list[str]:
    if method not in measured.index:
        return ["", ""]
    return [mean_and_spread(*measured.loc[method, score][["mean", "std"]]) for score in ("accuracy", "miou")]


def _published_cells(published: pd.DataFrame, method: str) -> list[str]:
    if method not in published.index:
        return ["", "", ""]
    figures = published.loc[method]
    return [
        *("" if math.isnan(figures[score]) else f"{figures[score]:.1f}" for score in ("accuracy", "miou")),
        figures["source"],
    ]


def mean_and_spread(mean: float, std: float) -> str:
    """'70.3 ± 1.4'; the mean alone where there is no spread (NaN), as for one seed."""
    return f"{mean:.1f}" if math.isnan(std) else f"{mean:.1f} ± {std:.1f}"


def mean_of_best(values: Sequence[float], count: int) -> float:
    """Expected maximum of `count` of the values, drawn without replacement: what picking the best seed adds to a mean.

    Raises ValueError unless 1 <= count <= len(values).
    """
    if not 1 <= count <= len(values):
        raise ValueError(f"the best of {count} of {len(values)} values")
    # In rising order the k-th value (from 0) is the best of as many choices as `count - 1` of the k below it allow.
    ways = [math.comb(k, count - 1) for k in range(len(values))]
    return sum(w * v for w, v in zip(ways, sorted(values), strict=True)) / math.comb(len(values), count)


def published_results() -> pd.DataFrame:
    """Results that others published, one row each, as `PUBLISHED` has them; percent, NaN where none was published.

    Columns: method, backbone, dataset, protocol ("cluster" or "linear" probe), accuracy, miou, source, and verified: "yes" where
    the number was seen at its source, "no" where it is known from elsewhere.
    """
    return pd.read_csv(PUBLISHED)


def paper_rows() -> list[str]:
    """The presets that are rows of the paper's benchmark: those of which STEGO's figures are published."""
    return [name for name in PRESETS if "cluster_crf" in _figures_of(name).index]


def published_figures(row: str) -> pd.DataFrame:
    """The published figures of one row: index method (as in `METHODS`), columns accuracy, miou (percent, NaN if not given), source.

    row: a preset's name. Raises StegoError if it is no row of the paper.
    """
    if row not in (rows := paper_rows()):
        raise StegoError(
            f"the paper's benchmark has no row {row!r}{did_you_mean(str(row), rows)}; its rows: {', '.join(rows)}"
        )
    return _figures_of(row)


def _figures_of(preset: str) -> pd.DataFrame:
    recipe, table = PRESETS[preset], published_results()
    table = table[(table.dataset == recipe["dataset"]) & (table.backbone == NETWORKS.get(recipe["backbone"]))]
    table = table.set_index(["method", "protocol"])[["accuracy", "miou", "source"]]
    found = {method: table.loc[key] for method, key in PUBLISHED_AS.items() if key in table.index}
    return pd.DataFrame.from_dict(found, orient="index", columns=table.columns)


def departures(record: dict[str, Any], row: str) -> list[str]:
    """How a record departs from a row of the paper: fields that differ from the recipe, and a different number of images."""
    recipe, values = Experiment.preset(row).to_record(), record["experiment"]
    found = [
        f"{key} is {values.get(key)}, the recipe's {value}"
        for key, value in recipe.items()
        if key not in NOT_COMPARED and values.get(key) != value
    ]
    published = COUNTS[recipe["dataset"]]["val"][0]
    if record["images"] != published:
        found.append(f"scored on {record['images']:,} images, the published figures are of {published:,}")
    return found


def fill_tables(text: str, root: str | Path) -> str:
    """`text` with each table between `<!-- table: FOLDER -->` and `<!-- end -->` made anew.

    FOLDER, relative to root: run records, or the folder of all of them, for `overview_table`.
    """

    def table(found: re.Match) -> str:
        folder = Path(root) / found[2]
        lines = overview_table(folder) if (folder / TEST).exists() else markdown_table(read_records(folder))
        return f"{found[1]}\n{lines}\n{found[3]}"

    return re.sub(r"(<!-- table: (\S+) -->)\n.*?(<!-- end -->)", table, text, flags=re.DOTALL)


def main(paths: Sequence[str]) -> None:
    """python -m stego_book.studies.results PAGE.md ... book/records/results.csv: updates tables from the run records."""
    for path in map(Path, paths):
        if path.suffix == ".csv":
            with atomic(path) as temporary:
                results_table(path.parent).to_csv(temporary, index=False)
        else:
            path.write_text(fill_tables(read_text(path), path.resolve().parent), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
