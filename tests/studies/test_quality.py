"""Whether speed costs quality: what is compared, the reference in float32, and the verdicts from records."""

import pytest
import torch
from common import tiny_experiment
from records import study_record

from benchmarks.quality import Float32Features, unrounded
from stego_book.studies import quality
from stego_lib import Backbone, Experiment, train
from stego_lib.datasets import open_training_set
from stego_lib.experiment import MACHINE
from stego_lib.features import open_features
from stego_lib.features.online import OnlineFeatures
from stego_lib.features.source import Source
from stego_lib.utils.files import write_json

BASE = Experiment.preset("scenes", backbone="a_file.safetensors")


def keep(study, values):
    (variant,) = study.variants
    for seed, miou in enumerate(values):
        write_json(study.folder / f"{variant.name}-{seed}.json", study_record(variant, seed, miou))


def test_ways_differ_in_features_and_probes_alone_and_the_recipe_is_on_record_as_it_stands(tmp_path):
    found = quality.studies(BASE, [0], tmp_path)
    assert len({study.folder for way, study in found.items() if way[1] == "joint"}) == 2, (
        "a record does not tell them apart"
    )
    for (way, probes), study in found.items():
        (variant,) = study.variants
        kind = "store" if way == "bfloat16" else way
        assert (variant.experiment.feature_store, variant.experiment.probes) == (kind, probes)
        plain = variant.experiment.but(feature_store="auto", probes="after", crf=True, precision="auto")
        assert plain == BASE and variant.experiment.precision == {"online": "float32", "bfloat16": "bfloat16"}.get(
            way, "auto"
        )
    recipe = found[quality.FAST]
    assert not recipe.variants[0].experiment.differing(BASE, MACHINE) and recipe.folder == tmp_path / "scenes"


def test_a_mean_is_within_the_spread_unless_it_is_further_below(tmp_path):
    found = quality.studies(BASE, [0, 1], tmp_path)
    assert set(quality.table(found)["cluster mIoU"]) == {"not run"} == set(quality.verdicts(found).stack())
    for way, values in zip(
        quality.WAYS, ([48.0, 49.0], [46.0, 47.0], [70.0], [48.0, 50.0], [47.0, 48.0], [48.5, 49.5]), strict=True
    ):
        keep(found[way], values)
    found = quality.studies(BASE, [0, 1], tmp_path)
    shown = quality.table(found)
    assert shown["seeds"].tolist() == [2, 2, 1, 2, 2, 2] and shown.loc[quality.PLAIN, "linear mIoU"] == "49.0 ± 1.4"
    said = quality.verdicts(found)
    assert said["cluster"].tolist() == said["linear"].tolist() == [
        "not run", "-2.5, spread 1.4: below it", "+2.0, spread 0.7: within", "-0.5, spread 1.4: within", "-1.0, spread 0.7: below it",
        "+0.5, spread 0.7: within",
    ], "one seed has no spread"  # fmt: skip


@pytest.fixture
def source(scenes_root, backbone_file):
    experiment = tiny_experiment(scenes_root, backbone_file, precision="float32")
    return Source(open_training_set(experiment), Backbone.of(experiment), experiment.train_size)


def test_the_reference_is_what_the_backbone_gives_unrounded_and_computed_once(source, tmp_path, monkeypatch):
    monkeypatch.setattr(Float32Features, "kept", {})
    index = torch.tensor([3, 1, 3])
    exact = source.features(torch.stack([source.image(i) for i in index.tolist()]), index.tolist())
    found = Float32Features(source, tmp_path)
    torch.testing.assert_close(found.rows(index), exact, rtol=0, atol=1e-5)
    assert not torch.equal(found.rows(index), found.rows(index).half().float()), "not rounded"
    rounded = OnlineFeatures(source, tmp_path).rows(index)
    assert torch.equal(rounded, rounded.half().float())
    monkeypatch.setattr(Source, "features", lambda *_: pytest.fail("it was kept"))
    again = Float32Features(source, tmp_path)
    assert torch.equal(again.rows(index[:2]), found.rows(index[:2]))


def test_within_it_online_experiments_train_on_the_reference(scenes_root, backbone_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Float32Features, "kept", {})
    experiment = tiny_experiment(scenes_root, backbone_file, steps=2, feature_store="online")
    usual = train(experiment, runs_dir=tmp_path / "usual")
    assert not Float32Features.kept
    with unrounded():
        plain = train(experiment, runs_dir=tmp_path / "plain")
    assert Float32Features.kept and plain.log["loss"].tolist() != usual.log["loss"].tolist()
    torch.testing.assert_close(torch.tensor(plain.log["loss"]), torch.tensor(usual.log["loss"]), rtol=0, atol=1e-2)
    dataset, backbone = open_training_set(experiment), Backbone.of(experiment)
    assert type(open_features(dataset, backbone, experiment.train_size, tmp_path, "online")) is OnlineFeatures
