"""What the chapter on choosing l and b varies: each list changes what it says and nothing else; bounds and counts from records."""

import pytest
import torch
from common import few_samples, tiny_experiment

from stego_lib import Experiment, evaluate, train, tuning
from stego_lib.calibration import AUTO, shift_rule
from stego_lib.clusterers import WAYS
from stego_lib.evaluation import recorded
from stego_lib.files import write_json
from stego_lib.study import Study

BASE = tuning.brief(Experiment.preset("scenes", backbone="a_file.safetensors"))


def keep(folder, variant, seed, miou, **more):
    about = {"experiment": recorded(variant.experiment.but(seed=seed)), "step": 1, "fixed_head": variant.fixed}
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
    assert AUTO in [shift_rule(variant.experiment) for variant in tuning.grid(BASE)]
    assert {frozenset(changed(variant)) for variant in tuning.weights(BASE)} == {frozenset(), frozenset({"weights"})}
    assert set().union(*map(changed, tuning.extras(BASE))) == {"centering", "subtract_mean"}


def test_draws_repeat_differ_and_pair_two_kinds_of_shifts():
    bases = [BASE, Experiment.preset("camvid", backbone="b.safetensors")]
    drawn = tuning.draws(bases, {"x": 3, "y": 5}, seed=1, count=30)
    assert drawn == tuning.draws(bases, {"x": 3, "y": 5}, seed=1, count=30)
    assert drawn[:20] == tuning.draws(bases, {"x": 3, "y": 5}, seed=1, count=10)
    assert drawn != tuning.draws(bases, {"x": 3, "y": 5}, seed=2, count=30)
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
    assert found["shifts"].tolist() == [tuning.TAKEN, tuning.AUTO, tuning.TAKEN] and found["number"].tolist() == [
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
