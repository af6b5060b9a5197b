"""Variants of the chapter on choosing l and b for a `study.Study`, and the tables made from their records."""

import copy
import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

from stego_lib.calibration import shift_rule
from stego_lib.datasets import open_split, open_training_set
from stego_lib.datasets.scenes import draw_scenes
from stego_lib.evaluation import probe_confusion
from stego_lib.experiment import Experiment
from stego_lib.features import open_features
from stego_lib.metrics import match, scores
from stego_lib.probes import sample_codes
from stego_lib.run import Run
from stego_lib.utils.environment import environment
from stego_lib.utils.paths import user_path

from .clusterers import WAYS, agreement, cluster
from .results import read_records, score_table
from .study import Study, Variant

METHODS, GRID, EXTRAS, WEIGHTS, DRAWS = "method", "grid", "features as they are compared", "weights l", "draws"
HEADS = "segmentation head"
ONE_CHANGE = "one thing changed"
KMEANS, AUTO, BEST = "k-means on features", "auto", "not a result: best of the grid by labels"
PUBLISHED = {"CocoStuff-27": "cocostuff27-vits8", "Cityscapes": "cityscapes-vitb8"}
"""Recipes of the paper whose shifts are tried as they stand -> their presets."""
TIES, RANDOM = {"scenes": (60, 75, 90), "camvid": (75,)}, {"scenes": (80, 90, 97, 99), "camvid": (90, 97, 99)}
"""Percentiles of the grid of each dataset: of self and kNN pairs, and of random pairs. CamVid's is coarse: its runs are long."""
OTHER_WEIGHTS = (
    (1.0, 1.0, 1.0),
    (1.0, 0.29, 0.91),
    (1.0, 1.16, 0.91),
    (1.0, 0.58, 0.455),
    (1.0, 0.58, 1.82),
    (0.67, 0.25, 0.63),
)
"""Weights l beside those of the recipe: all alike, each of kNN and random halved and doubled, and the paper's of CocoStuff."""
STEPS = 100
"""Steps of a run of the chapter; the code correspondences have settled by then."""
DRAWN = 10
"""Random draws of each seed."""
TRANSFERRED = "published"
"""Name of draws with the unchanged shifts of a recipe of the paper."""
HEAD_SERIES = 3
"""Series of scenes that the head was chosen on: neither the dataset's nor the backbone's."""
NOT_MEASURED = "not measured"
TARGETS = {"scenes": 5.0, "camvid": 3.0}
"""Dataset -> points of mIoU above k-means on the features to reach."""


def brief(base: Experiment) -> Experiment:
    """`base` with the paper's head, `STEPS` steps and no CRF: what the chapter's comparisons run, so that there can be many."""
    return base.but(head="nonlinear", steps=STEPS, crf=False)


def published_shifts(base: Experiment, recipe: str) -> Experiment:
    """`base` with shifts, weights and centering of a recipe of the paper, found by hand for another backbone and dataset."""
    values = Experiment.preset(recipe)
    return base.but(shifts=values.shifts, weights=values.weights, centering=values.centering)


def methods(base: Experiment) -> list[Variant]:
    """k-means on the features, the paper's shifts as they stand, and shifts="auto"."""
    base = base.but(crf=False)
    found = [Variant(METHODS, KMEANS, base.but(head="none"), fixed="features")]
    found += [
        Variant(METHODS, f"published shifts of {name}", published_shifts(base, recipe))
        for name, recipe in PUBLISHED.items()
    ]
    return [*found, Variant(METHODS, AUTO, base.but(shifts="auto"))]


def grid(base: Experiment) -> list[Variant]:
    """Self and kNN shifts at one percentile, random ones at another, each pair of the dataset's `TIES` and `RANDOM`."""
    found = []
    for tie in TIES[base.dataset]:
        for rand in RANDOM[base.dataset]:
            shifts = (f"p{tie}", f"p{tie}", f"p{rand}")
            same = shifts == shift_rule(base.but(shifts="auto"))  # one run serves both
            found.append(Variant(GRID, f"{tie} {rand}", base.but(crf=False, shifts="auto" if same else shifts)))
    return found


def extras(base: Experiment) -> list[Variant]:
    """shifts="auto" on correspondences as they are, centered, of features minus their mean, and both."""
    return [
        Variant(EXTRAS, name, base.but(crf=False, shifts="auto", centering=centered, subtract_mean=less))
        for name, centered, less in (
            ("as they are", False, False),
            ("centered", True, False),
            ("mean subtracted", False, True),
            ("mean subtracted, centered", True, True),
        )
    ]


def weights(base: Experiment) -> list[Variant]:
    """shifts="auto" with the recipe's weights l and with `OTHER_WEIGHTS`."""
    return [
        Variant(WEIGHTS, " ".join(f"{value:g}" for value in values), base.but(crf=False, shifts="auto", weights=values))
        for values in (base.weights, *OTHER_WEIGHTS)
    ]


def heads(base: Experiment) -> list[Variant]:
    """The paper's segmentation head, and its linear branch alone."""
    return [Variant(HEADS, head, base.but(crf=False, head=head)) for head in ("nonlinear", "linear")]


