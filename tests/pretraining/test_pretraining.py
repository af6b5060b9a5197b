"""Pre-training: the same points in both views, the contrast, the initialization, resuming, the probes that watch."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from stego_book import pretraining
from stego_book.pretraining import PretrainRecipe, point_contrast, pretrain, two_views
from stego_lib import Backbone

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


def test_a_saved_backbone_loads(trained, tmp_path):
    pretraining.save_backbone(trained[0], TINY, tmp_path / "own.safetensors", "four steps on noise")
    backbone = Backbone(str(tmp_path / "own.safetensors"), device="cpu", precision="float32")
    batch = torch.rand(2, 3, 32, 32, generator=generator())
    with torch.inference_mode():
        tokens = trained[0].forward_features((batch - pretraining.MEAN) / pretraining.STD)[:, 1:]
    assert_close(backbone(batch).flatten(2), tokens.transpose(1, 2), rtol=1e-2, atol=1e-2)  # kept in float16
