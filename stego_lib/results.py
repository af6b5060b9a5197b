"""Run records and the tables made from them."""

import math
import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from .errors import StegoError
from .files import read_json

METHODS = {
    "kmeans_colors": "k-means on colours",
    "kmeans_features": "k-means on backbone features",
    "cluster": "STEGO, cluster probe",
    "cluster_crf": "STEGO, cluster probe + CRF",
    "linear_features": "linear probe on backbone features (labels)",
    "linear": "STEGO, linear probe (labels)",
    "linear_crf": "STEGO, linear probe + CRF (labels)",
    "best_by_label": "not a result: STEGO, cluster probe, step chosen by these labels",
}
"""Methods in a run record, in the order of tables -> how they are called. "(labels)": trained with labels."""


def read_record(path: str | Path) -> dict[str, Any]:
    """One run record; StegoError if the file is not one."""
    record = read_json(path)
    if not isinstance(record, dict) or not {"experiment", "scores", "step"} <= set(record):
        raise StegoError(f"{path} is not a run record (metrics.json of an evaluated run)")
    return record


def read_records(folder: str | Path) -> list[dict[str, Any]]:
    """The run records (JSON) in a folder, sorted by file name. StegoError if there is none."""
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise StegoError(f"{Path(folder).resolve()} holds no run record (*.json)")
    return [read_record(path) for path in paths]


def score_table(records: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a method and record: method, seed, accuracy, miou (percent). StegoError if none of the records has scores."""
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
    if not rows:
        raise StegoError("; ".join(dict.fromkeys(record.get("unscored", "no scores") for record in records)))
    return pd.DataFrame(rows)


def summary(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Mean and standard deviation over seeds, one row a method: columns (accuracy | miou, mean | std), percent.

    StegoError if the records are not of one experiment that differs in nothing but seed and folders.
    """
    fixed = [{k: v for k, v in r["experiment"].items() if k != "seed"} | {"split": r.get("split")} for r in records]
    for other in fixed[1:]:
        differing = [key for key in fixed[0] | other if other.get(key) != fixed[0].get(key)]
        if differing:
            raise StegoError(
                f"records of different experiments cannot be averaged; they differ in {', '.join(differing)}"
            )
    table = score_table(records).groupby("method")[["accuracy", "miou"]].agg(["mean", "std"])
    return table.reindex([method for method in METHODS if method in table.index])


def markdown_table(records: list[dict[str, Any]]) -> str:
    """The summary as a Markdown table, mean ± standard deviation over seeds."""
    lines = ["| method | accuracy | mIoU |", "|---|---|---|"]
    for method, row in summary(records).iterrows():
        cells = [_cell(row[score, "mean"], row[score, "std"]) for score in ("accuracy", "miou")]
        lines.append(f"| {METHODS[method]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(mean: float, std: float) -> str:
    return f"{mean:.1f}" if math.isnan(std) else f"{mean:.1f} ± {std:.1f}"  # one seed has no spread


def fill_tables(text: str, root: str | Path) -> str:
    """`text` with each table between `<!-- table: FOLDER -->` and `<!-- end -->` made anew from the records in root/FOLDER."""

    def table(found: re.Match) -> str:
        return f"{found[1]}\n{markdown_table(read_records(Path(root) / found[2]))}\n{found[3]}"

    return re.sub(r"(<!-- table: (\S+) -->)\n.*?(<!-- end -->)", table, text, flags=re.DOTALL)


if __name__ == "__main__":  # python -m stego_lib.results README.md: makes the tables of a page anew
    for page in map(Path, sys.argv[1:]):
        page.write_text(fill_tables(page.read_text(), page.resolve().parent))
