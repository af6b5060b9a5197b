"""Run records, tables of their scores, and published figures."""

import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from stego_lib.datasets.check import COUNTS
from stego_lib.experiment import PRESETS, Experiment
from stego_lib.provenance import Provenance
from stego_lib.utils.errors import StegoError, did_you_mean
from stego_lib.utils.files import atomic, read_json, read_text
from stego_lib.utils.paths import user_path

# Methods of a run record, in the order of tables -> their names. "(labels)": trained with labels.
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
    "taught_5": "STEGO, 5 labeled images",
    "taught_20": "STEGO, 20 labeled images",
    "taught": "STEGO, a few labels",
    "taught_crf": "STEGO, a few labels + CRF",
    "best_by_label": "not a result: STEGO, cluster probe, step chosen by these labels",
}
# Scores of a run record, in the order of tables -> their names. Older records lack the last two.
SCORES = {"accuracy": "accuracy", "miou": "mIoU", "own_miou": "own mIoU", "border_f": "border F"}
# `Experiment.method` -> its name in tables and figures.
NAMES = {
    "stego": "STEGO",
    "smooseg": "SmooSeg",
    "primaps": "PriMaPs-EM",
    "hp": "HP",
    "cause": "CAUSE-MLP",
    "depthg": "depth term (ours, after DepthG)",
}
# Figures of the paper, its released checkpoints and other methods, with sources.
PUBLISHED = Path(__file__).with_name("published_results.csv")
# Backbone of a recipe -> its name in the published figures.
NETWORKS = {"dino_vits8": "ViT-S/8", "dino_vitb8": "ViT-B/8"}
# Method of a run record -> method and protocol of the published figure. STEGO's are after the CRF.
PUBLISHED_AS = {
    "kmeans_features": ("DINO + k-means", "cluster"),
    "cluster_crf": ("STEGO", "cluster"),
    "linear_crf": ("STEGO", "linear"),
}
# Fields of an experiment that the paper's rows do not define.
NOT_COMPARED = ("seed", "n_classes", "keep_every")
# Scores on CamVid's test split, which was not used for any choice: one row per method, backbone and seed.
TEST = "camvid_test.csv"
# Methods of the table and the chart on the first page.
OVERVIEW = (
    *("kmeans_features", "kmeans_features_crf", "cluster", "cluster_crf"),
    *("taught_5", "taught_20", "linear", "linear_features"),
)
# Data of the first page -> its embedded backbone.
FRONT = {
    "scenes val": "scenes_vit_tiny8",
    "CamVid test": "photos_vit_tiny8_d6",
    "LabelMeFacade test": "photos_vit_tiny8_d6",
}
# Scores after a few labeled images, see `few_labels`; (dataset, split) -> folder in `MAIN`.
LABELED = "studies/few_labels.csv"
LABELED_AS = {
    ("scenes", "val"): "scenes",
    ("camvid", "val"): "camvid_photos_d6",
    ("labelmefacade", "val"): "labelmefacade",
    ("labelmefacade", "test"): "labelmefacade_test",
}
# Folder of the main run records -> scored data, backbone.
MAIN = {
    "scenes": ("scenes val", "scenes_vit_tiny8"),
    "camvid": ("CamVid val", "streets_vit_tiny8_d6"),
    "camvid_photos_d6": ("CamVid val", "photos_vit_tiny8_d6"),
    "camvid_photos": ("CamVid val", "photos_vit_tiny8"),
    "labelmefacade": ("LabelMeFacade val", "photos_vit_tiny8_d6"),
    "labelmefacade_test": ("LabelMeFacade test", "photos_vit_tiny8_d6"),
}


def method_names(record: dict[str, Any]) -> dict[str, str]:
    """`METHODS` with STEGO replaced by the name of the record's method."""
    name = NAMES[record.get("experiment", {}).get("method", "stego")]
    return {key: title.replace("STEGO", name) for key, title in METHODS.items()}


def is_record(content: Any) -> bool:
    """Whether the content of a JSON file is a run record."""
    return isinstance(content, dict) and {"experiment", "provenance", "step"} <= set(content)


