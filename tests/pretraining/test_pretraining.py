"""Pre-training a small ViT: the same points in both views, the contrast, and going on after a break."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from recipes import TINY
from torch.testing import assert_close

from stego_book import pretraining
from stego_book.pretraining import (
    PretrainRecipe,
    crops,
    dense,
    mix_colors,
    point_contrast,
    pretrain,
    save_backbone,
    two_views,
    watcher,
    watching,
)
from stego_lib import Backbone

LOSSES = [4.322342, 4.600821, 2.488095, 3.326677]
"""What `pretrain` gave for `TINY` on noise before its objectives had files of their own."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coordinate_images(count: int, side: int) -> torch.Tensor:
    """Images whose red is x, green is y and blue tells the image, all in [0, 1]."""
    ramp = torch.linspace(0, 1, side)
    x, y = ramp.expand(side, side), ramp[:, None].expand(side, side)
    return torch.stack([torch.stack([x, y, torch.full((side, side), i / count)]) for i in range(count)])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("crop, zoom", [(32, (0.75, 1.4)), (64, (1.0, 1.4)), (24, (1.0, 1.0))])
def test_points_of_both_views_are_the_same_points_of_the_image(monkeypatch, seed, crop, zoom):
    monkeypatch.setattr(crops, "mix_colors", lambda view, *_: view)  # so that a color says where it is from
    view1, view2, where1, where2 = two_views(
        coordinate_images(6, 64), crop, PretrainRecipe(points=12, zoom=zoom), generator(seed)
    )
    assert view1.shape == view2.shape == (6, 3, crop, crop) and where1.shape == where2.shape == (6, 12, 2)
    assert not torch.equal(view1, view2), "two views, not one twice"
    seen = [
        F.grid_sample(view, where[:, :, None], padding_mode="border", align_corners=False)[..., 0]
        for view, where in ((view1, where1), (view2, where2))
    ]
    # At the rim of a crop a lookup is up to half a pixel off, which is up to 0.5 / 0.75 pixels of the image, in each view.
    assert_close(seen[0], seen[1], rtol=0, atol=1.5 / 64)
    assert max(where1.abs().max(), where2.abs().max()) <= 1 + 1e-5, "the points lie within both crops"
    assert_close(seen[0][:, 2], torch.arange(6)[:, None].expand(6, 12) / 6, rtol=0, atol=1e-5)


def test_views_are_mirrored_now_and_then(monkeypatch):
    monkeypatch.setattr(crops, "mix_colors", lambda view, *_: view)
    view1, view2, *_ = two_views(coordinate_images(40, 32), 16, PretrainRecipe(points=2, zoom=(1.0, 1.0)), generator())
    rightwards = torch.stack([view[:, 0, 8, 12] > view[:, 0, 8, 3] for view in (view1, view2)])
    assert 0.25 < rightwards.float().mean() < 0.75 and (rightwards[0] != rightwards[1]).any()
    assert all((view[:, 1, 12, 8] > view[:, 1, 3, 8]).all() for view in (view1, view2)), "never upside down"


