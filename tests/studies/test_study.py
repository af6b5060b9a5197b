"""Studies and seeds: which records are those of a variant, which runs are made, tables from records."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from common import tiny_experiment, write_backbone
from records import study_record

from stego_book.studies import successors as of_successors
from stego_book.studies.ablations import ablations, dimensions, ladder, paper_layout, sweeps
from stego_book.studies.results import NAMES, read_records
from stego_book.studies.seeds import run_seeds, whole_numbers
from stego_book.studies.study import Study, Variant
from stego_book.studies.successors import KMEANS, SETS, base_of, curve, successors
from stego_lib import Backbone, Experiment, StegoError, evaluate, train
from stego_lib.experiment import SUCCESSORS
from stego_lib.utils.files import read_json, write_json

pytestmark = pytest.mark.usefixtures("few_samples")

BASE = Experiment.preset("scenes", data_root="nowhere")
TWO = [Variant("K", "8", BASE.but(code_dim=8)), Variant("K", "16", BASE.but(code_dim=16))]


def stored(folder, variant, seed=0, miou=40.0, name="a", **provenance):
    """A study of two seeds whose folder holds this record."""
    write_json(folder / f"{name}.json", study_record(variant, seed, miou, **provenance))
    return Study([variant], [0, 1], folder)


def test_a_record_is_found_by_its_experiment_whatever_its_file_is_called(tmp_path):
    write_json(tmp_path / "anything.json", study_record(TWO[0], 1, 40.0))
    study = Study(TWO, [0, 1], tmp_path)
    assert study.record(TWO[0], 1)["scores"]["cluster"]["miou"] == 40.0
    assert study.record(TWO[0], 0) is None and study.record(TWO[1], 1) is None
    assert [(v.name, seed) for v, seed in study.missing()] == [("8", 0), ("16", 0), ("16", 1)], "first seeds first"
    elsewhere = replace(TWO[0], experiment=TWO[0].experiment.but(data_root="/other", device="cpu"))
    assert study.record(elsewhere, 1) is not None, "where a run was made does not tell it apart"


def test_embedded_weights_that_were_replaced_do_not_count(tmp_path):
    assert stored(tmp_path, TWO[0], weights="of last year").record(TWO[0], 0) is None
    assert stored(tmp_path, TWO[0], weights=Backbone(BASE.backbone).weights_id).record(TWO[0], 0) is not None


def test_two_weights_files_of_one_name_are_two_backbones(tmp_path):
    """Every file of a hub is called model.safetensors."""
    variants = []
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        file = write_backbone(tmp_path / name / "model.safetensors", seed)
        variants.append(Variant("K", "8", BASE.but(backbone=str(file))))
    study = stored(tmp_path / "records", variants[0], weights=Backbone(variants[0].experiment.backbone).weights_id)
    assert study.record(variants[0], 0) is not None and study.record(variants[1], 0) is None


@pytest.mark.parametrize("change", [{"precision": "bfloat16"}, {"feature_store": "compact"}], ids=str)
def test_another_precision_or_store_does_not_count(change, tmp_path):
    study = stored(tmp_path, TWO[0])
    other = replace(TWO[0], experiment=TWO[0].experiment.but(**change))
    assert study.record(TWO[0], 0) is not None and study.record(other, 0) is None
    key = {"feature_store": "store"}.get(*change, *change)
    assert stored(tmp_path, TWO[0], **{key: next(iter(change.values()))}).record(other, 0) is not None


def test_records_of_other_images_do_not_count_and_runs_are_not_repeated(scenes_root, backbone_file, tmp_path):
    base = tiny_experiment(scenes_root, backbone_file, steps=3, probes="after")
    pca = Variant("pca", "4", base.but(head="linear", code_dim=4), fixed_head="pca")
    variants = [Variant("K", "8", base), Variant("again", "the same", base), pca]
    Study(variants, [0, 1], tmp_path / "records").run(limit=2, runs_dir=tmp_path / "runs")
    files = sorted((tmp_path / "records").glob("*.json"))
    assert [path.name.rsplit("-", 1)[0] for path in files] == ["k-8-seed0", "pca-4-seed0"]
    trained, fixed = map(read_json, files)
    assert trained["step"] == 3 and fixed["step"] == 0 and fixed["fixed_head"] == "pca"
    assert trained["provenance"]["images"] == fixed["provenance"]["images"] is not None
    assert set(fixed["scores"]) == {"cluster", "linear"} <= set(trained["scores"])
    assert np.array(fixed["confusion"]).sum() == 6 * 64 * 64
    again = Study(variants, [0], tmp_path / "records")
    assert again.missing() == []
    assert again.table("again").loc["the same", "cluster mIoU"] == again.table("K").loc["8", "cluster mIoU"]
    assert again.table("pca").loc["4", "linear mIoU"] == f"{fixed['scores']['linear']['miou']:.1f}"

    root = shutil.copytree(scenes_root, tmp_path / "data")
    first, second, *_ = sorted((root / "scenes" / "imgs" / "train").iterdir())
    shutil.copy(second, first)
    other = [replace(variant, experiment=variant.experiment.but(data_root=str(root))) for variant in variants]
    assert len(Study(other, [0], tmp_path / "records").missing()) == 2, "one image is another"


def test_records_that_nothing_here_tells_apart_are_an_error(tmp_path):
    variant = Variant("K", "8", BASE.but(backbone="gone.safetensors"))
    stored(tmp_path, variant, 0, weights="a")
    study = stored(tmp_path, variant, 1, name="b", weights="b")
    with pytest.raises(StegoError, match="weights"):
        study.table("K")


def test_the_table_has_mean_and_spread_and_says_what_was_not_run(tmp_path):
    values = {0: 40.0, 1: 44.0, 2: 45.0}
    for seed, miou in values.items():
        write_json(tmp_path / f"{seed}.json", study_record(TWO[0], seed, miou))
    study = Study(TWO, [0, 1, 2], tmp_path)
    table = study.table("K")
    mean, std = np.mean(list(values.values())), np.std(list(values.values()), ddof=1)
    assert table.loc["8", "cluster mIoU"] == f"{mean:.1f} ± {std:.1f}"
    assert table.loc["8", "cluster accuracy"] == f"{mean + 10:.1f} ± {std:.1f}"
    assert list(table["seeds"]) == [3, 0] and set(table.loc["16"].iloc[1:]) == {"not run"}
    assert study.seconds().tolist() == [2.0] * 3
    after = Study([replace(TWO[0], crf=True)], [0, 1, 2], tmp_path)
    assert after.table("K").loc["8", "cluster mIoU"] == f"{mean + 1:.1f} ± {std:.1f}", "read after the CRF"
    assert Study(TWO, [0], tmp_path / "none").table("K")["seeds"].tolist() == [0, 0]


def test_a_variant_may_start_from_a_run_which_its_record_names(scenes_root, backbone_file, tmp_path):
    base = tiny_experiment(scenes_root, backbone_file, steps=3, probes="after")
    longer = base.but(steps=6)
    variants = [Variant("steps", "first", base), Variant("steps", "second", longer, start=base)]
    study = Study(variants, [0, 1], tmp_path / "records")
    study.run(None, tmp_path / "runs")
    assert not study.missing() and not Study(variants, [0, 1], tmp_path / "records").missing()
    runs = [read_json(path)["steps"] for path in (tmp_path / "runs").glob("*/experiment.json")]
    assert sorted(runs) == [3, 3, 6, 6], "the runs of the first variant are those to start from"
    for seed in (0, 1):
        assert study.record(variants[1], seed)["experiment"]["start_from"] == base.but(seed=seed).name
    assert Study([Variant("steps", "second", longer)], [0], tmp_path / "records").missing(), "without a start"


def test_seeds_are_read_as_papermill_gives_them():
    for text, expected in {"0 1 2": [0, 1, 2], "5,3": [5, 3], 4: [4]}.items():
        assert whole_numbers(text) == expected
    for text in ("", "1 01", "a", "-1", "0.5", None):
        with pytest.raises(StegoError, match="seeds"):
            whole_numbers(text)


@pytest.fixture
def experiment(scenes_root, backbone_file):
    return tiny_experiment(scenes_root, backbone_file, steps=2)


def test_seeds_are_trained_scored_and_recorded_and_with_resume_not_repeated(experiment, tmp_path):
    runs, records = tmp_path / "runs", tmp_path / "records"
    first = run_seeds(experiment, [0, 1], records, runs_dir=runs)
    assert [record["experiment"]["seed"] for record in first] == [0, 1] and read_records(records) == first
    for record in first:
        (folder,) = runs.glob(f"*-seed{record['experiment']['seed']}")
        assert record == read_json(folder / "metrics.json") and record["step"] == 2
    assert first[0]["confusion"] != first[1]["confusion"]
    (unscored,) = runs.glob("*-seed1")
    checkpoint = (unscored / "checkpoint.safetensors").read_bytes()
    write_json(unscored / "metrics.json", first[1] | {"scores": {}})
    again = run_seeds(experiment, [1, 0], records, runs_dir=runs, resume=True)
    assert again[1] == first[0] and again[0]["scores"] == first[1]["scores"], "scored again"
    assert (unscored / "checkpoint.safetensors").read_bytes() == checkpoint, "but not trained again"
    assert len(list(runs.glob("*-seed*"))) == len(read_records(records)) == 2
    run_seeds(experiment, [0], records, runs_dir=runs)
    assert len(list(runs.glob("*-seed0*"))) == 2, "trained again without resume"


def test_records_of_other_data_or_weights_never_overwrite_each_other(experiment, tmp_path):
    """Experiments whose names and records agree: the folder of the data and of the weights file are no part of them."""
    root = shutil.copytree(experiment.data_root, tmp_path / "data")
    first, second, *_ = sorted((root / "scenes" / "imgs" / "train").iterdir())
    shutil.copy(second, first)
    (tmp_path / "other").mkdir()
    weights = write_backbone(tmp_path / "other" / str(experiment.backbone).rpartition("/")[2], seed=7)
    changes = [{}, {"data_root": str(root)}, {"backbone": str(weights)}]
    for change in changes:
        run_seeds(experiment.but(**change), [0], tmp_path / "records", runs_dir=tmp_path / "runs")
    records = read_records(tmp_path / "records")
    assert len(records) == 3 and all(record["experiment"] == records[0]["experiment"] for record in records)


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


def test_a_curve_ends_with_the_scores_of_the_run(scenes_root, backbone_file, tmp_path):
    for method in ("smooseg", "hp"):
        changes = SUCCESSORS[method] | dict(method=method, code_dim=8, steps=4, crf=False)
        experiment = tiny_experiment(scenes_root, backbone_file, **changes)
        table = curve("a name", experiment, 2, tmp_path)
        assert table["step"].tolist() == [2, 4] and set(table["method"]) == {"a name"}
        expected = evaluate(train(experiment, runs_dir=tmp_path), baselines=False)["scores"]["cluster"]
        assert table.iloc[-1][["miou", "accuracy"]].tolist() == [
            round(expected[key], 2) for key in ("miou", "accuracy")
        ]
