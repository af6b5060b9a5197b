"""What the chapter on choosing l and b varies: each list changes what it says and nothing else; bounds and counts from records."""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from common import few_samples, tiny_experiment
from PIL import Image

from stego_book.studies import tuning
from stego_book.studies.clusterers import WAYS
from stego_book.studies.study import Study, Variant
from stego_lib import Experiment, evaluate, train
from stego_lib.calibration import AUTO, shift_rule
from stego_lib.datasets import painter, scenes
from stego_lib.utils.files import read_json, write_json

BASE = tuning.brief(Experiment.preset("scenes", backbone="a_file.safetensors"))


def keep(folder, variant, seed, miou, **more):
    about = {"experiment": variant.experiment.but(seed=seed).to_record(), "step": 1, "fixed_head": variant.fixed}
    score = {"accuracy": 50.0, "miou": miou}
    write_json(folder / f"{variant.group}-{variant.name}-{seed}.json", about | {"scores": {"cluster": score}} | more)


def changed(variant) -> set[str]:
    return {key for key, value in variant.experiment.to_dict().items() if value != BASE.to_dict()[key]}


def test_each_list_changes_what_it_says():
    assert BASE.steps == tuning.STEPS and not BASE.crf
    published = {variant.name: variant for variant in tuning.methods(BASE)}
    assert changed(published[tuning.AUTO]) == set() and changed(published[tuning.KMEANS]) == {"head"}
    for name, recipe in tuning.PUBLISHED.items():
        one = published[f"published shifts of {name}"]
        assert changed(one) <= {"shifts", "weights", "centering"} and not isinstance(one.experiment.shifts, str)
        assert one.experiment.shifts == Experiment.preset(recipe).shifts
    assert [changed(variant) <= {"shifts"} for variant in tuning.grid(BASE)] == [True] * 12
    assert len({shift_rule(variant.experiment) for variant in tuning.grid(BASE)}) == 12
    camvid = BASE.but(dataset="camvid")
    assert len(tuning.grid(camvid)) == 3, "coarse"
    for base in (BASE, camvid):
        assert AUTO in [shift_rule(variant.experiment) for variant in tuning.grid(base)]
    assert {frozenset(changed(variant)) for variant in tuning.weights(BASE)} == {frozenset(), frozenset({"weights"})}
    assert set().union(*map(changed, tuning.extras(BASE))) == {"centering", "subtract_mean"}


def test_draws_repeat_differ_and_pair_two_kinds_of_shifts():
    bases = [BASE, Experiment.preset("camvid", backbone="b.safetensors")]
    drawn = tuning.draws(bases, {"x": 3, "y": 5}, seed=1, count=30)
    assert drawn == tuning.draws(bases, {"x": 3, "y": 5}, seed=1, count=30)
    assert drawn[:20] == tuning.draws(bases, {"x": 3, "y": 5}, seed=1, count=10)
    assert drawn != tuning.draws(bases, {"x": 3, "y": 5}, seed=2, count=30)
    moved = tuning.draws(bases, {"z/x": 3, "a/y": 5}, seed=1, count=30)
    assert [v.experiment.backbone[2:] for v in moved] == [v.experiment.backbone for v in drawn], (
        "whatever folder it is in"
    )
    for one, other in zip(drawn[::2], drawn[1::2], strict=True):
        assert other.experiment.shifts == "auto" and one.experiment.shifts != "auto"
        same = one.experiment.but(shifts="auto", weights=BASE.weights, centering=BASE.centering)
        assert same == other.experiment and 0 <= same.block < {"x": 3, "y": 5}[same.backbone]
    assert {v.experiment.features for v in drawn} == {"feat", "KK"} and {v.experiment.dataset for v in drawn} == {
        "scenes",
        "camvid",
    }