def one_change(base: Experiment) -> list[Variant]:
    """`base` as it stands, and with one thing changed in each of several: which part holds STEGO back on weak features."""
    base = base.but(crf=False)
    changes: dict[str, dict[str, Any]] = {
        "the recipe": {},
        "linear head": {"head": "linear"},
        "mean subtracted, centered": {"subtract_mean": True, "centering": True},
        "shifts at p60 p60 p90": {"shifts": ("p60", "p60", "p90")},
        "three times the steps": {"steps": 3 * base.steps},
        "30 neighbors for 7": {"neighbors": 30},
        "joint probes": {"probes": "joint"},
    }
    return [Variant(ONE_CHANGE, name, base.but(**change)) for name, change in changes.items()]


def other_scenes(folder: str | Path) -> str:
    """The `data_root` in `folder` with the scenes of `HEAD_SERIES`, drawn if they are not there."""
    root = user_path(folder) / f"series{HEAD_SERIES}"
    if not (root / "scenes").exists():
        draw_scenes(root / "scenes", series=HEAD_SERIES)
    return str(root)


def best_by_labels(study: Study) -> list[Variant]:
    """The grid's variant with the highest mean mIoU: chosen by labels, so an upper bound. Empty until all of the grid is on record."""
    if any(variant.group == GRID for variant, _ in study.missing()):
        return []
    found = study.scores().query("group == @GRID and probe == 'cluster'")
    if found.empty:
        return []
    name = found.groupby("name")["miou"].mean().idxmax()
    (best,) = [variant for variant in study.variants if (variant.group, variant.name) == (GRID, name)]
    return [Variant(METHODS, BEST, best.experiment)]


def recipe_by_labels(recipe: Experiment, chosen: Sequence[Variant]) -> list[Variant]:
    """A recipe as it stands, but for the shifts that labels have `chosen` (of `best_by_labels`); empty if they have not."""
    return [Variant(METHODS, BEST, recipe.but(crf=False, shifts=variant.experiment.shifts)) for variant in chosen]


def draws(bases: Sequence[Experiment], backbones: dict[str, int], seed: int, count: int) -> list[Variant]:
    """Random draws of one of `bases` (each a dataset), a backbone (name or file -> its blocks), a block, a type of features,
    and of a recipe of the paper, whose shifts are tried as they stand against shifts="auto" on the same features.

    Draw `number` of a seed depends on these two, the bases and the backbones in the order given, whatever files are called; give
    the same seed to the study. Short runs, see `short`.
    """
    found = []
    for number in range(count):
        dice = random.Random(f"{seed} {number}")
        base, backbone = short(dice.choice(list(bases))), dice.choice(list(backbones))
        drawn = base.but(
            backbone=backbone, block=dice.randrange(backbones[backbone]), features=dice.choice(("feat", "KK"))
        )
        recipe = dice.choice(sorted(PUBLISHED))
        found.append(Variant(DRAWS, f"{number} {TRANSFERRED}", published_shifts(drawn, PUBLISHED[recipe])))
        found.append(Variant(DRAWS, f"{number} {AUTO}", drawn.but(shifts="auto")))
    return found


def short(base: Experiment) -> Experiment:
    """`base` with small images and short, cheap training: enough to see a collapse, too little for a score to report."""
    sizes = tuple(
        size // 2 // 8 * 8 if isinstance(size, int) else tuple(side // 3 // 8 * 8 for side in size)
        for size in (base.train_size, base.eval_size)
    )
    return base.but(
        train_size=sizes[0], eval_size=sizes[1], steps=100, batch_size=8, points=6, negatives=2, mirror=False, crf=False,
        probes="joint",
    )  # fmt: skip


def collapses(study: Study) -> pd.DataFrame:
    """One row per recorded draw and kind of shifts: seed, number, shifts (`TRANSFERRED` or `AUTO`), collapsed, groups, within, seen, miou, dataset."""
    rows = []
    for variant in study.variants:
        for seed in study.seeds:
            if variant.group == DRAWS and (record := study.record(variant, seed)):
                number, kind = variant.name.split(" ", 1)
                codes = {key: record["codes"][key] for key in ("groups", "within", "seen")}
                rows.append(
                    {"seed": seed, "number": int(number), "shifts": kind, "collapsed": record["collapsed"]}
                    | codes
                    | {"miou": record["scores"]["cluster"]["miou"], "dataset": variant.experiment.dataset}
                )
    return pd.DataFrame(
        rows, columns=["seed", "number", "shifts", "collapsed", "groups", "within", "seen", "miou", "dataset"]
    )


