"""Variants of the chapters Ablations and Baselines for a `study.Study`."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from stego_lib.calibration import shift_rule
from stego_lib.experiment import Experiment

from .fixed_heads import FIXED_HEADS
from .study import Study, Variant, vary

LADDER = "ingredients"
CODE_DIMS, NEIGHBORS, NEGATIVES = (16, 32, 128), (1, 30), (1, 10)
# Factors of l_knn and l_rand. Adam is invariant to a common factor, so l_self is fixed.
FACTORS = (0.5, 2.0)
# Change of each shift down and up: percentile points, or correspondence if the recipe gives numbers.
PERCENTILES, DISTANCE = 20.0, 0.1
KINDS = ("self", "knn", "rand")


def ladder(base: Experiment) -> list[Variant]:
    """The paper's ablation: zero clamp, five-crop, centering and CRF, added one after another."""
    plain = base.but(official={"zero_clamp": False}, crop="none", centering=False, crf=False)
    clamped = plain.but(official={"zero_clamp": True})
    cropped = clamped.but(crop="five")
    centered = cropped.but(centering=True, crf=True)  # scored with and without CRF, so one run serves the last two rows
    return [
        Variant(LADDER, "plain", plain),
        Variant(LADDER, "+ zero clamp", clamped),
        Variant(LADDER, "+ five-crop", cropped),
        Variant(LADDER, "+ centering", centered),
        Variant(LADDER, "+ CRF", centered, crf=True),
    ]


def sweeps(base: Experiment) -> list[Variant]:
    """One setting changed at a time: head, K, neighbors, negatives, each shift b, l_knn and l_rand."""
    variants = vary(base, "head", {head: {"head": head} for head in ("linear", "nonlinear")})
    for name, values in (("code_dim", CODE_DIMS), ("neighbors", NEIGHBORS), ("negatives", NEGATIVES)):
        variants += vary(base, name, {str(value): {name: value} for value in sorted({*values, getattr(base, name)})})
    for position, kind in enumerate(KINDS):
        variants += vary(base, f"b_{kind}", _moved_shifts(base, position))
    for position, kind in list(enumerate(KINDS))[1:]:
        scaled = [
            _replaced(base.weights, position, base.weights[position] * factor) for factor in sorted({*FACTORS, 1})
        ]
        variants += vary(base, f"l_{kind}", {f"{weights[position]:.4g}": {"weights": weights} for weights in scaled})
    return variants


def ablations(base: Experiment) -> list[Variant]:
    """The whole grid of the chapter: the ladder, then the sweeps."""
    return ladder(base) + sweeps(base)


def dimensions(base: Experiment, dims: Sequence[int]) -> list[Variant]:
    """Fixed heads with each number of dimensions, all features, and the trained heads of the K sweep."""
    base, variants = base.but(crf=False), []
    for kind, head in FIXED_HEADS.items():
        if head == "none":
            variants.append(Variant(kind, "all", base.but(head=head), fixed_head=kind))
        else:
            variants += [Variant(kind, str(dim), base.but(head=head, code_dim=dim), fixed_head=kind) for dim in dims]
    trained = sorted({*CODE_DIMS, base.code_dim})
    return variants + [Variant("trained head", str(dim), base.but(code_dim=dim)) for dim in trained]


def widths(base: Experiment, channels: int) -> list[Variant]:
    """Fixed heads with the recipe's code dimension, and trained heads with this and with `channels` (C) dimensions.

    They separate the effects of code width, head architecture and loss.
    """
    base = base.but(crf=False)
    variants = [Variant("features", str(channels), base.but(head="none"), fixed_head="features")]
    for kind in ("pca", "random projection", "untrained head"):
        variants.append(Variant(kind, str(base.code_dim), base.but(head=FIXED_HEADS[kind]), fixed_head=kind))
    return variants + [Variant("trained head", str(dim), base.but(code_dim=dim)) for dim in (base.code_dim, channels)]


def paper_layout(study: Study) -> pd.DataFrame:
    """The ladder in the paper's layout: a tick per component, then accuracy and mIoU of both probes."""
    ticks = {}
    for variant in study.variants:
        if variant.group == LADDER:
            e = variant.experiment
            has = {"0-clamp": e.official.zero_clamp, "5-crop": e.crop == "five", "centering": e.centering}
            has["CRF"] = variant.crf
            ticks[variant.name] = {name: "✓" if there else "" for name, there in has.items()}
    return pd.DataFrame.from_dict(ticks, orient="index").join(study.table(LADDER)).rename_axis("")


def _moved_shifts(base: Experiment, position: int) -> dict[str, dict[str, Any]]:
    """Value -> changes of the experiment, with the shift at `position` lower, unchanged, and higher."""
    shifts = shift_rule(base)
    shift = shifts[position]
    if isinstance(shift, str):
        percent = float(shift[1:])
        moved = sorted({max(0.0, percent - PERCENTILES), percent, min(100.0, percent + PERCENTILES)})
        values: list[str] | list[float] = [f"p{value:.12g}" for value in moved]
    else:
        values = [round(shift + step, 12) for step in (-DISTANCE, 0.0, DISTANCE)]
    return {str(value): {} if value == shift else {"shifts": _replaced(shifts, position, value)} for value in values}


def _replaced(values: Sequence, position: int, value: object) -> tuple:
    return (*values[:position], value, *values[position + 1 :])
