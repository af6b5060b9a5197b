"""What determines a run: checked, frozen, and the same after a trip through JSON."""

import dataclasses
import json
import math
import re

import pytest

from stego_lib import PRESETS, Experiment, StegoError
from stego_lib.experiment import Official

# One row a rule: key, a value that breaks it.
WRONG = [
    ("steps", 0), ("steps", 2.5), ("steps", "many"), ("batch_size", 1), ("code_dim", 0), ("code_dim", 5000),
    ("dropout", 1.0), ("lr_head", 0), ("lr_head", math.nan), ("lr_probes", "fast"), ("points", 0), ("neighbors", 0),
    ("negatives", 0), ("seed", -1), ("seed", 2**31), ("head", "cubic"), ("crop", "six"), ("precision", "float64"),
    ("weights", (1, 2)), ("weights", (1, -1, 1)), ("weights", "1 2 x"), ("weights", "1 nan 1"), ("weights", 3),
    ("shifts", (0.1, 0.2)), ("shifts", (0.1, math.inf, 0.1)), ("shifts", "0.1 p101 0.1"), ("shifts", "p70 p80"),
    ("shifts", "0.1 px 0.1"), ("shifts", ("auto", 0.1, 0.1)), ("train_size", 4), ("train_size", (240, 4)),
    ("train_size", 10_000), ("train_size", "big"), ("eval_size", (1, 2, 3)), ("eval_size", 240.5),
    ("eval_size", "64 x 64"), ("eval_size", True), ("n_classes", 0), ("n_classes", 256), ("dataset", None),
    ("data_root", 3), ("official", 3),
]  # fmt: skip


@pytest.mark.parametrize("key, value", WRONG, ids=str)
def test_a_wrong_value_is_an_error_that_names_its_key(key, value):
    with pytest.raises(StegoError) as caught:
        Experiment.preset("scenes", **{key: value})
    message = str(caught.value)
    assert message.startswith(f"{key}={value!r}") and not re.search("Input|Value error|typing|function", message)
    with pytest.raises(StegoError, match=key):
        Experiment.from_dict({key: value})


