"""The variants of the chapters: each list changes what it says and nothing else. Tables made from their records."""

import pytest
from common import few_samples, tiny_experiment

from stego_book.studies import successors as of_successors
from stego_book.studies.ablations import ablations, dimensions, ladder, paper_layout, sweeps
from stego_book.studies.results import NAMES
from stego_book.studies.study import Study
from stego_book.studies.successors import KMEANS, SETS, base_of, curve, successors
from stego_lib import Experiment, evaluate, train
from stego_lib.experiment import SUCCESSORS

RECIPE = Experiment.preset("scenes")


def changed(variant, base) -> set[str]:
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
