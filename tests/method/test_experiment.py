"""What determines a run: checked, frozen, and the same after a trip through JSON."""

import dataclasses
import json
import math
import re

import pytest

from stego_lib import PRESETS, Experiment, StegoError

# One row a rule: key, a value that breaks it.
WRONG = [
    ("steps", 0), ("steps", 2.5), ("steps", "many"), ("batch_size", 1), ("code_dim", 0), ("code_dim", 5000), ("dropout", 1.0), ("dropout", -0.1),
    ("lr_head", 0), ("lr_head", math.nan), ("lr_head", math.inf), ("lr_probes", -1e-3), ("lr_probes", "fast"), ("points", 0), ("neighbors", 0), ("negatives", 0),
    ("extra_clusters", -1), ("seed", -1), ("seed", 2**31), ("head", "cubic"), ("crop", "six"), ("precision", "float64"), ("centering", "perhaps"),
    ("weights", (1, 2)), ("weights", (1, -1, 1)), ("weights", (1, math.nan, 1)), ("weights", "1 2 x"), ("weights", "1 nan 1"), ("weights", 3),
    ("shifts", (0.1, 0.2)), ("shifts", (math.nan, 0.1, 0.1)), ("shifts", (0.1, math.inf, 0.1)), ("shifts", "0.1 p101 0.1"), ("shifts", "0.1 p-1 0.1"),
    ("shifts", "0.1 px 0.1"), ("shifts", "0.1 high 0.1"), ("shifts", "0.1 nan 0.1"), ("shifts", "0.1 inf 0.1"), ("shifts", "0.1 pnan 0.1"),
    ("train_size", 0), ("train_size", 4), ("train_size", (240, 4)), ("train_size", 10_000), ("train_size", "big"), ("eval_size", (1, 2, 3)), ("eval_size", 240.5),
    ("n_classes", 0), ("n_classes", 256), ("n_classes", 2.5), ("validate_every", -1), ("validate_every", None),
    ("dataset", None), ("dataset", 3), ("backbone", ["vit"]), ("device", None),
]  # fmt: skip


@pytest.mark.parametrize("key, value", WRONG, ids=str)
def test_a_wrong_value_is_an_error_that_names_its_key(key, value):
    with pytest.raises(StegoError) as caught:
        Experiment.preset("scenes", **{key: value})
    assert f"{key} = {value!r}" in str(caught.value)
    with pytest.raises(StegoError, match=key):
        Experiment.from_dict({key: value})


@pytest.mark.parametrize("key, value", WRONG, ids=str)
def test_no_other_way_lets_a_wrong_value_in(key, value):
    with pytest.raises(ValueError, match=key):
        Experiment(**{key: value})
    with pytest.raises(ValueError, match=key):
        Experiment().but(**{key: value})


def test_an_unknown_key_is_an_error_that_suggests_the_right_one():
    with pytest.raises(StegoError, match=r"unknown key 'learning_rates'"):
        Experiment.preset("scenes", learning_rates=1)
    with pytest.raises(StegoError, match=r"unknown key 'step' \(did you mean 'steps'\?\)"):
        Experiment.from_dict({"step": 5})
    with pytest.raises(StegoError, match=r"did you mean 'batch_size'"):
        Experiment.preset("scenes", batchsize=4)


def test_several_mistakes_are_told_at_once():
    with pytest.raises(StegoError) as caught:
        Experiment.from_dict({"stepz": 5, "dropout": 2, "lr_head": -1})
    assert all(key in str(caught.value) for key in ("stepz", "dropout", "lr_head"))


def test_an_unknown_preset_is_an_error_that_suggests_one():
    with pytest.raises(StegoError, match=r"unknown preset 'scene' \(did you mean 'scenes'\?\)"):
        Experiment.preset("scene")


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("shifts", "0.1 p80, -0.3", (0.1, "p80", -0.3)), ("shifts", "[0.1, 0.2, 0.3]", (0.1, 0.2, 0.3)), ("shifts", "p70 p70.5 p80.0", ("p70", "p70.5", "p80")),
        ("weights", "1 0.5,2", (1.0, 0.5, 2.0)), ("weights", "(1, 0.5, 2)", (1.0, 0.5, 2.0)), ("train_size", "240 320", (240, 320)),
        ("eval_size", "240, 320", (240, 320)), ("eval_size", "320", 320), ("train_size", [224], 224), ("train_size", [240, 320], (240, 320)),
        ("steps", "12", 12), ("lr_head", "1e-3", 1e-3), ("centering", "false", False), ("crf", "True", True),
    ],
    ids=str,
)  # fmt: skip
def test_text_from_papermill_is_read(key, text, value):
    """papermill's -p passes numbers, booleans and text, but no lists."""
    found = getattr(Experiment.preset("scenes", **{key: text}), key)
    assert found == value and type(found) is type(value)


def test_whole_numbers_are_good_shifts():
    assert Experiment(shifts=(0, 1, "p5")).shifts == (0.0, 1.0, "p5")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_survives_json(name):
    experiment = Experiment.preset(name, seed=3)
    for key, value in PRESETS[name].items():
        assert getattr(experiment, key) == value
    again = Experiment.from_dict(json.loads(json.dumps(experiment.to_dict())))
    assert again == experiment and again.to_dict() == experiment.to_dict()
    assert set(experiment.to_dict()) == {field.name for field in dataclasses.fields(Experiment)}


def test_sizes_and_shifts_survive_json():
    experiment = Experiment(train_size=(240, 320), eval_size=320, shifts=("p70", 0.1, "p80"), weights=(1, 2, 3))
    again = Experiment.from_dict(json.loads(json.dumps(experiment.to_dict())))
    assert again == experiment and again.train_size == (240, 320) and again.shifts == ("p70", 0.1, "p80")


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Experiment().steps = 3


