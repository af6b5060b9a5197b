"""Variants and tables of the chapter on choosing shifts b and weights l, for a `study.Study`."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from stego_lib.calibration import shift_rule
from stego_lib.datasets.scenes import draw_scenes
from stego_lib.experiment import Experiment
from stego_lib.utils.paths import user_path

from .results import read_records, score_table
from .study import Study, Variant, vary

METHODS, GRID, EXTRAS, WEIGHTS, DRAWS = "method", "grid", "preprocessing of features", "weights l", "draws"
HEADS = "segmentation head"
KMEANS, AUTO, BEST = "k-means on features", "auto", "not a result: best of the grid by labels"
# Recipe of the paper with tested shifts -> preset; and the name of draws with such shifts.
PUBLISHED, TRANSFERRED = {"CocoStuff-27": "cocostuff27-vits8", "Cityscapes": "cityscapes-vitb8"}, "published"
# Dataset -> percentiles of the grid, for self and kNN pairs and for random pairs. CamVid's runs are long, so its grid
# is coarse.
TIES, RANDOM = {"scenes": (60, 75, 90), "camvid": (75,)}, {"scenes": (80, 90, 97, 99), "camvid": (90, 97, 99)}
# Other weights l: all equal, kNN and random halved and doubled, and the paper's for CocoStuff.
OTHER_WEIGHTS = (
    (1.0, 1.0, 1.0),
    (1.0, 0.29, 0.91),
    (1.0, 1.16, 0.91),
    (1.0, 0.58, 0.455),
    (1.0, 0.58, 1.82),
    (0.67, 0.25, 0.63),
)
# Steps of a short run, after which code correspondences are stable. Random draws per seed.
STEPS, DRAWN = 100, 10
# Series of scenes for choosing the head; neither the dataset nor the backbone uses it.
HEAD_SERIES = 3
# Dataset -> target gain over k-means on features, in points of mIoU.
TARGETS = {"scenes": 5.0, "camvid": 3.0}
NOT_MEASURED = "not measured"


def brief(base: Experiment) -> Experiment:
    """`base` with the paper's head, `STEPS` steps and no CRF, for many comparisons."""
    return base.but(head="nonlinear", steps=STEPS, crf=False)


def published_shifts(base: Experiment, recipe: str) -> Experiment:
    """`base` with shifts, weights and centering of a recipe of the paper, tuned for another backbone and dataset."""
    values = Experiment.preset(recipe)
    return base.but(shifts=values.shifts, weights=values.weights, centering=values.centering)


def methods(base: Experiment) -> list[Variant]:
    """k-means on the features, the paper's shifts, and shifts="auto"."""
    base = base.but(crf=False)
    variants = [Variant(METHODS, KMEANS, base.but(head="none"), fixed_head="features")]
    for name, recipe in PUBLISHED.items():
        variants.append(Variant(METHODS, f"published shifts of {name}", published_shifts(base, recipe)))
    return [*variants, Variant(METHODS, AUTO, base.but(shifts="auto"))]


def grid(base: Experiment) -> list[Variant]:
    """Grid of percentiles for self and kNN pairs (`TIES`) and for random pairs (`RANDOM`)."""
    base, cells = base.but(shifts="auto"), {}
    for tie in TIES[base.dataset]:
        for rand in RANDOM[base.dataset]:
            shifts = (f"p{tie}", f"p{tie}", f"p{rand}")
            cells[f"{tie} {rand}"] = {} if shifts == shift_rule(base) else {"shifts": shifts}  # one run serves both
    return vary(base, GRID, cells)


def extras(base: Experiment) -> list[Variant]:
    """shifts="auto" with plain, centered and mean-subtracted correspondences, and with both changes."""
    ways = {"plain": (False, False), "centered": (True, False)}
    ways |= {"mean subtracted": (False, True), "mean subtracted, centered": (True, True)}
    changes = {
        name: dict(shifts="auto", centering=centered, official={"subtract_mean": subtracted})
        for name, (centered, subtracted) in ways.items()
    }
    return vary(base, EXTRAS, changes)