def test_the_bound_waits_for_the_whole_grid_and_takes_its_best(tmp_path):
    variants = tuning.grid(BASE)
    for number, variant in enumerate(variants[:-1]):
        keep(tmp_path, variant, 0, 10.0 + number % 5)
    assert (
        tuning.best_by_labels(Study(variants, [0], tmp_path)) == [] == tuning.best_by_labels(Study([], [0], tmp_path))
    )
    keep(tmp_path, variants[-1], 0, 30.0)
    (best,) = tuning.best_by_labels(Study(variants, [0], tmp_path))
    assert best.experiment == variants[-1].experiment and best.name == tuning.BEST and "not a result" in best.name


def test_collapses_are_counted_from_records(tmp_path):
    variants = tuning.draws([BASE], {"x": 2}, seed=3, count=2)
    for number, variant in enumerate(variants[:3]):
        codes = {"groups": 1.0 + number, "within": 1.0, "nearest": 1.0, "clusters": 2.0, "seen": None}
        keep(tmp_path, variant, 3, 5.0 * number, collapsed=number == 0, codes=codes)
    found = tuning.collapses(Study(variants, [3], tmp_path))
    assert found["shifts"].tolist() == [tuning.TRANSFERRED, tuning.AUTO, tuning.TRANSFERRED] and found[
        "number"
    ].tolist() == [
        0,
        0,
        1,
    ]
    assert found["collapsed"].tolist() == [True, False, False] and found["groups"].tolist() == [1, 2, 3]


def test_the_table_of_clusterings_is_means_over_heads_and_seeds(tmp_path):
    assert tuning.clustering_table(tmp_path).empty
    for head, values in enumerate(([40.0, 44.0], [50.0, 50.0])):
        ways = {"k-means": {"miou": values, "accuracy": values, "agreement": 0.5 + head / 10}}
        about = {"experiment": BASE.but(seed=head).to_dict(), "scores": {}, "step": 1, "ways": ways}
        write_json(tmp_path / f"{head}.json", about)
    row = tuning.clustering_table(tmp_path).loc[("scenes", "k-means")]
    assert row["heads"] == 2 and row["mIoU"] == 46 and abs(row["agreement"] - 0.55) < 1e-9
    assert abs(row["of seeds"] - 2.0) < 1e-9 and abs(row["of heads"] - 32**0.5) < 1e-9, "by hand: variances 8, 0 and 32"


def test_heads_differ_in_nothing_else_and_are_compared_on_other_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "draw_scenes", partial(scenes.draw_scenes, train=2, val=1))
    paper, branch = tuning.heads(BASE)
    assert (paper.experiment.head, branch.experiment.head) == ("nonlinear", "linear")
    assert paper.experiment.but(head="linear") == branch.experiment
    root = Path(tuning.other_scenes(tmp_path))
    about = read_json(root / "scenes" / "drawn.json")
    assert about["seed"] == tuning.HEAD_SERIES not in (scenes.SEED, scenes.PRETRAINING_SEED)
    first = np.array(Image.open(root / "scenes" / "imgs" / "train" / "0000.png"))
    assert np.array_equal(first, painter.paint_scene(tuning.HEAD_SERIES, 0, painter.SIZE)[0])
    drawn = (root / "scenes" / "drawn.json").stat().st_mtime_ns
    assert tuning.other_scenes(tmp_path) == str(root)
    assert (root / "scenes" / "drawn.json").stat().st_mtime_ns == drawn, "drawn once"


def recipe_records(cluster, features):
    about = {"experiment": BASE.to_record(), "step": 1}
    for seed, values in enumerate(zip(cluster, features, strict=True)):
        scores = {
            key: {"accuracy": 1.0, "miou": v} for key, v in zip(("cluster", "kmeans_features"), values, strict=True)
        }
        yield about | {"experiment": about["experiment"] | {"seed": seed}, "scores": scores}


