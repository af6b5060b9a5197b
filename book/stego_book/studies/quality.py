"""Whether speed costs quality: stored, compact or online features, bfloat16, probes fitted after training or jointly."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from stego_lib.experiment import Experiment
from stego_lib.utils.paths import user_path

from .results import mean_and_spread
from .study import Study, Variant

GROUP = "features, probes"
FAST, PLAIN, COMPACT = ("store", "after"), ("online", "joint"), ("compact", "after")
HALF = ("bfloat16", "after")
"""The recipes' way, and the published order of work: features anew at every step, probes beside the head."""
WAYS = (FAST, ("store", "joint"), ("online", "after"), PLAIN, COMPACT, HALF)
"""Kind of features and fitting of probes. All on record are computed in float32 but "bfloat16": stored ones, computed in it, as the
head's products are."""
COMPARISONS = (
    ("stored float16 for online float32, probes after", FAST, ("online", "after")),
    ("stored float16 for online float32, probes joint", ("store", "joint"), PLAIN),
    ("probes after for probes joint, stored", FAST, ("store", "joint")),
    ("both: the recipe for the plain way", FAST, PLAIN),
    ("compact store for the stored float16, probes after", COMPACT, FAST),
    ("bfloat16 for float32 in backbone and head, probes after", HALF, FAST),
)
"""Name, fast way, and the way that it stands in for."""
PROBES = ("cluster", "linear")


def studies(base: Experiment, seeds: Sequence[int], records: str | Path) -> dict[tuple[str, str], Study]:
    """A study of one variant for each of `WAYS`, its records where they belong in `records` (book/records).

    A record does not say how features were obtained, so each way has a folder. The recipe as it stands is on record already.
    """
    found = {}
    for way, probes in WAYS:
        if (way, probes) == FAST:
            one, folder = base, user_path(records) / base.dataset
        else:
            one, folder = base.but(crf=False), user_path(records) / "studies" / "paths" / way
        precision = {"online": "float32", "bfloat16": "bfloat16"}.get(way, base.precision)
        one = one.but(feature_store="store" if way == "bfloat16" else way, probes=probes, precision=precision)
        found[way, probes] = Study([Variant(GROUP, f"{way} {probes}", one)], seeds, folder)
    return found


def table(found: dict[tuple[str, str], Study]) -> pd.DataFrame:
    """One row per way of `studies`: seeds on record, mIoU of both probes, mean ± standard deviation over seeds."""
    rows = {}
    for way, study in found.items():
        row: dict[str, object] = {"seeds": study.scores()["seed"].nunique()}
        for probe in PROBES:
            values = _miou(study, probe)
            row[f"{probe} mIoU"] = mean_and_spread(values.mean(), values.std()) if len(values) else "not run"
        rows[way] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["features", "probes"])


def verdicts(found: dict[tuple[str, str], Study]) -> pd.DataFrame:
    """One row for each of `COMPARISONS`: the fast way's mean mIoU minus the other's, for both probes.

    "within" the spread: no further below than the standard deviation of the other way's seeds.
    """
    rows = {}
    for name, fast, plain in COMPARISONS:
        rows[name] = {probe: _verdict(_miou(found[fast], probe), _miou(found[plain], probe)) for probe in PROBES}
    return pd.DataFrame.from_dict(rows, orient="index")


def _verdict(fast: pd.Series, plain: pd.Series) -> str:
    if len(fast) == 0 or len(plain) < 2:
        return "not run"
    gap, spread = fast.mean() - plain.mean(), plain.std()
    return f"{gap:+.1f}, spread {spread:.1f}: {'within' if gap >= -spread else 'below it'}"


def _miou(study: Study, probe: str) -> pd.Series:
    scores = study.scores()
    return scores.loc[scores["probe"] == probe, "miou"]
