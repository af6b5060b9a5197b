"""The variants of the chapters: each list changes what it says and nothing else. Tables made from their records."""

import pandas as pd
import pytest
from common import ROOT, few_samples, tiny_experiment
from records import record, study_record

from stego_book.studies import quality, tuning
from stego_book.studies import successors as of_successors
from stego_book.studies.ablations import ablations, dimensions, ladder, paper_layout, sweeps
from stego_book.studies.results import MAIN, NAMES
from stego_book.studies.study import Study, Variant
from stego_book.studies.successors import KMEANS, SETS, base_of, class_means, comparison, curve, overview, successors
from stego_lib import Experiment, evaluate, train
from stego_lib.calibration import AUTO_SHIFTS, shift_rule
from stego_lib.experiment import SUCCESSORS
from stego_lib.utils.files import write_json

RECIPE = Experiment.preset("scenes")
BASE = tuning.brief(Experiment.preset("scenes", backbone="a_file.safetensors"))


def keep(folder, variant, seed, miou, **more):
    write_json(folder / f"{variant.group}-{variant.name}-{seed}.json", study_record(variant, seed, miou) | more)


def changed(variant, base=BASE) -> set[str]:
    """Fields of the experiment, and options of the authors' code, in which a variant differs from the base."""
    ours, theirs = ({**(values := e.to_dict()).pop("official"), **values} for e in (variant.experiment, base))
    return {key for key in ours if ours[key] != theirs[key]}


def test_the_ladder_adds_one_ingredient_at_a_time(tmp_path):
    rungs = ladder(RECIPE.but(crop="five", centering=True, official={"zero_clamp": False}))
    added = [(e.official.zero_clamp, e.crop, e.centering) for e in (rung.experiment for rung in rungs)]
    assert added == [(False, "none", False), (True, "none", False), (True, "five", False)] + [(True, "five", True)] * 2
    assert rungs[3].experiment == rungs[4].experiment and [rung.crf for rung in rungs] == [False] * 4 + [True]
    table = paper_layout(Study(rungs, [0], tmp_path))
    assert (table[["0-clamp", "5-crop", "centering", "CRF"]] == "✓").sum(axis=1).tolist() == [0, 1, 2, 3, 4]


def test_a_sweep_changes_one_value_and_passes_through_the_base(tmp_path):
    base = RECIPE.but(crf=False)
    groups: dict[str, list] = {}
    for variant in sweeps(RECIPE):
        groups.setdefault(variant.group, []).append(variant)
    assert set(groups) == {"head", "code_dim", "neighbors", "negatives", "b_self", "b_knn", "b_rand", "l_knn", "l_rand"}
    for group, variants in groups.items():
        assert base in [variant.experiment for variant in variants], group
        assert len({repr(variant.experiment) for variant in variants}) == len(variants) > 1
        assert all(len(changed(variant, base)) <= 1 for variant in variants), group
    runs = {repr(variant.experiment) for variant in ablations(RECIPE)}
    assert len(Study(ablations(RECIPE), [0, 1, 2], tmp_path).missing()) == 3 * len(runs), "equal ones count once"
    trained = {repr(v.experiment) for v in dimensions(RECIPE, [2, 8]) if v.fixed_head is None}
    assert trained == {repr(v.experiment) for v in groups["code_dim"]}, "dimensions share the runs of the sweep"


def test_shifts_move_as_percentiles_or_as_numbers():
    moved = {
        kind: [v.experiment.shifts for v in sweeps(RECIPE.but(shifts=("p10", 0.3, "p90"))) if v.group == kind]
        for kind in ("b_self", "b_knn", "b_rand")
    }
    assert [s[0] for s in moved["b_self"]] == ["p0", "p10", "p30"]
    assert [s[1] for s in moved["b_knn"]] == [0.2, 0.3, 0.4]
    assert [s[2] for s in moved["b_rand"]] == ["p70", "p90", "p100"]