def test_but_changes_a_copy():
    experiment = Experiment()
    changed = experiment.but(steps=3, shifts=(1, 2, 3))
    assert (changed.steps, changed.shifts) == (3, (1.0, 2.0, 3.0)) and experiment.steps != 3
    assert changed.but(steps=experiment.steps, shifts=experiment.shifts) == experiment


def test_changes_win_over_the_preset():
    assert Experiment.preset("scenes", steps=3).steps == 3


def test_the_cityscapes_preset_is_the_papers_recipe():
    """The row cityscapes-vitb8 of the paper's recipes, and what all recipes share."""
    expected = dict(
        dataset="cityscapes", backbone="dino_vitb8", code_dim=100, batch_size=32, steps=7000, crop="five", centering=False,
        weights=(1.0, 0.577453483136995, 0.9058762625226623), shifts=(0.45828472207, 0.1754346515479633, 0.31361241889448443),
        train_size=224, eval_size=320, lr_head=5e-4, lr_probes=5e-3, dropout=0.1, neighbors=7, negatives=5, points=11,
        zero_clamp=True, stabilize=False, head="nonlinear", subtract_mean=False, extra_clusters=0, mirror=True, crf=True,
    )  # fmt: skip
    experiment = Experiment.preset("cityscapes-vitb8")
    assert {key: getattr(experiment, key) for key in expected} == expected
    assert Experiment.preset("cityscapes") == experiment, "the dataset's name stands for its usual recipe"


@pytest.mark.parametrize(
    "row, expected",
    {
        "cocostuff27-vits8": (
            "cocostuff27",
            "dino_vits8",
            70,
            16,
            5000,
            "five",
            True,
            (0.67, 0.25, 0.63),
            (0.08, 0.02, 0.66),
        ),
        "cocostuff27-vitb8": (
            "cocostuff27",
            "dino_vitb8",
            90,
            32,
            7000,
            "five",
            True,
            (0.1, 1, 0.1538476246415498),
            (0.12, 0.2, 1),
        ),
        "potsdam3-vits8": (
            "potsdam3",
            "dino_vits8",
            70,
            16,
            5000,
            "none",
            True,
            (0.67, 0.25, 0.63),
            (0.08, 0.02, 0.46),
        ),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_other_rows_are_the_papers_recipes(row, expected):
    keys = ("dataset", "backbone", "code_dim", "batch_size", "steps", "crop", "centering", "weights", "shifts")
    experiment = Experiment.preset(row)
    assert tuple(getattr(experiment, key) for key in keys) == expected
    assert (experiment.official.subtract_mean, experiment.probes, experiment.official.published) == (
        False,
        "joint",
        False,
    )


def test_the_name_says_what_it_is():
    assert Experiment.preset("folder", backbone="/some/where/tiny.safetensors", seed=4).name == "folder-tiny-seed4"


def test_names_tell_experiments_apart_and_stay_short():
    recipe = Experiment.preset("scenes")
    changes = [
        {}, {"seed": 1}, {"steps": 12}, {"crf": False}, {"steps": 12, "crf": False}, {"published": True}, {"weights": (1, 0.5, 0.25)},
        {"weights": (1, 0.5, 0.2500000001)}, {"shifts": "p70 p70 p90"}, {"shifts": (0.1, 0.2, 0.3)}, {"start_from": "a/run"},
        {"start_from": "b/run"}, {"backbone": "vit_base_patch16_224.augreg_in21k"}, {"backbone": "vit_base_patch16_224.dino"},
        {"train_size": (64, 128), "eval_size": 64, "code_dim": 8, "batch_size": 4, "points": 3, "neighbors": 2},
        {"train_size": (64, 128), "eval_size": 64, "code_dim": 8, "batch_size": 4, "points": 3, "neighbors": 3},
    ]  # fmt: skip
    names = [recipe.but(**one).name for one in changes]
    assert len(set(names)) == len(names)
    assert names[0] == "scenes-scenes_vit_tiny8-seed0" and names[4] == "scenes-scenes_vit_tiny8-steps_12-no_crf-seed0"
    assert all(re.fullmatch(r"[\w.+-]{1,120}", name) for name in names)
    assert "train_size_64_128" in names[-1]


def test_where_and_how_a_run_computes_is_not_in_its_name():
    recipe = Experiment.preset("scenes")
    assert recipe.but(device="cpu", data_root="elsewhere", feature_store="online").name == recipe.name


@pytest.mark.parametrize("preset", PRESETS)
def test_a_recipe_is_named_by_dataset_backbone_and_seed_alone(preset):
    recipe = Experiment.preset(preset, seed=3)
    assert recipe.name == f"{recipe.dataset}-{recipe.backbone}-seed3"


def test_paths_may_be_path_objects(tmp_path):
    experiment = Experiment(data_root=tmp_path, backbone=tmp_path / "a.safetensors", start_from=tmp_path / "run")
    assert experiment == Experiment(
        data_root=str(tmp_path), backbone=f"{tmp_path}/a.safetensors", start_from=f"{tmp_path}/run"
    )
    assert json.loads(json.dumps(experiment.to_dict()))["data_root"] == str(tmp_path)


@pytest.mark.parametrize("value", ["64 x 64", "64x64", "big", "", 240.5, True])
def test_a_size_that_is_none_is_told_how_to_write_one(value):
    with pytest.raises(StegoError, match="a size is one whole number, or height and width, such as 224 or 320 480"):
        Experiment(eval_size=value)
