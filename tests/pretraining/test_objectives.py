"""DINO and iBOT: losses against naive loops, the teacher, what is hidden, and going on after a break."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from recipes import DISTILLED, SMALL
from torch.testing import assert_close

from stego_book.pretraining import OBJECTIVES, Distillation, crops, large_and_small_views, pretrain
from stego_book.pretraining.dino import across_views
from stego_book.pretraining.distillation import Centered, disagreement
from stego_book.pretraining.ibot import draw_mask, hidden_disagreement
from stego_book.pretraining.network import all_tokens, build_network, hidden_patches


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (8, 3, 40, 48), dtype=torch.uint8, generator=generator())


def objective(name: str, seed: int = 0):
    torch.manual_seed(seed)
    recipe = replace(DISTILLED, objective=name)
    return OBJECTIVES[name](build_network(recipe), recipe)


def naive(targets, scores, temperature: float) -> float:
    """Cross-entropy of one distribution against one row of scores, in plain numbers."""
    total = sum(math.exp(score / temperature) for score in scores.tolist())
    pairs = zip(targets.tolist(), scores.tolist(), strict=True)
    return -sum(target * math.log(math.exp(score / temperature) / total) for target, score in pairs)


def test_views_across_equal_a_naive_loop():
    targets = torch.rand(2, 3, 5, generator=generator()).softmax(-1)
    scores = list(torch.randn(4, 3, 5, generator=generator(1)))
    pairs = [(0, 1), (0, 2), (0, 3), (1, 0), (1, 2), (1, 3)]  # never a view with itself
    expected = [naive(targets[i, b], scores[j][b], 0.3) for i, j in pairs for b in range(3)]
    assert across_views(targets, scores, 0.3).item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_only_hidden_patches_count_each_crop_alike():
    targets = torch.rand(2, 4, 5, generator=generator()).softmax(-1)
    scores = torch.randn(2, 4, 5, generator=generator(1))
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 1]], dtype=torch.bool)
    rows = [[naive(targets[b, n], scores[b, n], 0.2) for n in range(4) if mask[b, n]] for b in range(2)]
    expected = sum(sum(row) / len(row) for row in rows) / 2
    assert hidden_disagreement(targets, scores, mask, 0.2).item() == pytest.approx(expected, rel=1e-5)


def test_an_answer_that_agrees_costs_its_entropy_and_any_other_costs_more():
    scores = torch.randn(6, 5, generator=generator())
    right = F.softmax(scores / 0.5, -1)
    entropy = -(right * right.log()).sum(-1)
    assert_close(disagreement(right, scores, 0.5), entropy)
    assert (disagreement(right, scores.roll(1, 0), 0.5) > entropy).all()


def test_centering_takes_off_what_is_always_said():
    """Scores with one prototype far ahead everywhere: at first it gets everything, after a while the others get a say."""
    centered = Centered(Distillation(prototypes=4, teacher_temperature=0.05, center_momentum=0.5))
    scores = 0.1 * torch.randn(64, 4, generator=generator()) + torch.tensor([3.0, 0, 0, 0])
    first = centered(scores)
    assert first[:, 0].min() > 0.99
    assert_close(centered.center, 0.5 * scores.mean(0))
    for _ in range(20):
        last = centered(scores)
    assert_close(centered.center, scores.mean(0), atol=1e-4, rtol=0)
    assert 0.1 < last[:, 0].mean() < 0.5 and last.max(1).values.mean() > 0.6, "spread over all, sharp for each"


@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_the_teacher_learns_by_following_alone(name, images):
    module = objective(name)
    before = copy.deepcopy(module.teacher.state_dict())
    module(images[:2].float() / 255, 16, generator()).backward()
    assert all(parameter.grad is None for parameter in module.teacher.parameters())
    assert sum(parameter.grad is not None for parameter in module.student.parameters()) > 10
    with torch.no_grad():
        for parameter in module.student.parameters():
            parameter.add_(1)
    module.after_step(0.5)
    towards = (1 - SMALL.momentum) * 0.5  # half of a cosine from 1 to 0 is 0.5
    for key, value in module.teacher.state_dict().items():
        assert_close(value, before[key] + towards * (module.student.state_dict()[key] - before[key]), msg=key)
    at_last = copy.deepcopy(module.teacher.state_dict())
    module.after_step(1.0)
    assert all(torch.equal(value, at_last[key]) for key, value in module.teacher.state_dict().items())
    assert module.network is module.teacher["vit"]


def test_what_a_hidden_patch_shows_reaches_no_token():
    vit = build_network(DISTILLED).eval()
    mask = torch.zeros(1, 2, 2, dtype=torch.bool)
    mask[0, 0, 1] = True
    one = torch.rand(1, 3, 16, 16, generator=generator())
    other = one.clone()
    other[:, :, :8, 8:] = 0.5  # what the hidden patch shows
    instead = torch.zeros(vit.embed_dim)
    with torch.inference_mode():
        with hidden_patches(vit, mask, instead):
            assert torch.equal(all_tokens(vit, one), all_tokens(vit, other))
            hidden = all_tokens(vit, one)
        with hidden_patches(vit, mask, instead + 1):
            assert not torch.allclose(all_tokens(vit, one), hidden), "something else in its place is seen"
        assert not torch.allclose(all_tokens(vit, one), all_tokens(vit, other)), "afterwards nothing is hidden"


def test_the_mask_hides_shares_in_its_range():
    mask = draw_mask(400, 10, (0.2, 0.4), generator())
    shares = mask.flatten(1).float().mean(1)
    assert mask.shape == (400, 10, 10) and shares.min() >= 0.2 and shares.max() <= 0.4
    assert shares.mean() == pytest.approx(0.3, abs=0.02)
    assert mask.float().mean(0).min() > 0.2, "every place is hidden now and then"
    assert draw_mask(9, 2, (0.0, 0.0), generator()).flatten(1).sum(1).eq(1).all(), "one at least"


def test_ibot_asks_the_student_about_views_it_does_not_see_whole(images, monkeypatch):
    """With nothing to tell apart in teacher and student but the mask, the student's tokens differ from the teacher's."""
    from stego_book.pretraining import ibot

    module, seen = objective("ibot"), []
    monkeypatch.setattr(ibot, "hidden_disagreement", lambda *given: seen.append(given) or hidden_disagreement(*given))
    module(images[:3].float() / 255, 16, generator())
    (targets, scores, mask, _), cells = seen[0], 4
    assert targets.shape == scores.shape == (6, cells, SMALL.prototypes) and mask.shape == (6, cells)
    assert mask.any(1).all() and not targets.requires_grad and scores.requires_grad


def test_dino_without_small_views_compares_the_large_ones(images):
    recipe = replace(DISTILLED, objective="dino", distillation=replace(SMALL, small_crops=0))
    torch.manual_seed(0)
    module = OBJECTIVES["dino"](build_network(recipe), recipe)
    batch = images[:3].float() / 255
    large, _ = large_and_small_views(batch, 16, 8, 0, recipe, generator())
    tokens = [all_tokens(module.student["vit"], view)[:, 0] for view in large]
    said = [module.student["head"](token).detach() for token in tokens]
    told = [F.softmax(score / SMALL.teacher_temperature, dim=-1) for score in said]  # student and teacher begin alike
    want = [naive(told[i][row], said[1 - i][row], SMALL.student_temperature) for i in range(2) for row in range(3)]
    assert module(batch, 16, generator()).item() == pytest.approx(sum(want) / 6, rel=1e-4)


def test_small_views_show_what_the_large_ones_show(monkeypatch):
    monkeypatch.setattr(crops, "mix_colors", lambda view, *_: view)
    ramp = torch.linspace(0, 1, 80)
    image = torch.stack([ramp.expand(80, 80), ramp[:, None].expand(80, 80), torch.zeros(80, 80)])  # red x, green y
    recipe = replace(DISTILLED, zoom=(0.75, 1.4))
    large, small = large_and_small_views(image.expand(5, -1, -1, -1), 24, 12, 3, recipe, generator())
    assert large.shape == (2, 5, 3, 24, 24) and small.shape == (3, 5, 3, 12, 12)
    for b in range(5):
        shown = large[:, b, :2].movedim(1, 0).flatten(1)
        low, high = shown.min(1).values, shown.max(1).values
        inside = small[:, b, :2].movedim(1, 0).flatten(1)
        assert (inside.min(1).values >= low - 0.02).all() and (inside.max(1).values <= high + 0.02).all()
    assert not torch.equal(small[0], small[1])


@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_distillation_goes_on_after_a_break_with_the_same_result(name, images, tmp_path, monkeypatch):
    recipe = replace(DISTILLED, objective=name)
    whole, log = pretrain(images, recipe, tmp_path / "whole", save_every=2)
    assert [line["step"] for line in log] == [0, 1, 2, 3] and all(math.isfinite(line["loss"]) for line in log)
    forward, calls = OBJECTIVES[name].forward, []

    def breaks(*given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(*given)

    monkeypatch.setattr(OBJECTIVES[name], "forward", breaks)
    with pytest.raises(KeyboardInterrupt):
        pretrain(images, recipe, tmp_path / "broken", save_every=2)
    vit, again = pretrain(images, recipe, tmp_path / "broken", save_every=2)
    assert [line["loss"] for line in again] == [line["loss"] for line in log]
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in vit.state_dict().items())


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_bfloat16_gives_nearly_the_same_loss(name, images, tmp_path):
    recipe = replace(DISTILLED, objective=name, steps=1, full_size_steps=0)
    exact, half = (
        pretrain(images, recipe, tmp_path / str(precision), precision=precision)[1][0]["loss"]
        for precision in (torch.float32, torch.bfloat16)
    )
    assert half != exact and half == pytest.approx(exact, rel=0.06)