def goals(recipes: dict[str, list[dict[str, Any]]], chosen: dict[str, Study], drawn: pd.DataFrame) -> pd.DataFrame:
    """One line for each goal: the target, the measured value, and "met", "missed" or "not measured".

    recipes: dataset -> run records of its recipe as it stands, one per seed. chosen: dataset -> study of `recipe_by_labels`.
    drawn: of `collapses`.
    """
    rows = []
    for name, records in recipes.items():
        scored = {method: own["miou"] for method, own in score_table(records).groupby("method")} if records else {}
        ours, plain = (scored.get(method, pd.Series(dtype=float)) for method in ("cluster", "kmeans_features"))
        asked, seeds = TARGETS[name], f"{len(ours)} seeds"
        rows.append(
            _goal(f"{name}: standard deviation over seeds", "at most 1.0", ours.std(), "{:.2f}", 1.0, -1, seeds)
        )
        gain = ours.mean() - plain.mean()
        rows.append(
            _goal(f"{name}: above k-means on features", f"at least {asked:g}", gain, "{:+.1f}", asked, 1, seeds)
        )
        best = chosen[name].scores().query("probe == 'cluster'")["miou"]
        behind, seeds = best.mean() - ours.mean(), f"{len(best)} and {len(ours)} seeds"
        rows.append(_goal(f"{name}: behind shifts chosen by labels", "at most 1.0", behind, "{:.2f}", 1.0, -1, seeds))
    for kind, wanted in ((AUTO, "none of 50"), (TRANSFERRED, "counted beside it")):
        found = drawn.loc[drawn["shifts"] == kind, "collapsed"]
        verdict = NOT_MEASURED if len(found) < 50 else "" if kind == TRANSFERRED else _verdict(not found.any())
        rows.append([f"collapses, shifts {kind}", wanted, f"{found.sum()} of {len(found)}", verdict])
    return pd.DataFrame(rows, columns=["goal", "target", "measured", "reached"]).set_index("goal")


def _goal(name: str, asked: str, value: float, form: str, limit: float, sign: int, seeds: str) -> list[str]:
    """A line of `goals`; sign 1: the value should not be below the limit, -1: not above it."""
    if math.isnan(value):
        return [name, asked, "", NOT_MEASURED]
    return [name, asked, f"{form.format(value)} ({seeds})", _verdict(sign * value >= sign * limit)]


def _verdict(reached: bool) -> str:
    return "met" if reached else "missed"


@torch.no_grad()
def clusterings(run: Run, seeds: Sequence[int]) -> dict[str, Any]:
    """A record of every way to cluster (`clusterers.WAYS`), with each seed, on the codes of a trained run.

    "ways": for each of them "accuracy" and "miou" (percent, on `val`, one per seed; labels serve for these alone) and
    "agreement", the mean adjusted Rand index of the clusters of two seeds on the codes of `val`, without labels. A seed also
    draws the codes that are clustered.
    """
    experiment, model = run.experiment, copy.deepcopy(run.model).eval()
    root, clusters = run.folder.parent / "features", model.cluster_probe.clusters
    training = open_features(open_training_set(experiment), run.backbone, experiment.train_size, root)
    held_out = open_split(experiment, "val")
    plain = open_features(held_out, run.backbone, experiment.eval_size, root)
    mirrored = (
        open_features(held_out, run.backbone, experiment.eval_size, root, mirror=True) if experiment.mirror else None
    )
    judged = F.normalize(sample_codes(model, plain, 0)[0], dim=1)
    samples = {seed: F.normalize(sample_codes(model, training, seed)[0], dim=1) for seed in seeds}
    ways: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        found, judgments = [], []
        for seed, codes in samples.items():
            found.append(cluster(codes, len(clusters), seed, way))
            clusters.copy_(found[-1])
            table = probe_confusion(model, plain, mirrored)
            judgments.append(scores(table, match(table)))
        pairs = [agreement(judged, one, other) for one, other in itertools.combinations(found, 2)]
        ways[way] = {key: [judgment[key] for judgment in judgments] for key in ("accuracy", "miou")}
        ways[way]["agreement"] = sum(pairs) / len(pairs) if pairs else None
    about = {"experiment": experiment.to_record(), "backbone_weights": run.backbone.weights_id, "step": run.step}
    return about | {"seeds": list(seeds), "scores": {}, "ways": ways, "environment": environment()}


def clustering_table(folder: str | Path) -> pd.DataFrame:
    """The records of `clusterings` in a folder, one row per dataset and way; empty if there is none.

    heads: runs whose codes were clustered. mIoU: mean over heads and seeds. of seeds, of heads: standard deviations, of one
    head's seeds (root mean square over heads) and of the heads' means. agreement: mean over heads.
    """
    rows = []
    for record in read_records(folder) if list(user_path(folder).glob("*.json")) else []:
        for way, found in record["ways"].items():
            values = pd.Series(found["miou"])
            rows.append(
                {"dataset": record["experiment"]["dataset"], "way": way, "miou": values.mean(), "var": values.var()}
                | {"agreement": found["agreement"]}
            )
    columns = ["heads", "mIoU", "of seeds", "of heads", "agreement"]
    if not rows:
        return pd.DataFrame(columns=columns)
    grouped = pd.DataFrame(rows).groupby(["dataset", "way"], sort=False)
    return pd.DataFrame(
        {"heads": grouped["miou"].size(), "mIoU": grouped["miou"].mean(), "of seeds": grouped["var"].mean() ** 0.5}
        | {"of heads": grouped["miou"].std(), "agreement": grouped["agreement"].mean()}
    )[columns]
