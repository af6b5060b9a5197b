"""Pre-training: the same points in both views, the contrast, the initialization, resuming, the probes that watch."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.testing import assert_close

from stego_book import pretraining
from stego_book.pretraining import PretrainRecipe, mix_colors, point_contrast, pretrain, two_views, watcher
from stego_book.pretraining.structure import POSITION, factors
from stego_lib import Backbone, StegoError

TINY = PretrainRecipe(
    steps=4, batch_size=4, crop=16, full_size_steps=1, full_crop=32, points=4, warmup=2, depth=1, img_size=32,
    projection=8,
)  # fmt: skip
# Losses of the code that made the embedded backbone for scenes, for `TINY` on the noise of `images`.
LOSSES = [4.322342, 4.600821, 2.488095, 3.326677]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator())


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A network after four steps without a break, its log and its folder."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return *pretrain(images, TINY, folder, save_every=2, watch=lambda vit, step: {"watched": step}), folder


@pytest.mark.parametrize("crop, zoom", [(32, (0.75, 1.4)), (24, (1.0, 1.0))])
def test_points_of_both_views_are_the_same_points_of_the_image(crop, zoom):
    """Images whose red is x, green is y and blue tells the image; their colors are not mixed."""
    x, y = torch.linspace(0, 1, 64).expand(64, 64), torch.linspace(0, 1, 64)[:, None].expand(64, 64)
    shown = torch.stack([torch.stack([x, y, torch.full((64, 64), i / 40)]) for i in range(40)])
    recipe = PretrainRecipe(points=12, zoom=zoom, color_mixing=(0, 0, 0, 0))
    view1, view2, where1, where2 = two_views(shown, crop, recipe, generator())
    assert view1.shape == view2.shape == (40, 3, crop, crop) and where1.shape == where2.shape == (40, 12, 2)
    seen = [
        F.grid_sample(view, where[:, :, None], padding_mode="border", align_corners=False)[..., 0]
        for view, where in ((view1, where1), (view2, where2))
    ]
    # At the rim of a crop, a lookup is up to 0.5 / 0.75 pixels of the image off, in each view.
    assert_close(seen[0], seen[1], rtol=0, atol=1.5 / 64)
    assert max(where1.abs().max(), where2.abs().max()) <= 1 + 1e-5, "the points lie within both crops"
    rightwards = torch.stack([view[:, 0, 8, -4] > view[:, 0, 8, 3] for view in (view1, view2)])
    assert 0.25 < rightwards.float().mean() < 0.75 and (rightwards[0] != rightwards[1]).any(), "some are mirrored"
    assert all((view[:, 1, -4, 8] > view[:, 1, 3, 8]).all() for view in (view1, view2)), "never upside down"


def test_mixed_colors_stay_colors_and_differ_from_image_to_image():
    same = torch.rand(1, 3, 8, 8, generator=generator()).expand(5, -1, -1, -1)
    mixed = mix_colors(same, PretrainRecipe.color_mixing, generator())
    assert mixed.shape == same.shape and mixed.min() >= 0 and mixed.max() <= 1
    assert all(not torch.allclose(mixed[0], other, atol=0.01) for other in mixed[1:])


def test_point_contrast_equals_a_naive_loop():
    a, b = (torch.randn(3, 4, 5, generator=generator(seed)) for seed in (0, 1))

    def like(u, v) -> float:
        return math.exp(F.cosine_similarity(u, v, dim=0).item() / 0.3)

    losses = []
    for first, second in ((a, b), (b, a)):
        for i in range(3):
            for p in range(4):
                right = like(first[i, p], second[i, p])
                others = sum(like(first[i, p], second[j, q]) for j in range(3) if j != i for q in range(4))
                losses.append(-math.log(right / (right + others)))
    assert point_contrast(a, b, 0.3).item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_the_losses_are_those_that_made_the_embedded_backbone(trained):
    vit, log, _ = trained
    assert [line["loss"] for line in log] == pytest.approx(LOSSES, rel=1e-4)
    assert [line.get("watched") for line in log] == [None, 2, None, 4] and not vit.training


def test_pretraining_resumes_with_the_same_result(trained, images, tmp_path):
    def interrupt(vit: nn.Module, step: int) -> dict[str, float]:
        if step == 3:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        pretrain(images, TINY, tmp_path, save_every=2, watch=interrupt, watch_every=1)
    vit, log = pretrain(images, TINY, tmp_path, save_every=2)
    assert [line["loss"] for line in log] == [line["loss"] for line in trained[1]]
    for name, value in trained[0].state_dict().items():
        assert torch.equal(vit.state_dict()[name], value), name
    with pytest.raises(ValueError, match="recipe"):
        pretrain(images, replace(TINY, steps=5), tmp_path)


def test_a_run_that_ends_early_keeps_the_planned_schedule(images, tmp_path):
    whole = replace(TINY, full_size_steps=0)
    half = replace(whole, steps=2, schedule_steps=4)
    losses = [[line["loss"] for line in pretrain(images, r, tmp_path / str(r.steps))[1]] for r in (whole, half)]
    assert losses[1] == losses[0][:2] and half.varied(0, 2).schedule_steps is None


def test_images_without_a_chance_are_not_seen(images, tmp_path):
    chances = torch.tensor([1.0] * 4 + [0.0] * 4)
    changed = images.clone()
    changed[4:] = 255 - changed[4:]
    first, second = (
        [line["loss"] for line in pretrain(shown, TINY, tmp_path / name, chances=chances)[1]]
        for name, shown in (("a", images), ("b", changed))
    )
    assert first == second


def test_a_saved_backbone_loads(trained, tmp_path):
    pretraining.save_backbone(trained[0], TINY, tmp_path / "own.safetensors", "four steps on noise")
    backbone = Backbone(str(tmp_path / "own.safetensors"), device="cpu", precision="float32")
    batch = torch.rand(2, 3, 32, 32, generator=generator())
    with torch.inference_mode():
        tokens = trained[0].forward_features((batch - pretraining.MEAN) / pretraining.STD)[:, 1:]
    assert_close(backbone(batch).flatten(2), tokens.transpose(1, 2), rtol=1e-2, atol=1e-2)  # kept in float16


class Colors(nn.Module):
    """A network whose patch tokens are the mean colors of the patches."""

    num_prefix_tokens = 0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(images * pretraining.STD + pretraining.MEAN, 8).flatten(2).transpose(1, 2)


def colored(labels: torch.Tensor, colors: list[list[int]]) -> torch.Tensor:
    return torch.tensor(colors, dtype=torch.uint8)[labels].permute(0, 3, 1, 2)


def test_the_watcher_scores_tokens_against_the_commonest_label_of_their_patch():
    """Patches that show the color of their class score 100 %, whatever a few pixels and unlabeled places hold."""
    labels = torch.randint(0, 3, (10, 4, 4), generator=generator()).repeat_interleave(8, 1).repeat_interleave(8, 2)
    shown = colored(labels, [[255, 0, 0], [0, 255, 0], [0, 0, 255]])
    noisy = labels.clone()
    noisy[:, ::8, :2] = 0
    noisy[:, :, 24:] = -1
    measured = watcher(shown, noisy, 3, batch=4)(Colors(), 5)
    assert measured == {"kmeans_miou": pytest.approx(100), "linear_miou": pytest.approx(100)}


def test_the_probe_of_a_drive_is_fitted_on_the_frames_of_the_others():
    """Two drives whose classes one probe separates, but no probe of one drive separates those of the other."""
    labels = torch.randint(0, 2, (12, 4, 4), generator=generator()).repeat_interleave(8, 1).repeat_interleave(8, 2)
    shown = colored(labels, [[0, 0, 255], [0, 255, 255]])
    shown[1::2] = colored(labels, [[255, 255, 0], [255, 255, 255]])[1::2]
    measured = watcher(shown, labels, 2, every=1, fitted=8, drives=["a", "b"] * 6)(Colors(), 5)
    assert measured["linear_miou"] == pytest.approx(100) and measured["other_miou"] < 60


def test_only_positions_and_attention_are_structured():
    recipe, made = replace(TINY, depth=2, img_size=48), []
    for structured in (False, True):
        torch.manual_seed(4)
        made.append(pretraining.build_network(replace(recipe, structured=structured)).eval())
    plain, given = (dict(vit.named_parameters()) for vit in made)
    attention = {f"blocks.{i}.attn.{part}.weight" for i in range(2) for part in ("qkv", "proj")}
    assert {name for name in plain if not torch.equal(plain[name], given[name])} == attention | {"pos_embed"}
    positions = given["pos_embed"][0, 1:].unflatten(0, (6, 6)).double() / POSITION
    # A quarter of the channels each is the sine and the cosine of each axis, of ever longer waves.
    rates = 10_000.0 ** -(torch.arange(48, dtype=torch.float64) / 48)
    (sine_y, sine_x), (cosine_y, cosine_x) = positions[2, 5].unflatten(0, (2, 2, 48))
    for at, sine, cosine in ((2, sine_y, cosine_y), (5, sine_x, cosine_x)):
        assert_close(sine, torch.sin(at * rates), atol=1e-5, rtol=0)
        assert_close(cosine, torch.cos(at * rates), atol=1e-5, rtol=0)
    # Of two groups of tokens, each gets most of its attention from its own group, in every head.
    groups = torch.randn(2, 1, 192, generator=generator(2)) + 0.3 * torch.randn(2, 8, 192, generator=generator(3))
    tokens = F.layer_norm(groups.flatten(0, 1), (192,))
    own = torch.block_diag(torch.ones(8, 8), torch.ones(8, 8))
    shares = []
    for vit in made:
        queries, keys, _ = vit.blocks[0].attn.qkv(tokens).unflatten(-1, (3, 3, 64)).unbind(1)
        looks = torch.einsum("nhc,mhc->hnm", queries, keys).div(8).softmax(-1)
        shares.append((looks * own).sum(-1).mean(-1))
    assert (shares[0] < 0.7).all() and (shares[1] > 0.9).all()


def test_factors_are_the_best_of_their_rank():
    matrix = torch.randn(12, 12, generator=generator(1), dtype=torch.float64)
    left, right = factors(matrix, 5)
    rest = np.linalg.svd(matrix.numpy(), compute_uv=False)[5:]  # Eckart and Young
    assert float((matrix - left @ right).square().sum()) == pytest.approx(float((rest**2).sum()))


def test_photographs_cover_the_size_and_are_not_stretched(tmp_path: Path):
    y, x = np.mgrid[:60, :160].astype(np.uint8)
    Image.fromarray(np.stack([x, y, 0 * x], 2)).save(tmp_path / "wide.png")
    (photograph,) = pretraining.read_photographs(tmp_path, (60, 80)).float()
    assert torch.equal(photograph[0], torch.arange(40.0, 120.0).expand(60, 80)), "the middle of the columns"
    assert torch.equal(photograph[1], torch.arange(60.0)[:, None].expand(60, 80))
    (tmp_path / "none").mkdir()
    with pytest.raises(StegoError, match="image"):
        pretraining.read_photographs(tmp_path / "none")


def test_a_mixture_gives_each_part_its_share():
    parts = [torch.full((count, 3, 2, 2), value, dtype=torch.uint8) for count, value in ((3, 1), (40, 2), (2, 3))]
    images, chances = pretraining.mixture(parts, [3, 1, 1])
    shares = [float(chances[images[:, 0, 0, 0] == value].sum()) for value in (1, 2, 3)]
    assert shares == pytest.approx([0.6, 0.2, 0.2])


class Frames:
    def __init__(self, names: list[str]):
        self.images = [Path(name) for name in names]

    def __len__(self) -> int:
        return len(self.images)


def test_the_last_frames_of_each_drive_are_held_out():
    names = [f"{drive}_{number:03}.png" for drive in ("a", "b") for number in range(10)]
    learned, held = pretraining.hold_out(Frames(names), 4)
    assert held == [8, 9, 18, 19] and sorted(learned + held) == list(range(20))


def test_a_curve_keeps_means_of_the_loss_and_every_measurement(tmp_path):
    log = [{"step": i, "loss": float(i), "seconds": 6.0 * (i + 1)} for i in range(200)]
    log[99]["kmeans_miou"] = log[199]["kmeans_miou"] = 9.9
    pretraining.write_curve(tmp_path / "a.json", log, TINY, "some words", {"kmeans_miou": 1.0})
    losses, measured, rest = pretraining.read_curve(tmp_path / "a.json")
    assert len(losses) == 80 and losses["loss"].iloc[-1] == 198.5, "the last two steps"
    assert measured["step"].tolist() == [0, 100, 200] and measured.index.tolist() == pytest.approx([0, 10, 20])
    assert rest["about"] == "some words"
