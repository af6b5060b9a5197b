"""Variants of the chapters on ablations and baselines for a `study.Study`."""

from collections.abc import Iterator, Sequence

import pandas as pd

from stego_lib.calibration import shift_rule
from stego_lib.experiment import Experiment

from .fixed_heads import FIXED_HEADS
from .study import Study, Variant

LADDER = "ingredients"
CODE_DIMS = (16, 32, 128)
NEIGHBORS = (1, 30)
NEGATIVES = (1, 10)
FACTORS = (0.5, 2.0)
"""What l_knn and l_rand are multiplied by. Adam does not see a factor common to all three, so l_self stays."""
PERCENTILES, DISTANCE = 20.0, 0.1
"""How far each shift is moved down and up: percentile points, or the correspondence itself where a recipe gives numbers."""
KINDS = ("self", "knn", "rand")


def ladder(base: Experiment) -> list[Variant]:
    """The paper's ablation: zero clamp, five-crop, centering and CRF, each added to what was there."""
    plain = base.but(zero_clamp=False, crop="none", centering=False, crf=False)
    clamped = plain.but(zero_clamp=True)
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
    """One thing changed at a time: head, K, neighbors, negatives, each shift b, and l_knn and l_rand."""
    base = base.but(crf=False)
    axes = {"head": ("linear", "nonlinear")} | {
        name: sorted({*values, getattr(base, name)})
        for name, values in (("code_dim", CODE_DIMS), ("neighbors", NEIGHBORS), ("negatives", NEGATIVES))
    }
    found = [Variant(name, str(value), base.but(**{name: value})) for name, values in axes.items() for value in values]
    for position, kind in enumerate(KINDS):
        found += [Variant(f"b_{kind}", *pair) for pair in _moved_shifts(base, position)]
    for position, kind in list(enumerate(KINDS))[1:]:
        for factor in sorted({*FACTORS, 1.0}):
            weights = _replaced(base.weights, position, base.weights[position] * factor)
            found.append(Variant(f"l_{kind}", f"{weights[position]:.4g}", base.but(weights=weights)))
    return found


def ablations(base: Experiment) -> list[Variant]:
    """The whole grid of the chapter: the ladder, then the sweeps."""
    return ladder(base) + sweeps(base)


def dimensions(base: Experiment, dims: Sequence[int]) -> list[Variant]:
    """Fixed heads at each number of dimensions, the features themselves, and the trained head where the K sweep has it."""
    base, found = base.but(crf=False), []
    for kind, head in FIXED_HEADS.items():
        if head == "none":
            found.append(Variant(kind, "all", base.but(head=head), fixed=kind))
        else:
            found += [Variant(kind, str(dim), base.but(head=head, code_dim=dim), fixed=kind) for dim in dims]
    trained = sorted({*CODE_DIMS, base.code_dim})
    return found + [Variant("trained head", str(dim), base.but(code_dim=dim)) for dim in trained]


def widths(base: Experiment, channels: int) -> list[Variant]:
    """What tells the width of the code, the head and the loss apart: fixed heads of the recipe's width, and trained heads.

    channels: C of the backbone; one trained head is as wide.
    """
    base = base.but(crf=False)
    found = [
        Variant("features", str(channels), base.but(head="none"), fixed="features"),
        *(
            Variant(kind, str(base.code_dim), base.but(head=FIXED_HEADS[kind]), fixed=kind)
            for kind in ("pca", "random projection", "untrained head")
        ),
    ]
    return found + [Variant("trained head", str(dim), base.but(code_dim=dim)) for dim in (base.code_dim, channels)]


def paper_layout(study: Study) -> pd.DataFrame:
    """The ladder as the paper prints it: a tick for each ingredient, then accuracy and mIoU of both probes."""
    ticks = {}
    for variant in study.variants:
        if variant.group == LADDER:
            e = variant.experiment
            has = {
                "0-clamp": e.official.zero_clamp,
                "5-crop": e.crop == "five",
                "centering": e.centering,
                "CRF": variant.crf,
            }
            ticks[variant.name] = {name: "✓" if there else "" for name, there in has.items()}
    return pd.DataFrame.from_dict(ticks, orient="index").join(study.table(LADDER)).rename_axis("")


def _moved_shifts(base: Experiment, position: int) -> Iterator[tuple[str, Experiment]]:
    """(name, experiment) for the shift at `position` lower, as it is, and higher."""
    shifts = shift_rule(base)
    shift = shifts[position]
    if isinstance(shift, str):
        percent = float(shift[1:])
        values: list[str] | list[float] = [
            f"p{p:.12g}" for p in sorted({max(0.0, percent - PERCENTILES), percent, min(100.0, percent + PERCENTILES)})
        ]
    else:
        values = [round(shift + step, 12) for step in (-DISTANCE, 0.0, DISTANCE)]
    for value in values:
        yield str(value), base if value == shift else base.but(shifts=_replaced(shifts, position, value))


def _replaced(values: Sequence, position: int, value: object) -> tuple:
    return (*values[:position], value, *values[position + 1 :])