def test_each_list_of_the_chapter_on_shifts_changes_what_it_says():
    assert BASE.steps == tuning.STEPS and not BASE.crf
    methods = {variant.name: variant for variant in tuning.methods(BASE)}
    assert changed(methods[tuning.AUTO]) == set() and changed(methods[tuning.KMEANS]) == {"head"}
    for name, recipe in tuning.PUBLISHED.items():
        variant = methods[f"published shifts of {name}"]
        assert changed(variant) <= {"shifts", "weights", "centering"}
        assert variant.experiment.shifts == Experiment.preset(recipe).shifts
    camvid = BASE.but(dataset="camvid")
    for base, count in ((BASE, 12), (camvid, 3)):
        rules = {shift_rule(variant.experiment) for variant in tuning.grid(base)}
        assert len(rules) == count and AUTO_SHIFTS in rules
        assert all(changed(variant, base) <= {"shifts"} for variant in tuning.grid(base))
    assert {frozenset(changed(variant)) for variant in tuning.weights(BASE)} == {frozenset(), frozenset({"weights"})}
    assert set().union(*map(changed, tuning.extras(BASE))) == {"centering", "subtract_mean"}


def test_draws_repeat_differ_and_pair_two_kinds_of_shifts():
    bases, blocks = [BASE, Experiment.preset("camvid", backbone="b.safetensors")], {"x": 3, "y": 5}
    drawn = tuning.draws(bases, blocks, seed=1, count=30)
    assert drawn[:20] == tuning.draws(bases, blocks, seed=1, count=10)
    assert drawn != tuning.draws(bases, blocks, seed=2, count=30)
    for published, auto in zip(drawn[::2], drawn[1::2], strict=True):
        assert auto.experiment.shifts == "auto" and published.experiment.shifts != "auto"
        same = published.experiment.but(shifts="auto", weights=BASE.weights, centering=BASE.centering)
        assert same == auto.experiment and 0 <= same.official.block < blocks[same.backbone]


def test_the_bound_waits_for_the_whole_grid_and_takes_its_best(tmp_path):
    variants = tuning.grid(BASE)
    for number, variant in enumerate(variants[:-1]):
        keep(tmp_path, variant, 0, 10.0 + number % 5)
    assert tuning.best_by_labels(Study(variants, [0], tmp_path)) == []
    keep(tmp_path, variants[-1], 0, 30.0)
    (best,) = tuning.best_by_labels(Study(variants, [0], tmp_path))
    assert best.experiment == variants[-1].experiment and "not a result" in best.name


def test_goals_are_judged_from_records(tmp_path):
    recipes = {}
    for name, ours, kmeans in (("scenes", [40.0, 41.0], [35.0, 36.0]), ("camvid", [20.0, 24.0], [20.0, 20.0])):
        recipes[name] = [record(seed) for seed in range(2)]
        for scored, cluster, features in zip(recipes[name], ours, kmeans, strict=True):
            values = {"cluster": cluster, "kmeans_features": features}
            scored["scores"] = {method: {"accuracy": 1.0, "miou": miou} for method, miou in values.items()}
    cell = Variant(tuning.GRID, "75 99", BASE.but(shifts=("p75", "p75", "p99")))
    (best,) = tuning.recipe_by_labels(BASE.but(steps=7, crf=True), [cell])
    assert best.experiment == BASE.but(steps=7, shifts=("p75", "p75", "p99"))
    for seed in range(2):
        keep(tmp_path, best, seed, 41.25 + seed)
    chosen = {"scenes": Study([best], [0, 1], tmp_path), "camvid": Study([], [0, 1], tmp_path)}
    drawn = pd.DataFrame({"shifts": [tuning.TRANSFERRED, tuning.AUTO] * 50, "collapsed": [True, False] * 50})
    goals = tuning.goals(recipes, chosen, drawn)
    measured = ["0.71 (2 seeds)", "+5.0 (2 seeds)", "1.25 (2 and 2 seeds)", "2.83 (2 seeds)", "+2.0 (2 seeds)", ""]
    assert goals["measured"].tolist() == [*measured, "0 of 50", "50 of 50"]
    assert goals["reached"].tolist() == ["met", "met", "missed", "missed", "missed", "not measured", "met", ""]
    assert tuning.goals({}, {}, drawn[:90])["reached"].tolist() == ["not measured"] * 2