def weights(base: Experiment) -> list[Variant]:
    """shifts="auto" with the recipe's weights l and with `OTHER_WEIGHTS`."""
    names = {" ".join(f"{value:g}" for value in values): values for values in (base.weights, *OTHER_WEIGHTS)}
    return vary(base, WEIGHTS, {name: dict(shifts="auto", weights=values) for name, values in names.items()})


def heads(base: Experiment) -> list[Variant]:
    """The paper's segmentation head, and only its linear branch."""
    return vary(base, HEADS, {head: {"head": head} for head in ("nonlinear", "linear")})


def other_scenes(folder: str | Path) -> str:
    """The `data_root` in `folder` with the scenes of `HEAD_SERIES`; generates them if missing."""
    root = user_path(folder) / f"series{HEAD_SERIES}"
    if not (root / "scenes").exists():
        draw_scenes(root / "scenes", series=HEAD_SERIES)
    return str(root)


def best_by_labels(study: Study) -> list[Variant]:
    """The grid's variant with the highest mean mIoU (an upper bound); empty until the grid is complete."""
    scores = study.scores().query("group == @GRID and probe == 'cluster'")
    if scores.empty or any(variant.group == GRID for variant, _ in study.missing()):
        return []
    name = scores.groupby("name")["miou"].mean().idxmax()
    (best,) = [variant for variant in study.variants if (variant.group, variant.name) == (GRID, name)]
    return [Variant(METHODS, BEST, best.experiment)]


def recipe_by_labels(recipe: Experiment, chosen: Sequence[Variant]) -> list[Variant]:
    """A recipe with the shifts of `best_by_labels` (`chosen`); empty if there are none."""
    return [Variant(METHODS, BEST, recipe.but(crf=False, shifts=variant.experiment.shifts)) for variant in chosen]


def draws(bases: Sequence[Experiment], backbones: dict[str, int], seed: int, count: int) -> list[Variant]:
    """Random settings: dataset, backbone, block, type of features, and a recipe of the paper, whose shifts are compared
    with shifts="auto" on the same features.

    backbones: name or file -> number of blocks. Draws depend only on the seed, the bases and the order of the
    backbones. Use the same seed for the study.
    """
    variants = []
    for number in range(count):
        dice = random.Random(f"{seed} {number}")
        base, backbone = short(dice.choice(list(bases))), dice.choice(list(backbones))
        block, keys = dice.randrange(backbones[backbone]), dice.choice(("feat", "KK")) == "KK"
        drawn = base.but(backbone=backbone, official={"block": block, "keys": keys})
        recipe = dice.choice(sorted(PUBLISHED))
        variants.append(Variant(DRAWS, f"{number} {TRANSFERRED}", published_shifts(drawn, PUBLISHED[recipe])))
        variants.append(Variant(DRAWS, f"{number} {AUTO}", drawn.but(shifts="auto")))
    return variants


def short(base: Experiment) -> Experiment:
    """`base` with small images and short training: sufficient to detect collapse, not for scores."""
    sizes = [
        size // 2 // 8 * 8 if isinstance(size, int) else tuple(side // 3 // 8 * 8 for side in size)
        for size in (base.train_size, base.eval_size)
    ]
    cheap: dict[str, Any] = {"steps": 100, "batch_size": 8, "points": 6, "negatives": 2}
    cheap |= {"mirror": False, "crf": False, "probes": "joint"}
    return base.but(train_size=sizes[0], eval_size=sizes[1], **cheap)


