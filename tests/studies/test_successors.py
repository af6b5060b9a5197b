"""The comparison of successors: its variants, its tables from records, and runs that start from others."""

import numpy as np
import pytest
from common import ROOT, few_samples, tiny_experiment
from records import study_record

from stego_book.studies import successors as module
from stego_book.studies.results import MAIN, NAMES
from stego_book.studies.study import Study, Variant, current_weights
from stego_book.studies.successors import KMEANS, SETS, base_of, class_means, comparison, overview, successors
from stego_lib import Experiment
from stego_lib.experiment import SUCCESSORS
from stego_lib.utils.files import read_json, write_json


@pytest.mark.parametrize("folder", SETS)
def test_variants_have_the_published_settings_and_steps_of_their_own(folder):
    base = base_of(folder)
    found = {variant.name: variant for variant in successors(base)}
    assert found["STEGO"].experiment == base and ("depth term (ours, after DepthG)" in found) == (folder == "scenes")
    for method, name in NAMES.items():
        if name in found and method != "stego":
            experiment = found[name].experiment
            assert experiment.method == method and experiment.steps == module.STEPS[base.dataset].get(
                method, base.steps
            )
            assert all(getattr(experiment, key) == value for key, value in SUCCESSORS[method].items())
    started = found["PriMaPs-EM on STEGO's code"]
    assert started.start == base and (started.experiment.head, started.experiment.code_dim) == (
        base.head,
        base.code_dim,
    )
    published = found["SmooSeg, published shifts"].experiment
    assert published == found["SmooSeg"].experiment.but(shifts=module.PUBLISHED_SHIFTS)


def test_tables_average_the_records_of_each_method(tmp_path):
    base = base_of("scenes")
    weights = current_weights(base.backbone)
    variants = successors(base)
    for number, variant in enumerate(variants[:2]):
        for seed in range(3):
            record = study_record(variant, seed, 40.0 + 10 * number + seed, weights)
            record["scores"]["cluster"]["iou"] = [10.0 * number, 20.0 + seed]
            write_json(
                tmp_path / "own" / f"{number}-{seed}.json", record | {"training_seconds": 30.0 + seed, "step": 7}
            )
    for seed in range(2):
        record = study_record(variants[0], seed, 50.0, weights)
        record["scores"]["kmeans_features"] = {"accuracy": 60.0, "miou": 30.0 + 2 * seed, "iou": [1.0, 3.0 + seed]}
        write_json(tmp_path / "main" / f"{seed}.json", record | {"classes": ["sky", "sea"]})
    study = Study(variants, [0, 1, 2], tmp_path / "own")
    table = comparison(study, tmp_path / "main")
    assert list(table.index) == [KMEANS, "STEGO", "SmooSeg"] and table["seeds"].tolist() == [2, 3, 3]
    assert (
        table.loc["SmooSeg", "mIoU"] == "51.0 ± 1.0"
        and table.loc[KMEANS, "mIoU"] == f"31.0 ± {np.std([30, 32], ddof=1):.1f}"
    )
    assert table.loc["STEGO", "seconds of training"] == "31" and table.loc["STEGO", "steps"] == "7"
    means, names = class_means(study, tmp_path / "main")
    assert names == ["sky", "sea"] and {name: values.tolist() for name, values in means.items()} == {
        KMEANS: [1.0, 3.5], "STEGO": [0.0, 21.0], "SmooSeg": [10.0, 21.0],
    }  # fmt: skip


def test_the_overview_has_every_set_of_the_project():
    table = overview(ROOT / "book" / "records", [0, 1, 2])
    assert list(dict.fromkeys(table.columns.get_level_values(0))) == list(SETS.values()) and set(SETS) < set(MAIN)
    assert (table.loc[["STEGO", "SmooSeg", "PriMaPs-EM", "HP", "CAUSE-MLP", KMEANS]] != "").all().all()


def test_a_variant_may_start_from_a_run_which_its_record_names(scenes_root, backbone_file, tmp_path, monkeypatch):
    """The run is trained once for each seed; another study finds the record without it."""
    few_samples(monkeypatch)
    base = tiny_experiment(scenes_root, backbone_file, steps=3, probes="after")
    head = tiny_experiment(
        scenes_root, backbone_file, method="primaps", steps=6, probes="after", head="nonlinear", dropout=0.0
    )
    variants = [Variant("method", "first", base), Variant("method", "second", head, start=base)]
    study = Study(variants, [0, 1], tmp_path / "records")
    study.run(None, tmp_path / "runs")
    assert not study.missing() and not Study(variants, [0, 1], tmp_path / "records").missing()
    runs = [read_json(path)["method"] for path in (tmp_path / "runs").glob("*/experiment.json")]
    assert sorted(runs) == ["primaps"] * 2 + ["stego"] * 2, "the runs of the first variant are those to start from"
    for seed in (0, 1):
        record = study.record(variants[1], seed)
        assert record["experiment"]["start_from"] == base.but(seed=seed).name
    assert Study([Variant("method", "second", head)], [0], tmp_path / "records").missing(), (
        "without a start it is another run"
    )
    assert Experiment.from_dict(study.record(variants[0], 0)["experiment"]).start_from is None