def test_views_repeat_with_the_seed():
    images = torch.rand(2, 3, 32, 32, generator=generator())
    for a, b in zip(
        two_views(images, 16, PretrainRecipe(points=3), generator(5)),
        two_views(images, 16, PretrainRecipe(points=3), generator(5)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_mixed_colors_stay_colors_and_differ_from_image_to_image():
    images = torch.rand(1, 3, 8, 8, generator=generator()).expand(5, -1, -1, -1)
    found = mix_colors(images, PretrainRecipe.color_mixing, generator())
    assert found.shape == images.shape and found.min() >= 0 and found.max() <= 1
    assert all(not torch.allclose(found[0], other, atol=0.01) for other in found[1:])


@pytest.mark.parametrize("count, points", [(2, 1), (3, 4)])
def test_point_contrast_equals_a_naive_loop(count, points):
    a, b = (torch.randn(count, points, 5, generator=generator(seed)) for seed in (0, 1))
    temperature = 0.3

    def like(u, v) -> float:
        return math.exp(F.cosine_similarity(u, v, dim=0).item() / temperature)

    losses = []
    for one, two in ((a, b), (b, a)):
        for i in range(count):
            for p in range(points):
                right = like(one[i, p], two[i, p])
                others = sum(like(one[i, p], two[j, q]) for j in range(count) if j != i for q in range(points))
                losses.append(-math.log(right / (right + others)))
    assert point_contrast(a, b, temperature).item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_point_contrast_is_least_where_points_are_recognized():
    a = torch.eye(6).view(3, 2, 6)
    assert point_contrast(a, a, 0.1) < 1e-3 < point_contrast(a, a.roll(1, 0), 0.1)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator())


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A network after the four steps without a break, its log and its folder."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return *pretrain(images, TINY, folder, save_every=2, watch=lambda vit, step: {"watched": step}), folder


def test_pretraining_runs_and_logs_every_step(trained):
    vit, log, folder = trained
    assert [line["step"] for line in log] == [0, 1, 2, 3] and all(math.isfinite(line["loss"]) for line in log)
    assert [line.get("watched") for line in log] == [None, 2, None, 4]
    assert not vit.training and (folder / "pretraining.pt").exists()


def test_the_dense_contrast_gives_the_losses_that_it_gave_the_scenes(trained):
    """Losses of the code that made the embedded scenes backbone, on the same noise."""
    assert [line["loss"] for line in trained[1]] == pytest.approx(LOSSES, rel=1e-4)


def test_pretraining_changes_the_network(trained, images, tmp_path):
    once = pretrain(images, TINY, trained[2])[0]  # finished: nothing more is done
    assert all(
        torch.equal(a, b) for a, b in zip(once.state_dict().values(), trained[0].state_dict().values(), strict=True)
    )
    other = pretrain(images, PretrainRecipe(**(vars(TINY) | {"seed": 1})), tmp_path)[0]
    assert not torch.equal(
        other.state_dict()["blocks.0.attn.qkv.weight"], once.state_dict()["blocks.0.attn.qkv.weight"]
    )


def test_pretraining_goes_on_after_a_break_with_the_same_result(trained, images, tmp_path, monkeypatch):
    contrast, calls = dense.point_contrast, []

    def breaks(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return contrast(*arguments)

    monkeypatch.setattr(dense, "point_contrast", breaks)
    with pytest.raises(KeyboardInterrupt):
        pretrain(images, TINY, tmp_path, save_every=2)
    vit, log = pretrain(images, TINY, tmp_path, save_every=2)
    assert len(calls) == 4 + 2, "it went on from step 2"
    assert [line["loss"] for line in log] == [line["loss"] for line in trained[1]]
    for name, value in trained[0].state_dict().items():
        assert torch.equal(vit.state_dict()[name], value), name


def test_a_folder_of_another_recipe_is_refused(trained, images):
    with pytest.raises(ValueError, match=r"pretraining\.pt belongs to another recipe"):
        pretrain(images, PretrainRecipe(**(vars(TINY) | {"steps": 5})), trained[2])


def test_a_saved_backbone_loads(trained, tmp_path):
    save_backbone(trained[0], TINY, tmp_path / "own.safetensors", "four steps on noise")
    backbone = Backbone(str(tmp_path / "own.safetensors"), device="cpu", precision="float32")
    batch = torch.rand(2, 3, 32, 32, generator=generator())
    found = backbone(batch)
    with torch.inference_mode():
        tokens = trained[0].forward_features((batch - pretraining.MEAN) / pretraining.STD)[:, 1:]
    assert_close(found.flatten(2), tokens.transpose(1, 2), rtol=1e-2, atol=1e-2)  # kept in float16


def test_the_watcher_scores_tokens_against_the_commonest_label_of_their_patch(monkeypatch):
    """Tokens that are their own label (two pixels of each patch say otherwise) score 100 %."""
    labels = torch.randint(0, 3, (10, 4, 4), generator=generator()).repeat_interleave(8, 1).repeat_interleave(8, 2)
    tokens = F.one_hot(labels[:, ::8, ::8].flatten(1), 3).float()
    noisy = labels.clone()
    noisy[:, ::8, :2] = 0
    shown = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 32, 32)
    monkeypatch.setattr(watching, "tokens_of", lambda _, images: tokens[(images[:, 0, 0, 0] * 255).round().long()])
    found = watcher(shown, noisy, 3, batch=4)(torch.nn.Linear(1, 1), 5)
    assert found["kmeans_miou"] == pytest.approx(100) and found["linear_miou"] == pytest.approx(100)


def test_the_watcher_fits_the_probe_of_a_drive_on_the_frames_of_the_others(monkeypatch):
    """Two drives whose tokens name the classes in opposite ways: right on one's own kind, wrong on the other's."""
    labels = torch.randint(0, 2, (12, 4, 4), generator=generator()).repeat_interleave(8, 1).repeat_interleave(8, 2)
    drives = ["a", "b"] * 6
    tokens = F.one_hot(labels[:, ::8, ::8].flatten(1), 2).float()
    tokens[1::2] = 1 - tokens[1::2]
    own = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 6)[:, None].expand(-1, 16, -1)
    tokens = torch.cat([tokens * own[..., :1], tokens * own[..., 1:], own], -1)  # each drive in channels of its own
    shown = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(12, 3, 32, 32)
    monkeypatch.setattr(watching, "tokens_of", lambda _, images: tokens[(images[:, 0, 0, 0] * 255).round().long()])
    found = watcher(shown, labels, 2, every=1, fitted=8, drives=drives)(torch.nn.Linear(1, 1), 5)
    assert found["linear_miou"] == pytest.approx(100) and found["other_miou"] < 60
    assert set(watcher(shown, labels, 2)(torch.nn.Linear(1, 1), 5)) == {"kmeans_miou", "linear_miou"}