def collapses(study: Study) -> pd.DataFrame:
    """One row per recorded draw and kind of shifts (`TRANSFERRED` or `AUTO`): collapse, groups and mIoU."""
    rows = []
    for variant in study.variants:
        for seed, record in study.records(variant).items():
            number, kind = variant.name.split(" ", 1)
            row = {"seed": seed, "number": int(number), "shifts": kind, "collapsed": record["collapsed"]}
            row |= {key: record["codes"][key] for key in ("groups", "within")}
            rows.append(row | {"miou": record["scores"]["cluster"]["miou"]})
    return pd.DataFrame(rows, columns=["seed", "number", "shifts", "collapsed", "groups", "within", "miou"])


def goals(recipes: dict[str, list[dict[str, Any]]], chosen: dict[str, Study], drawn: pd.DataFrame) -> pd.DataFrame:
    """One row per goal: target, measured value, and "met", "missed" or "not measured".

    recipes: dataset -> run records of its recipe, one per seed. chosen: dataset -> study of `recipe_by_labels`.
    drawn: table of `collapses`.
    """
    lines: dict[str, tuple[str, str, str]] = {}

    def add(goal: str, target: str, value: float, form: str, reached: bool, seeds: str) -> None:
        known = not math.isnan(value)
        verdict = "met" if reached else "missed"
        lines[goal] = (target, f"{form.format(value)} ({seeds})", verdict) if known else (target, "", NOT_MEASURED)

    for name, records in recipes.items():
        scores = score_table(records)
        ours, plain = (scores.loc[scores["method"] == method, "miou"] for method in ("cluster", "kmeans_features"))
        best = chosen[name].scores().query("probe == 'cluster'")["miou"]
        std, gain, behind = ours.std(), ours.mean() - plain.mean(), best.mean() - ours.mean()
        target, seeds = TARGETS[name], f"{len(ours)} seeds"
        add(f"{name}: standard deviation over seeds", "at most 1.0", std, "{:.2f}", std <= 1, seeds)
        add(f"{name}: above k-means on features", f"at least {target:g}", gain, "{:+.1f}", gain >= target, seeds)
        seeds = f"{len(best)} and {len(ours)} seeds"
        add(f"{name}: behind shifts chosen by labels", "at most 1.0", behind, "{:.2f}", behind <= 1, seeds)
    for kind, aim in ((AUTO, "none of 50"), (TRANSFERRED, "for comparison")):
        collapsed = drawn.loc[drawn["shifts"] == kind, "collapsed"]
        verdict = "" if kind == TRANSFERRED else "missed" if collapsed.any() else "met"
        verdict = NOT_MEASURED if len(collapsed) < 50 else verdict
        lines[f"collapses, shifts {kind}"] = (aim, f"{collapsed.sum()} of {len(collapsed)}", verdict)
    table = pd.DataFrame.from_dict(lines, orient="index", columns=["target", "measured", "reached"])
    return table.rename_axis("goal")


def clustering_table(folder: str | Path) -> pd.DataFrame:
    """Comparison of clusterings of the codes of trained runs, one row per dataset and method, from records in a folder.

    Each method clusters the codes of each head (a trained run) with several seeds, which also sample the codes (code:
    commit 00045c4). of seeds: standard deviation over the seeds of a head (root mean square over heads). of heads:
    standard deviation of the heads' means. agreement: mean adjusted Rand index of two seeds on validation codes.
    """
    rows = []
    for record in read_records(folder) if any(user_path(folder).glob("*.json")) else []:
        for way, values in record["ways"].items():
            miou = pd.Series(values["miou"])
            about = {"dataset": record["experiment"]["dataset"], "way": way, "agreement": values["agreement"]}
            rows.append(about | {"miou": miou.mean(), "variance": miou.var()})
    columns = ["dataset", "way", "agreement", "miou", "variance"]
    groups = pd.DataFrame(rows, columns=columns).groupby(["dataset", "way"], sort=False)
    table = groups.agg({"miou": ["size", "mean", "std"], "variance": "mean", "agreement": "mean"})
    table.columns = ["heads", "mIoU", "of heads", "of seeds", "agreement"]
    table["of seeds"] **= 0.5
    return table[["heads", "mIoU", "of seeds", "of heads", "agreement"]]
