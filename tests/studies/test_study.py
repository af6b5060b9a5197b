"""Studies: what is on record is not run again, tables are made from records; the grids of the chapters."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from common import tiny_experiment
from records import study_record

from stego_book.studies import study
from stego_book.studies.ablations import LADDER, ablations, dimensions, ladder, paper_layout, sweeps
from stego_book.studies.study import Study, Variant
from stego_lib import Experiment
from stego_lib.calibration import AUTO
from stego_lib.utils.files import read_json, write_json

BASE = Experiment.preset("scenes")
TWO = [Variant("K", "8", BASE.but(code_dim=8)), Variant("K", "16", BASE.but(code_dim=16))]


@pytest.fixture
def weights(monkeypatch):
    """Makes today's embedded weights be called "now"."""
    monkeypatch.setattr(study, "current_weights", lambda backbone: "now")
    return "now"


def test_a_record_is_found_by_its_experiment_whatever_its_file_is_called(tmp_path, weights):
    write_json(tmp_path / "anything.json", study_record(TWO[0], 1, 40.0, weights))
    found = Study(TWO, [0, 1], tmp_path)
    assert found.record(TWO[0], 1)["scores"]["cluster"]["miou"] == 40.0
    assert found.record(TWO[0], 0) is None and found.record(TWO[1], 1) is None
    assert [(v.name, seed) for v, seed in found.missing()] == [("8", 0), ("16", 0), ("16", 1)], "first seeds first"
    elsewhere = replace(TWO[0], experiment=TWO[0].experiment.but(data_root="/other", device="cpu"))
    assert found.record(elsewhere, 1) is not None, "where a run was made does not tell it apart"


def test_a_record_of_other_weights_does_not_count(tmp_path, weights):
    write_json(tmp_path / "old.json", study_record(TWO[0], 0, 40.0, "then"))
    assert Study(TWO, [0], tmp_path).record(TWO[0], 0) is None


def test_the_embedded_weights_are_those_that_a_record_names():
    assert study.current_weights("scenes_vit_tiny8") == study.Backbone("scenes_vit_tiny8").weights_id
    assert study.current_weights("dino_vits8") is None


def test_a_record_without_a_newer_key_has_its_default(tmp_path, weights):
    old = study_record(TWO[0], 0, 40.0, weights)
    del old["experiment"]["rec_weight"]
    write_json(tmp_path / "old.json", old)
    assert Study(TWO, [0], tmp_path).record(TWO[0], 0) is not None


def test_fixed_and_trained_heads_are_told_apart(tmp_path, weights):
    write_json(tmp_path / "a.json", study_record(TWO[0], 0, 40.0, weights) | {"fixed_head": "pca"})
    assert Study(TWO, [0], tmp_path).record(TWO[0], 0) is None
    assert Study(TWO, [0], tmp_path).record(replace(TWO[0], fixed="pca"), 0) is not None


def test_the_table_has_mean_and_spread_and_says_what_was_not_run(tmp_path, weights):
    values = {0: 40.0, 1: 44.0, 2: 45.0}
    for seed, miou in values.items():
        write_json(tmp_path / f"{seed}.json", study_record(TWO[0], seed, miou, weights))
    found = Study(TWO, [0, 1, 2], tmp_path)
    table = found.table("K")
    m, s = np.mean(list(values.values())), np.std(list(values.values()), ddof=1)
    assert table.loc["8", "cluster mIoU"] == f"{m:.1f} ± {s:.1f}"
    assert table.loc["8", "cluster accuracy"] == f"{m + 10:.1f} ± {s:.1f}"
    assert list(table["seeds"]) == [3, 0] and set(table.loc["16"].iloc[1:]) == {"not run"}
    assert found.seconds().tolist() == [2.0] * 3
    after = Study([replace(TWO[0], crf=True)], [0, 1, 2], tmp_path)
    assert after.table("K").loc["8", "cluster mIoU"] == f"{m + 1:.1f} ± {s:.1f}", "read after the CRF"


