"""Studies: which records are those of a variant, tables from records, and runs that leave a record."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from common import few_samples, tiny_experiment, write_backbone
from records import study_record

from stego_book.studies.study import Study, Variant
from stego_lib import Backbone, Experiment, StegoError
from stego_lib.utils.files import read_json, write_json

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


def test_records_of_other_images_do_not_count_and_runs_are_not_repeated(
    scenes_root, backbone_file, tmp_path, monkeypatch
):
    few_samples(monkeypatch)
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
    """A weights file that is not at hand has one name and could be either."""
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


def test_a_variant_may_start_from_a_run_which_its_record_names(scenes_root, backbone_file, tmp_path, monkeypatch):
    few_samples(monkeypatch)
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
