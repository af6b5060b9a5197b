"""Whether the fast ways to the same experiment cost quality: stored features beside online float32, probes after beside joint."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from .experiment import Experiment
from .results import mean_and_spread
from .study import NOT_RUN, Study, Variant

GROUP = "features, probes"
FAST, PLAIN = ("store", "after"), ("online", "joint")
"""The recipes' way, and the published order of work: features anew at every step, probes beside the head."""
WAYS = (FAST, ("store", "joint"), ("online", "after"), PLAIN)
"""How features are had and how probes are fitted; online ones in float32."""
PROBES = ("cluster", "linear")


def studies(base: Experiment, seeds: Sequence[int], records: str | Path) -> dict[tuple[str, str], Study]:
    """A study of one variant for each of `WAYS`, its records where they belong in `records` (book/records).

    A record does not say how features were had, so each way has a folder. The recipe as it stands is on record already.
    """
    found = {}
    for way, probes in WAYS:
        if (way, probes) == FAST:
            one, folder = base, Path(records) / base.dataset
        else:
            one, folder = base.but(crf=False), Path(records) / "studies" / "paths" / way
        precision = "float32" if way == "online" else base.precision
        one = one.but(feature_store=way, probes=probes, precision=precision)
        found[way, probes] = Study([Variant(GROUP, f"{way} {probes}", one)], seeds, folder)
    return found


def compare(found: dict[tuple[str, str], Study]) -> pd.DataFrame:
    """One row a way of `studies`: seeds on record, mIoU of both probes (mean ± standard deviation over seeds), and whether each
    mean is within the spread of `PLAIN`: no further below its mean than its standard deviation."""
    plain = {probe: _miou(found[PLAIN], probe) for probe in PROBES}
    rows = {}
    for way, study in found.items():
        row: dict[str, object] = {"seeds": study.scores()["seed"].nunique()}
        for probe in PROBES:
            values = _miou(study, probe)
            row[f"{probe} mIoU"] = mean_and_spread(values.mean(), values.std()) if len(values) else NOT_RUN
        row["within the spread"] = "" if way == PLAIN else "; ".join(_verdicts(study, plain))
        rows[way] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["features", "probes"])


def _verdicts(study: Study, plain: dict[str, pd.Series]) -> Iterator[str]:
    for probe, reference in plain.items():
        values = _miou(study, probe)
        if len(values) and len(reference) > 1:
            gap = values.mean() - reference.mean()
            yield f"{probe} {gap:+.1f}: {'yes' if gap >= -reference.std() else 'no'}"


def _miou(study: Study, probe: str) -> pd.Series:
    scores = study.scores()
    return scores.loc[scores["probe"] == probe, "miou"]