def read_record(path: str | Path) -> dict[str, Any]:
    """Reads a run record. Raises StegoError if the file is not a run record."""
    record = read_json(path)
    if not is_record(record):
        raise StegoError(f"{path} is not a run record. Name the metrics.json of an evaluated run.")
    return record


def read_records(folder: str | Path) -> list[dict[str, Any]]:
    """Reads the run records (JSON) of a folder, sorted by file name. Raises StegoError if there is none."""
    paths = sorted((folder := user_path(folder)).glob("*.json"))
    if not paths:
        raise StegoError(f"{folder.resolve()} contains no run record (*.json).")
    return [read_record(path) for path in paths]


def results_table(root: str | Path) -> pd.DataFrame:
    """All run records below `root`, one row per record and method; stored as `book/records/results.csv`.

    Columns: study (folder below root), record (file), dataset, split, images, backbone, weights (fingerprint),
    precision, store, seed, step, method, `SCORES` (percent), machine, python, torch, timm, date. Confusion matrices,
    IoUs of each class and the whole experiment are only in the JSON records.

    Examples
    --------
    >>> table = pd.read_csv("book/records/results.csv")
    >>> table[table.method == "cluster"].groupby("study").miou.agg(["mean", "std", "count"])
    """
    root, rows = user_path(root), []
    for path in sorted(root.rglob("*.json")):
        if not is_record(record := read_json(path)):
            continue  # curves, maps and other data of figures
        experiment, provenance = record["experiment"], record["provenance"]
        about = {"study": path.parent.relative_to(root).as_posix(), "record": path.stem}
        about |= {"dataset": experiment["dataset"], "split": record.get("split", "val")}
        about |= {"images": record.get("images"), "backbone": experiment["backbone"]}
        about |= {key: provenance.get(key) for key in ("weights", "precision", "store")}
        about |= {"seed": experiment["seed"], "step": record["step"]}
        versions = {key: provenance["versions"].get(key) for key in ("machine", "python", "torch", "timm", "date")}
        for method, score in record.get("scores", {}).items():
            values = {key: round(score.get(key, math.nan), 3) for key in SCORES}
            rows.append(about | {"method": method} | values | versions)
    return pd.DataFrame(rows)


def scored(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the record if it has scores; raises StegoError with the reason if not."""
    if not record["scores"]:
        raise StegoError(record.get("unscored", "the run record holds no scores"))
    return record


def score_table(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One row per record and method: method, seed, `SCORES` (percent). StegoError for a record without scores."""
    rows = []
    for record in records:
        scores = dict(scored(record)["scores"])
        if "best_by_label" in record:
            scores["best_by_label"] = record["best_by_label"]
        for method in (method for method in METHODS if method in scores):
            values = {key: scores[method].get(key, math.nan) for key in SCORES}
            rows.append({"method": method, "seed": record["experiment"]["seed"]} | values)
    return pd.DataFrame(rows, columns=["method", "seed", *SCORES])


def check_comparable(records: Sequence[dict[str, Any]]) -> None:
    """Raises StegoError unless the records agree in experiment (except the seed), split and provenance.

    The CRF affects only its own rows, so records with and without it are comparable.
    """
    first, *others = records
    ours, provenance = settings(first), Provenance.from_dict(first["provenance"])
    for other in others:
        theirs = settings(other)
        differing = [key for key in ours | theirs if ours.get(key) != theirs.get(key) and key not in ("seed", "crf")]
        differing += [key for key in ("split", "data", "tile") if first.get(key) != other.get(key)]
        differing += provenance.differing(Provenance.from_dict(other["provenance"]))
        if differing:
            raise StegoError(f"records of different runs cannot be averaged: they differ in {', '.join(differing)}.")


def settings(record: dict[str, Any]) -> dict[str, Any]:
    """Fields of a record's experiment and its options of the authors' code, by name."""
    fields = dict(record["experiment"])
    return {**fields.pop("official"), **fields}


def collapses(records: Iterable[dict[str, Any]]) -> list[str]:
    """One line per run whose codes collapsed or scattered: seed, symptom and step."""
    collapsed = [record for record in records if record.get("collapsed")]
    return [f"seed {record['experiment']['seed']}: {record['codes']['seen']}" for record in collapsed]


def markdown_table(records: Sequence[dict[str, Any]], published: pd.DataFrame | None = None) -> str:
    """The scores of the records as a Markdown table, mean ± standard deviation over seeds.

    published: figures for additional columns (see `published_figures`); methods without scores are blank.
    """
    check_comparable(records)
    table = score_table(records).drop_duplicates().dropna(axis="columns", how="all")
    groups, scores = table.groupby("method"), [key for key in SCORES if key in table]
    measured, counts = groups[scores].agg(mean_and_spread), groups["seed"].nunique()
    names, columns, rows = method_names(records[0]), ["method", *map(SCORES.get, scores)], []
    if published is not None:
        columns += ["published accuracy", "published mIoU", "source of the published figures"]
    for method in METHODS:
        cells = [""] * len(scores)
        if method in measured.index:
            cells = measured.loc[method].tolist()
        elif published is None or method not in published.index:
            continue
        if published is not None and method in published.index:
            *figures, source = published.loc[method]
            cells += [*("" if math.isnan(value) else f"{value:.1f}" for value in figures), source]
        elif published is not None:
            cells += ["", "", ""]
        some = counts.get(method, counts.max()) < counts.max()
        name = f"{names[method]}, {counts[method]} of {counts.max()} seeds" if some else names[method]
        rows.append([name, *cells])
    return markdown(pd.DataFrame(rows, columns=columns))


def markdown(table: pd.DataFrame) -> str:
    """A table of strings in Markdown."""
    lines = [table.columns, *table.itertuples(index=False)]
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(table.columns), *body])


