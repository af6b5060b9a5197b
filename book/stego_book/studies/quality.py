"""Effect of optimizations on the scores: feature stores, bfloat16, and fitting of the probes."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from stego_lib.experiment import Experiment
from stego_lib.utils.paths import user_path

from .study import PROBES, Study, Variant

GROUP = "features, probes"
# Features and probes -> changes of the recipe. Online features in records are not rounded to float16.
WAYS = {
    "full after": {},
    "full joint": {"probes": "joint"},
    "online after": {"feature_store": "online"},
    "online joint": {"feature_store": "online", "probes": "joint"},
    "compact after": {"feature_store": "compact"},
    "bfloat16 after": {"precision": "bfloat16"},
}
# Name -> the fast variant and the variant that it replaces.
COMPARISONS = {
    "stored float16 instead of online float32, probes after": ("full after", "online after"),
    "stored float16 instead of online float32, probes joint": ("full joint", "online joint"),
    "probes after instead of joint, stored": ("full after", "full joint"),
    "both: the recipe instead of the plain method": ("full after", "online joint"),
    "compact store instead of stored float16, probes after": ("compact after", "full after"),
    "bfloat16 instead of float32 in backbone and head, probes after": ("bfloat16 after", "full after"),
}


def study(base: Experiment, seeds: Sequence[int], records: str | Path) -> Study:
    """The unchanged recipe (main records) and the other `WAYS`. records: book/records."""
    variants = [Variant(GROUP, way, base.but(crf=not changes, **changes)) for way, changes in WAYS.items()]
    return Study(variants, seeds, user_path(records) / "studies" / "paths", user_path(records) / base.dataset)


def verdicts(study: Study) -> pd.DataFrame:
    """One row for each of `COMPARISONS`: mean mIoU of the fast variant minus that of the replaced one, for both probes.

    "equal": within the standard deviation of the replaced variant, which stands in brackets; else "higher" or "lower".
    """
    miou = study.scores().groupby(["name", "probe"])["miou"].agg(["mean", "std"])
    table = pd.DataFrame("not run", index=list(COMPARISONS), columns=list(PROBES))
    for comparison, (fast, plain) in COMPARISONS.items():
        for probe in PROBES:
            if {(fast, probe), (plain, probe)} <= set(miou.index):
                gap, spread = miou["mean"][fast, probe] - miou["mean"][plain, probe], miou["std"][plain, probe]
                word = "equal" if abs(gap) <= spread else "higher" if gap > 0 else "lower"
                table.loc[comparison, probe] = f"{gap:+.1f} ({spread:.1f}): {word}"
    return table