@pytest.mark.parametrize("folder", SETS)
def test_successors_have_the_published_settings_and_steps_of_their_own(folder):
    base = base_of(folder)
    variants = {variant.name: variant for variant in successors(base)}
    assert variants["STEGO"].experiment == base.but(crf=False)
    assert (NAMES["depthg"] in variants) == (folder == "scenes")
    for method, steps in of_successors.STEPS[base.dataset].items():
        experiment = variants[NAMES[method]].experiment
        assert (experiment.method, experiment.steps) == (method, steps)
        assert all(getattr(experiment, key) == value for key, value in SUCCESSORS[method].items())
    if from_kmeans := variants.get("PriMaPs-EM from k-means"):
        assert from_kmeans.start == variants[KMEANS].experiment


def test_a_curve_ends_with_the_scores_of_the_run(scenes_root, backbone_file, tmp_path, monkeypatch):
    few_samples(monkeypatch)
    for method in ("smooseg", "hp"):
        changes = SUCCESSORS[method] | dict(method=method, code_dim=8, steps=4, crf=False)
        experiment = tiny_experiment(scenes_root, backbone_file, **changes)
        table = curve("a name", experiment, 2, tmp_path)
        assert table["step"].tolist() == [2, 4] and set(table["method"]) == {"a name"}
        expected = evaluate(train(experiment, runs_dir=tmp_path), baselines=False)["scores"]["cluster"]
        assert table.iloc[-1][["miou", "accuracy"]].tolist() == [
            round(expected[key], 2) for key in ("miou", "accuracy")
        ]


def test_the_comparison_of_successors_averages_the_records_of_each_method(tmp_path):
    variants = successors(base_of("camvid_photos_d6"))
    for number, variant in enumerate(variants[:2]):
        for seed in range(3):
            kept = study_record(variant, seed, 40.0 + 10 * number + seed) | {"step": 7, "classes": ["sky", "sea"]}
            for scores in kept["scores"].values():
                scores |= {"border_f": 30.0 + seed, "iou": [10.0 * number, 20.0 + seed]}
            write_json(tmp_path / f"{number}-{seed}.json", kept)
    study = Study(variants, [0, 1, 2], tmp_path)
    table = comparison(study)
    assert list(table.index) == [KMEANS, "STEGO"] and table["seeds"].tolist() == [3, 3]
    assert table.loc["STEGO", ["steps", "mIoU", "border F"]].tolist() == ["7", "51.0 ± 1.0", "31.0 ± 1.0"]
    means, names = class_means(study)
    expected = {KMEANS: [0.0, 21.0], "STEGO": [10.0, 21.0]}
    assert names == ["sky", "sea"] and {name: values.tolist() for name, values in means.items()} == expected


def test_the_overview_has_every_set_of_the_project():
    table = overview(ROOT / "book" / "records", [0, 1, 2])
    assert list(table.columns) == list(SETS.values()) and set(SETS) < set(MAIN)
    assert (table.loc[["STEGO", "SmooSeg", KMEANS]] != "").all().all()


def test_a_fast_way_is_within_the_spread_unless_it_is_further_below(tmp_path):
    base = Experiment.preset("scenes", backbone="a_file.safetensors")
    both = quality.studies(base, [0, 1], tmp_path)
    assert set(quality.verdicts(both).stack()) == {"not run"}
    values = ([48.0, 49.0], [46.0, 47.0], [70.0], [48.0, 50.0], [47.0, 48.0], [48.5, 49.5])
    variants = [(study, variant) for study in both for variant in study.variants]
    for (study, variant), (way, changes), scores in zip(variants, quality.WAYS.items(), values, strict=True):
        e = variant.experiment
        assert variant.name == way and e == base.but(**changes, crf=not changes)
        for seed, miou in enumerate(scores):
            kept = study_record(variant, seed, miou, precision=e.precision, store=e.feature_store)
            write_json(study.folder / f"{way}-{seed}.json", kept)
    both = quality.studies(base, [0, 1], tmp_path)
    table, verdicts = quality.table(both), quality.verdicts(both)
    assert table["seeds"].tolist() == [2, 2, 1, 2, 2, 2] and table.loc["online joint", "linear mIoU"] == "49.0 ± 1.4"
    shown = ["not run", "-2.5, spread 1.4: below it", "+2.0, spread 0.7: within"]  # one seed has no spread
    assert verdicts["cluster"].tolist()[:3] == verdicts["linear"].tolist()[:3] == shown