def test_goals_are_judged_from_records(tmp_path):
    recipes = {
        "scenes": [*recipe_records([40.0, 41.0], [35.0, 36.0])],
        "camvid": [*recipe_records([20.0, 24.0], [20.0] * 2)],
    }
    grid_cell = Variant(tuning.GRID, "75 99", BASE.but(shifts=("p75", "p75", "p99")))
    (best,) = tuning.recipe_by_labels(BASE.but(steps=7, crf=True), [grid_cell])
    assert best.experiment == BASE.but(steps=7, shifts=("p75", "p75", "p99"))
    for seed in range(2):
        keep(tmp_path, best, seed, 41.25 + seed)
    chosen = {
        "scenes": Study([best], [0, 1], tmp_path),
        "camvid": Study(tuning.recipe_by_labels(BASE, []), [0], tmp_path),
    }
    drawn = pd.DataFrame({"shifts": [tuning.TRANSFERRED, tuning.AUTO] * 50, "collapsed": [True, False] * 50})
    found = tuning.goals(recipes, chosen, drawn)
    assert found["measured"].to_dict() == {
        "scenes: standard deviation over seeds": "0.71 (2 seeds)",
        "scenes: above k-means on features": "+5.0 (2 seeds)",
        "scenes: behind shifts chosen by labels": "1.25 (2 and 2 seeds)",
        "camvid: standard deviation over seeds": "2.83 (2 seeds)",
        "camvid: above k-means on features": "+2.0 (2 seeds)",
        "camvid: behind shifts chosen by labels": "",
        "collapses, shifts auto": "0 of 50",
        "collapses, shifts published": "50 of 50",
    }
    assert found["reached"].tolist() == ["met", "met", "missed", "missed", "missed", "not measured", "met", ""]
    drawn.loc[1, "collapsed"] = True
    none = tuning.goals({"scenes": []}, {"scenes": Study([best], [0], tmp_path / "none")}, drawn)
    assert none["reached"].tolist() == ["not measured"] * 3 + ["missed", ""]
    assert tuning.goals({}, {}, drawn[:90])["reached"].tolist() == ["not measured"] * 2


def test_the_clusters_of_a_run_are_found_again_and_scored_alike(scenes_root, backbone_file, tmp_path, monkeypatch):
    """k-means with the run's own seed gives the clusters that the evaluation scores; the run keeps its own."""
    few_samples(monkeypatch)
    run = train(tiny_experiment(scenes_root, backbone_file, probes="after", mirror=True), runs_dir=tmp_path)
    expected, clusters = evaluate(run, baselines=False)["scores"]["cluster"], run.model.cluster_probe.clusters.clone()
    found = tuning.clusterings(run, [run.experiment.seed, 7])
    assert found["ways"].keys() == WAYS.keys() and found["seeds"] == [run.experiment.seed, 7]
    for key in ("accuracy", "miou"):
        assert found["ways"]["k-means"][key][0] == pytest.approx(expected[key], abs=0.1), "equal but for ties"
        assert all(len(way[key]) == 2 for way in found["ways"].values())
    assert all(-0.1 < way["agreement"] < 1 for way in found["ways"].values()), "other seeds, other codes"
    assert torch.equal(run.model.cluster_probe.clusters, clusters)
    alone = tuning.clusterings(run, [7])["ways"]
    assert alone["k-means"]["miou"] == found["ways"]["k-means"]["miou"][1:] and alone["k-means"]["agreement"] is None


def test_one_change_leaves_all_else_as_it_is():
    base = Experiment.preset("camvid", backbone="photos_vit_tiny8")
    first, *others = tuning.one_change(base)
    assert first.experiment == base.but(crf=False)
    plain, names = first.experiment.to_dict(), [variant.name for variant in others]
    changed = [{key for key, value in one.experiment.to_dict().items() if value != plain[key]} for one in others]
    assert changed == [{"head"}, {"subtract_mean", "centering"}, {"shifts"}, {"steps"}, {"neighbors"}, {"probes"}]
    assert len(set(names)) == len(names)
