"""Learning curves on disk, and objectives at equal time."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from common import ROOT
from recipes import DISTILLED

from stego_book import pretraining
from stego_book.pretraining import comparison


def test_a_curve_keeps_means_of_the_loss_and_every_look(tmp_path):
    log = [{"step": i, "loss": float(i), "seconds": 6.0 * (i + 1)} for i in range(200)]
    for i in (99, 199):
        log[i] |= {"kmeans_miou": i / 10, "linear_miou": i / 5}
    untrained = {"kmeans_miou": 1.0, "linear_miou": 2.0}
    pretraining.write_curve(tmp_path / "a.json", log, DISTILLED, "some words", untrained)
    losses, measured, rest = pretraining.read_curve(tmp_path / "a.json")
    assert len(losses) == 80 and losses.index[-1] == pytest.approx(20)  # minutes
    assert losses["loss"].iloc[0] == 1.0 and losses["loss"].iloc[-1] == 198.5, "of three steps, and of two"
    assert measured["step"].tolist() == [0, 100, 200]
    assert measured.index.tolist() == pytest.approx([0, 10, 20])
    assert measured["kmeans_miou"].tolist() == [1.0, 9.9, 19.9]
    assert rest["about"] == "some words" and rest["recipe"]["distillation"]["prototypes"] == 7


def test_equal_time_gives_each_stage_the_steps_that_fit(tmp_path, monkeypatch):
    """A clock by which a step of DINO takes twice as long as one of the others. A stage begins with the weights of the one before."""
    costs, asked = {"dense": 2.0, "dino": 4.0, "ibot": 2.0}, []

    def timed(images, recipe, folder, **options):
        asked.append((recipe.objective, recipe.steps, options["watch"], options.get("start")))
        return SimpleNamespace(state_dict=lambda: f"{recipe.objective}'s"), [
            {"step": i, "seconds": 9 + costs[recipe.objective] * i} for i in range(recipe.steps)
        ]

    monkeypatch.setattr(comparison, "pretrain", timed)
    dense, dino, ibot = (replace(DISTILLED, objective=name) for name in costs)
    ways = {"one": [(dense, 1.0)], "two": [(dino, 0.7), (ibot, 0.3)]}
    logs = pretraining.equal_time(torch.empty(0), ways, 40, tmp_path, watch=len)
    assert {name: [len(log) for log in stages] for name, stages in logs.items()} == {"one": [20], "two": [7, 6]}
    assert asked == [
        ("dense", 6, None, None), ("dense", 20, len, None), ("dino", 6, None, None), ("dino", 7, len, None),
        ("ibot", 6, None, None), ("ibot", 6, len, "dino's"),
    ]  # fmt: skip


def test_a_comparison_goes_on_where_it_was_broken_off(tmp_path):
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ways = {"both": [(DISTILLED, 0.5), (replace(DISTILLED, objective="mae"), 0.5)]}
    first = pretraining.equal_time(images, ways, 0.6, tmp_path, watch=lambda vit, step: {"at": step})
    again = pretraining.equal_time(images, ways, 0.6, tmp_path, watch=lambda vit, step: {"at": step})
    assert again == first, "as many steps as were found at first, none of them done again"
    for log in first["both"]:
        assert all(math.isfinite(line["loss"]) for line in log) and sum("at" in line for line in log) >= 1


def test_the_table_of_pilots_has_the_first_look_and_the_last(tmp_path):
    def write(name: str, before: float, after: float, steps: int) -> None:
        log = [{"step": i, "seconds": 1.0 + i, "loss": 1.0} for i in range(steps)]
        log[-1] |= {"kmeans_miou": after, "linear_miou": 2 * after}
        pretraining.write_curve(
            tmp_path / f"{name}.json", log, DISTILLED, "", {"kmeans_miou": before, "linear_miou": 2 * before}
        )

    write("half first-seed0-stage0", 10, 15, 40)
    write("half first-seed0-stage1", 15, 18, 7)
    write("half first-seed1-stage0", 12, 99, 41)
    write("half first-seed1-stage1", 99, 20, 8)
    write("whole-seed0-stage0", 10, 11, 30)
    table = pretraining.pilot_table(tmp_path)
    assert table.loc["half first"].tolist() == [
        2,
        "40 + 7",
        "11.0",
        "19.0 (18.0 to 20.0)",
        "22.0",
        "38.0 (36.0 to 40.0)",
    ]
    assert table.loc["whole", "seeds"] == 1 and table.loc["whole", "k-means, end"] == "11.0 (11.0 to 11.0)"


def test_every_pilot_is_on_record_with_two_seeds():
    table = pretraining.pilot_table(ROOT / "book" / "records" / "pretraining" / "pilots")
    assert set(table.index) == set(pretraining.pilot_ways(0)) and (table["seeds"] >= 2).all()