def test_images_are_shrunk_to_the_mean_of_their_squares(images, tmp_path):
    whole = replace(TINY, crop=8, full_crop=8, shrink=2)
    squares = images.reshape(8, 3, 16, 2, 16, 2).permute(0, 1, 2, 4, 3, 5).flatten(4)
    means = torch.tensor(
        [round(float(sum(square)) / 4) for square in squares.reshape(-1, 4).tolist()], dtype=torch.uint8
    ).view(8, 3, 16, 16)
    losses = [
        [line["loss"] for line in pretrain(shown, recipe, tmp_path / str(recipe.shrink))[1]]
        for shown, recipe in ((images, whole), (means, replace(whole, shrink=1)))
    ]
    assert losses[0] == losses[1]


def test_a_run_that_ends_early_keeps_the_schedule_that_was_planned(images, tmp_path):
    """The first half of a run, laid out for the whole, takes the very steps of the whole."""
    whole = replace(TINY, full_size_steps=0)
    half = replace(whole, steps=2, schedule_steps=4)
    losses = [[line["loss"] for line in pretrain(images, r, tmp_path / str(r.steps))[1]] for r in (whole, half)]
    assert losses[1] == losses[0][:2]
    assert half.varied(0, 2).schedule_steps is None
    other = [line["loss"] for line in pretrain(images, half.varied(0, 3), tmp_path / "own")[1]]
    assert other[2] != losses[0][2]


def test_the_watcher_leaves_unlabeled_places_out(monkeypatch):
    """Three places of four without a label, whose tokens are those of the labeled: the scores stay 100 %."""
    labels = torch.randint(0, 3, (10, 4, 4), generator=generator()).repeat_interleave(8, 1).repeat_interleave(8, 2)
    tokens = F.one_hot(labels[:, ::8, ::8].flatten(1), 3).float()
    void = labels.clone()
    void[:, :, 8:] = -1
    shown = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 32, 32)
    monkeypatch.setattr(watching, "tokens_of", lambda _, images: tokens[(images[:, 0, 0, 0] * 255).round().long()])
    found = watcher(shown, void, 3)(torch.nn.Linear(1, 1), 5)
    assert found["kmeans_miou"] == pytest.approx(100) and found["linear_miou"] == pytest.approx(100)
