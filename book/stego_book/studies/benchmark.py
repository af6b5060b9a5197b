"""Published results and our run records in one table, with sources."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from stego_lib.experiment import PRESETS
from stego_lib.networks.loading import SHORT_NAMES

from ..overview import SOURCES
from .results import METHODS, NETWORKS, check_comparable, mean_and_spread, read_records, score_table


def own_rows(folders: Sequence[str | Path]) -> pd.DataFrame:
    """The run records of each folder, one row per method: mean ± standard deviation over seeds."""
    rows = []
    for folder in folders:
        check_comparable(records := read_records(folder))
        experiment = records[0]["experiment"]
        backbone = NETWORKS.get(experiment["backbone"], Path(experiment["backbone"]).stem)
        source = f"{Path(folder).parent.name}/{Path(folder).name}, {len(records)} seeds"
        groups = score_table(records).drop_duplicates().groupby("method", sort=False)
        scores = groups[["accuracy", "miou"]].agg(mean_and_spread)
        for method, (accuracy, miou) in scores.drop("best_by_label", errors="ignore").iterrows():
            protocol = "linear" if method.startswith("linear") else "cluster"
            rows.append([experiment["dataset"], METHODS[method], backbone, protocol, accuracy, miou, source])
    return pd.DataFrame(rows, columns=["dataset", "method", "backbone", "protocol", "accuracy", "mIoU", "source"])


def missing_rows(own: pd.DataFrame) -> pd.DataFrame:
    """One row per recipe of the paper without a record: requirements of the run."""
    done, rows = set(zip(own["dataset"], own["backbone"], strict=True)), []
    for name, recipe in PRESETS.items():
        backbone = recipe["backbone"]
        if name == recipe["dataset"] or (recipe["dataset"], NETWORKS.get(backbone, backbone)) in done:
            continue  # recipes with the name of their dataset are ours, not the paper's
        needs = f"not run: needs {SOURCES[recipe['dataset']]}; weights {SHORT_NAMES[backbone]} (timm's hub); a GPU"
        line = f"make reproduce ROW={name} DATA=FOLDER"
        rows.append([recipe["dataset"], NETWORKS[backbone], needs, line])
    return pd.DataFrame(rows, columns=["dataset", "backbone", "not run", "the line that runs it"])