def test_unknown_keys_are_errors_with_a_suggestion_and_all_mistakes_are_reported_at_once():
    with pytest.raises(StegoError, match="scenes"):
        Experiment.preset("scene")
    with pytest.raises(StegoError, match="official"):
        Experiment(published=True)
    with pytest.raises(StegoError, match="extra_clusters=-1"):
        Experiment(official={"extra_clusters": -1})
    with pytest.raises(StegoError) as caught:
        Experiment.from_dict({"stepz": 5, "dropout": 2, "lr_head": -1, "official": {"blocks": 3}})
    assert all(word in str(caught.value) for word in ("'steps'", "dropout", "lr_head", "'block'"))
    for make in (Experiment, Experiment().but, lambda **changes: Experiment.preset("scenes", **changes)):
        with pytest.raises(StegoError, match="steps"):
            make(steps=-1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Experiment().steps = 3


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("shifts", "0.1 p80, -0.3", (0.1, "p80", -0.3)), ("shifts", "[0.1, 0.2, 0.3]", (0.1, 0.2, 0.3)),
        ("shifts", "p70 p70.5 p80.0", ("p70", "p70.5", "p80")),
        ("weights", "1 0.5,2", (1.0, 0.5, 2.0)), ("weights", "(1, 0.5, 2)", (1.0, 0.5, 2.0)),
        ("train_size", "240 320", (240, 320)),
        ("eval_size", "240, 320", (240, 320)), ("eval_size", "320", 320), ("train_size", [224], 224),
        ("train_size", [240, 320], (240, 320)),
        ("steps", "12", 12), ("lr_head", "1e-3", 1e-3), ("centering", "false", False), ("crf", "True", True),
    ],
    ids=str,
)  # fmt: skip
def test_text_from_papermill_is_read(key, text, value):
    """papermill's -p passes numbers, booleans and text, but no lists."""
    found = getattr(Experiment.preset("scenes", **{key: text}), key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_survives_json(name):
    experiment = Experiment.preset(name, seed=3)
    for key, value in PRESETS[name].items():
        assert getattr(experiment, key) == value
    again = Experiment.from_dict(json.loads(json.dumps(experiment.to_dict())))
    assert again == experiment and again.to_dict() == experiment.to_dict()
    assert set(experiment.to_dict()) == {field.name for field in dataclasses.fields(Experiment)}


def test_the_cityscapes_preset_is_the_papers_recipe():
    """The row cityscapes-vitb8 of the paper's recipes, and what all recipes share."""
    expected = dict(
        dataset="cityscapes", backbone="dino_vitb8", code_dim=100, batch_size=32, steps=7000, crop="five",
        centering=False,
        weights=(1.0, 0.577453483136995, 0.9058762625226623),
        shifts=(0.45828472207, 0.1754346515479633, 0.31361241889448443),
        train_size=224, eval_size=320, lr_head=5e-4, lr_probes=5e-3, dropout=0.1, neighbors=7, negatives=5, points=11,
        head="nonlinear", mirror=True, crf=True, probes="joint", precision="float32", feature_store="full",
        official=Official(),
    )  # fmt: skip
    experiment = Experiment.preset("cityscapes-vitb8")
    assert {key: getattr(experiment, key) for key in expected} == expected
    assert Experiment.preset("cityscapes") == experiment, "the dataset's name stands for its usual recipe"
    assert Official().zero_clamp and not Official().stabilize


@pytest.mark.parametrize("row, expected", [
    ("cocostuff27-vits8", ("dino_vits8", 70, 16, 5000, "five", True, (0.67, 0.25, 0.63), (0.08, 0.02, 0.66))),
    ("cocostuff27-vitb8", ("dino_vitb8", 90, 32, 7000, "five", True, (0.1, 1, 0.1538476246415498), (0.12, 0.2, 1))),
    ("potsdam3-vits8", ("dino_vits8", 70, 16, 5000, "none", True, (0.67, 0.25, 0.63), (0.08, 0.02, 0.46))),
])  # fmt: skip
def test_the_other_rows_are_the_papers_recipes(row, expected):
    keys = ("backbone", "code_dim", "batch_size", "steps", "crop", "centering", "weights", "shifts")
    assert tuple(getattr(Experiment.preset(row), key) for key in keys) == expected


def test_names_tell_experiments_apart_and_stay_short():
    recipe = Experiment.preset("scenes")
    changes = [
        {}, {"seed": 1}, {"steps": 12}, {"crf": False}, {"official": {"published": True}}, {"weights": (1, 0.5, 0.25)},
        {"weights": (1, 0.5, 0.2500000001)}, {"shifts": "p70 p70 p90"}, {"start_from": "a/run"},
        {"start_from": "a/other"},
        {"train_size": (64, 128), "eval_size": 64, "code_dim": 8, "batch_size": 4, "points": 3, "neighbors": 2},
        {"train_size": (64, 128), "eval_size": 64, "code_dim": 8, "batch_size": 4, "points": 3, "neighbors": 3},
    ]  # fmt: skip
    names = [recipe.but(**change).name for change in changes]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w.+-]{1,120}", name) for name in names)
    assert names[0] == "scenes-scenes_vit_tiny8-seed0" and names[2] == "scenes-scenes_vit_tiny8-steps_12-seed0"
    assert recipe.but(device="cpu", data_root="elsewhere", feature_store="online").name == recipe.name


def test_records_hold_no_folders_of_windows_or_of_this_machine():
    for folder in ("C:\\Users\\me\\", "/home/me/"):
        experiment = Experiment(backbone=f"{folder}dino.pth", start_from=f"{folder}first")
        record = experiment.to_record()
        assert (record["backbone"], record["start_from"]) == ("dino.pth", "first") and "me" not in experiment.name
