"""Learning curves on disk, and objectives at equal time."""

import math
from dataclasses import replace

import pytest
import torch
from recipes import DISTILLED

from stego_lib import pretraining
from stego_lib.pretraining import comparison


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


def test_equal_time_gives_each_objective_the_steps_that_fit(tmp_path, monkeypatch):
    """A clock by which a step of DINO takes twice as long as one of the others."""
    costs, asked = {"dense": 2.0, "dino": 4.0, "ibot": 2.0}, []

    def timed(images, recipe, folder, **options):
        asked.append((recipe.objective, recipe.steps, options["watch"]))
        return None, [{"step": i, "seconds": 9 + costs[recipe.objective] * i} for i in range(recipe.steps)]

    monkeypatch.setattr(comparison, "pretrain", timed)
    recipes = {name: replace(DISTILLED, objective=name) for name in costs}
    logs = pretraining.equal_time(torch.empty(0), recipes, 40, tmp_path, watch=len)
    assert {name: len(log) for name, log in logs.items()} == {"dense": 20, "dino": 10, "ibot": 20}
    assert asked == [
        ("dense", 6, None), ("dense", 20, len), ("dino", 6, None), ("dino", 10, len), ("ibot", 6, None), ("ibot", 20, len),
    ]  # fmt: skip


def test_a_comparison_goes_on_where_it_was_broken_off(tmp_path):
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first = pretraining.equal_time(images, {"dense": DISTILLED}, 0.3, tmp_path, watch=lambda vit, step: {"at": step})
    again = pretraining.equal_time(images, {"dense": DISTILLED}, 0.3, tmp_path, watch=lambda vit, step: {"at": step})
    assert again == first, "as many steps as were found at first, none of them done again"
    assert all(math.isfinite(line["loss"]) for line in first["dense"])
    assert sum("at" in line for line in first["dense"]) >= 1