def main_scores(root: str | Path) -> pd.DataFrame:
    """Scores of the main runs below `root` and on CamVid's test split, in the order of tables.

    Columns: data ("CamVid val"), backbone, method, seed, accuracy, miou (percent).
    """
    root, parts = user_path(root), []
    for folder, (data, backbone) in MAIN.items():
        check_comparable(records := read_records(root / folder))
        parts.append(score_table(records).assign(data=data, backbone=backbone))
    parts.append(pd.read_csv(root / TEST).assign(data="CamVid test"))
    labeled = pd.read_csv(root / LABELED).query("method == 'logistic' and on == 'codes' and labels == 'images'")
    labeled["method"] = "taught_" + labeled["count"].astype(str)
    for key, rows in labeled[labeled["method"].isin(METHODS)].groupby(["dataset", "split"]):
        data, backbone = MAIN[LABELED_AS[key]]
        parts.append(rows.assign(data=data, backbone=backbone, seed=rows["draw"]))
    return pd.concat(parts, ignore_index=True)[["data", "backbone", "method", "seed", "accuracy", "miou"]]


def front_scores(root: str | Path) -> pd.DataFrame:
    """The rows of `main_scores` that the first page shows."""
    scores = main_scores(root)
    return scores[scores["data"].map(FRONT) == scores["backbone"]]


def overview_table(scores: pd.DataFrame, score: str = "miou", methods: Sequence[str] = tuple(METHODS)) -> pd.DataFrame:
    """Mean and spread of a score: one row per method, one column per data and backbone; blank if not measured.

    scores: from `main_scores`.
    """
    cells = scores.groupby(["method", "data", "backbone"], sort=False)[score].agg(mean_and_spread)
    table = cells.unstack(["data", "backbone"], fill_value="").reindex([key for key in methods if key in cells])
    return table.rename(index=METHODS)


def front_table(root: str | Path) -> str:
    """mIoU of the methods in `OVERVIEW` on the data of `FRONT`, as a narrow Markdown table."""
    table = overview_table(front_scores(root), methods=OVERVIEW).droplevel("backbone", axis="columns")[list(FRONT)]
    # A soft hyphen, so that a phone needs no scroll bar.
    table = table.rename(columns=lambda data: data.replace("LabelMeFacade", "LabelMe&shy;Facade"))
    return markdown(table.rename_axis("mIoU (%)").reset_index())