def test_a_run_leaves_a_record_and_is_not_repeated(scenes_root, backbone_file, tmp_path, monkeypatch):
    base = tiny_experiment(scenes_root, backbone_file, steps=3, probes="after")
    variants = [
        Variant("K", "8", base),
        Variant("again", "the same", base),
        Variant("pca", "4", base.but(head="linear", code_dim=4), fixed="pca"),
    ]
    Study(variants, [0, 1], tmp_path / "records").run(limit=2, runs_dir=tmp_path / "runs")
    files = sorted((tmp_path / "records").glob("*.json"))
    assert [path.name.rsplit("-", 1)[0] for path in files] == ["k-8-seed0", "pca-4-seed0"]
    trained, fixed = map(read_json, files)
    assert trained["step"] == 3 and fixed["step"] == 0 and fixed["fixed_head"] == "pca"
    assert set(fixed["scores"]) == {"cluster", "linear"} <= set(trained["scores"])
    assert np.array(fixed["confusion"]).sum() == 6 * 64 * 64
    again = Study(variants, [0], tmp_path / "records")
    assert again.missing() == []
    monkeypatch.setattr(study, "run_variant", lambda *_: pytest.fail("it was on record"))
    again.run(runs_dir=tmp_path / "runs")
    assert again.table("again").loc["the same", "cluster mIoU"] == again.table("K").loc["8", "cluster mIoU"]
    assert again.table("pca").loc["4", "linear mIoU"] == f"{fixed['scores']['linear']['miou']:.1f}"
    json.dumps(trained), json.dumps(fixed)


def test_the_ladder_adds_one_ingredient_at_a_time():
    rungs = ladder(BASE.but(crop="five", centering=True, zero_clamp=False))
    keys = ("zero_clamp", "crop", "centering")
    assert [tuple(getattr(rung.experiment, key) for key in keys) for rung in rungs] == [
        (False, "none", False), (True, "none", False), (True, "five", False), (True, "five", True), (True, "five", True),
    ]  # fmt: skip
    assert [rung.crf for rung in rungs] == [False] * 4 + [True]
    assert rungs[3].experiment == rungs[4].experiment and rungs[4].experiment.crf


def test_a_sweep_changes_one_value_and_passes_through_the_base():
    base = BASE.but(crf=False)
    groups: dict[str, list] = {}
    for variant in sweeps(BASE):
        groups.setdefault(variant.group, []).append(variant)
    assert set(groups) == {"head", "code_dim", "neighbors", "negatives", "b_self", "b_knn", "b_rand", "l_knn", "l_rand"}
    for group, variants in groups.items():
        assert base in [variant.experiment for variant in variants], group
        assert len({repr(variant.experiment) for variant in variants}) == len(variants) > 1
        for variant in variants:
            changed = [k for k, v in variant.experiment.to_dict().items() if v != base.to_dict()[k]]
            assert len(changed) <= 1, (group, changed)


def test_shifts_move_as_percentiles_or_as_numbers():
    named = {
        kind: [v.experiment.shifts for v in sweeps(BASE.but(shifts=("p10", 0.3, "p90"))) if v.group == kind]
        for kind in ("b_self", "b_knn", "b_rand")
    }
    assert [s[0] for s in named["b_self"]] == ["p0", "p10", "p30"]
    assert [s[1] for s in named["b_knn"]] == [0.2, 0.3, 0.4]
    assert [s[2] for s in named["b_rand"]] == ["p70", "p90", "p100"]


def test_the_default_grid_is_an_hour_at_a_minute_a_run(tmp_path):
    """Runs that the chapter asks for with three seeds, equal ones counted once."""
    runs = {repr(v.experiment) for v in ablations(BASE)}
    assert 20 <= len(runs) <= 24
    assert len(Study(ablations(BASE), [0, 1, 2], tmp_path).missing()) == 3 * len(runs)


def test_dimensions_share_the_trained_runs_with_the_sweep_of_k():
    swept = {repr(v.experiment) for v in sweeps(BASE) if v.group == "code_dim"}
    found = dimensions(BASE, [2, 8])
    assert {repr(v.experiment) for v in found if v.fixed is None} == swept
    assert [v.name for v in found if v.fixed == "pca"] == ["2", "8"] and [
        v.name for v in found if v.fixed == "features"
    ] == ["all"]


def test_the_papers_layout_ticks_what_is_on(tmp_path, weights):
    table = paper_layout(Study(ladder(BASE), [0], tmp_path))
    assert (table[["0-clamp", "5-crop", "centering", "CRF"]] == "✓").sum(axis=1).tolist() == [0, 1, 2, 3, 4]
    assert table.index.name == "" and list(table.index) == [v.name for v in ladder(BASE)]
    assert isinstance(table, pd.DataFrame) and LADDER not in table.columns


def test_auto_and_its_percentiles_are_one_experiment(tmp_path, weights):
    """A record made before shifts had the word, or by the percentiles themselves, is that of "auto"."""
    spelled, auto = (Variant("b", "auto", BASE.but(shifts=shifts)) for shifts in (AUTO, "auto"))
    other = Variant("b", "other", BASE.but(shifts=("p75", "p75", "p96")))
    write_json(tmp_path / "a.json", study_record(spelled, 0, 40.0, weights))
    found = Study([auto, other], [0], tmp_path)
    assert found.record(auto, 0) is not None and found.record(other, 0) is None