def mean_and_spread(values: Iterable[float]) -> str:
    """'70.3 ± 1.4': mean and standard deviation; only the mean for a single value, "" if all values are NaN."""
    series = pd.Series(list(values), dtype=float).dropna()
    if series.empty:
        return ""
    return f"{series.mean():.1f} ± {series.std():.1f}" if len(series) > 1 else f"{series.mean():.1f}"


def mean_of_best(values: Sequence[float], count: int) -> float:
    """Expected maximum of `count` values drawn without replacement."""
    # The k-th smallest value (from 0) is the maximum of comb(k, count - 1) subsets.
    ways = [math.comb(k, count - 1) for k in range(len(values))]
    return sum(w * v for w, v in zip(ways, sorted(values), strict=True)) / math.comb(len(values), count)


def published_results() -> pd.DataFrame:
    """Published results in percent; NaN if not published.

    Columns: method, backbone, dataset, protocol ("cluster" or "linear" probe), accuracy, miou, source, and verified:
    "yes" if the number was checked at its source or in a second copy.
    """
    return pd.read_csv(PUBLISHED)


def paper_rows() -> list[str]:
    """The presets that are rows of the paper's benchmark: those with published figures of STEGO."""
    return [name for name in PRESETS if "cluster_crf" in _figures(name).index]


def published_figures(row: str) -> pd.DataFrame:
    """The published figures of one row, a preset: index method (as in `METHODS`), columns accuracy, miou, source."""
    if row not in (rows := paper_rows()):
        raise StegoError(f"the paper has no row {row!r}{did_you_mean(str(row), rows)}; its rows: {', '.join(rows)}.")
    return _figures(row)


def _figures(preset: str) -> pd.DataFrame:
    recipe, table = PRESETS[preset], published_results()
    table = table[(table.dataset == recipe["dataset"]) & (table.backbone == NETWORKS.get(recipe["backbone"]))]
    table = table.set_index(["method", "protocol"])[["accuracy", "miou", "source"]]
    rows = {method: table.loc[key] for method, key in PUBLISHED_AS.items() if key in table.index}
    return pd.DataFrame.from_dict(rows, orient="index", columns=table.columns)


def departures(record: dict[str, Any], row: str) -> list[str]:
    """Differences between a record and a row of the paper, one line each.

    Compares the experiment (with all options as in the authors' code), precision (float32), feature store (exact) and
    number of scored images.
    """
    recipe, provenance = Experiment.preset(row, official={"published": True}).to_record(), record["provenance"]
    expected = settings({"experiment": recipe}) | {"precision": "float32"}
    values = settings(record) | {"precision": provenance["precision"]}
    lines = [
        f"{key} is {values.get(key)}, the recipe's {value}"
        for key, value in expected.items()
        if key not in NOT_COMPARED and values.get(key) != value
    ]
    if provenance["store"] not in ("full", "online"):
        lines.append(f"store is {provenance['store']}, the recipe's features are exact")
    published = COUNTS[recipe["dataset"]]["val"][0]
    if record["images"] != published:
        lines.append(f"scored on {record['images']:,} images, the published figures are of {published:,}")
    return lines


def fill_tables(text: str, root: str | Path) -> str:
    """`text` with updated tables between `<!-- table: FOLDER -->` and `<!-- end -->`.

    FOLDER, relative to root: a folder of run records, or the folder of all of them for `front_table`.
    """

    def table(match: re.Match) -> str:
        folder = Path(root) / match[2]
        lines = front_table(folder) if (folder / TEST).exists() else markdown_table(read_records(folder))
        return f"{match[1]}\n{lines}\n{match[3]}"

    return re.sub(r"(<!-- table: (\S+) -->)\n.*?(<!-- end -->)", table, text, flags=re.DOTALL)


def main(paths: Sequence[str]) -> None:
    """python -m stego_book.studies.results PAGE.md ... book/records/results.csv: updates tables from records."""
    for path in map(Path, paths):
        if path.suffix == ".csv":
            with atomic(path) as temporary:
                results_table(path.parent).to_csv(temporary, index=False)
        else:
            path.write_text(fill_tables(read_text(path), path.resolve().parent), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
