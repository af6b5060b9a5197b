"""Pilots of cheaper steps: what is held out, what is compared, and the masked autoencoder against a naive loop."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import standins
import torch
from recipes import DISTILLED
from torch.testing import assert_close

from stego_book import pretraining
from stego_book.pretraining import crops
from stego_book.pretraining.mae import Mae, draw_shown, masked_error, pick, pixels
from stego_book.pretraining.network import all_tokens, build_network, embed
from stego_lib import open_dataset
from stego_lib.utils.notices import Notice


def test_the_last_frames_of_each_drive_are_held_out():
    names = [f"0001TP_{i:04d}.png" for i in range(12)] + [f"Seq05VD_f{i:04d}.png" for i in range(6)]
    dataset = type("Frames", (), {"images": [Path(name) for name in names], "__len__": lambda self: len(self.images)})()
    learned, held = pretraining.hold_out(dataset, 6)
    assert held == [8, 9, 10, 11, 16, 17] and learned == [row for row in range(18) if row not in held]
    assert pretraining.hold_out(dataset, 100)[1] == held, "a third at most"


def test_streets_are_the_frames_that_are_left_and_the_photographs(tmp_path):
    """Each image is of one color, so that it can be told."""
    for folder, count, base in (
        ("camvid/train", 6, 10),
        ("camvid/val", 3, 200),
        ("photos", 2, 100),
        ("photos_more", 1, 150),
    ):
        for number in range(count):
            standins.save(tmp_path / folder / f"drive_{number}.png", np.full((60, 80, 3), base + number, np.uint8))
            if "camvid" in folder:
                standins.save(tmp_path / f"{folder}annot" / f"drive_{number}.png", standins.stripes([0, 3, 11], 60, 80))
    streets = pretraining.read_streets(open_dataset("camvid", tmp_path, "train"), tmp_path, 2)
    assert streets.images[:, 0, 0, 0].tolist() == [10, 11, 12, 13, 100, 101, 150]
    alone = pretraining.read_streets(open_dataset("camvid", tmp_path, "train"), tmp_path, 2, ("photos",))
    assert alone.images[:, 0, 0, 0].tolist() == [10, 11, 12, 13, 100, 101]
    with pytest.warns(Notice, match="elsewhere is not there: fewer photographs"):
        pretraining.read_streets(open_dataset("camvid", tmp_path, "train"), tmp_path, 2, ("photos", "elsewhere"))
    assert streets.chances[:4].sum().item() == pytest.approx(0.6)
    torch.manual_seed(0)
    seen = streets.watch(build_network(replace(DISTILLED, img_size=32)).eval(), 0)
    assert set(seen) == {"kmeans_miou", "linear_miou", "other_miou"} and 0 <= seen["kmeans_miou"] <= 100


def test_ways_cost_the_same_and_half_the_size_shows_the_same_view():
    ways = pretraining.pilot_ways(3)
    for stages in ways.values():
        assert sum(share for _, share in stages) == pytest.approx(1) and all(recipe.seed == 3 for recipe, _ in stages)
    (half, _), (full, _) = ways["six blocks, half size first"]
    assert 2 * half.crop == full.crop and [round(full.crop / zoom) for zoom in full.zoom] == pytest.approx(
        [half.crop / zoom for zoom in half.zoom], rel=0.01
    )
    assert half.depth == full.depth == 6 and ways["twelve blocks"][0][0] == replace(pretraining.PHOTOS, seed=3)
    assert [stage.crop for stage in pretraining.STREETS] == [40, 80, 112] and {
        stage.depth for stage in pretraining.STREETS
    } == {6}


# ---------------------------------------------------------------------------------------------- masked autoencoder


def test_the_error_is_that_of_hidden_patches_alone():
    generator = torch.Generator().manual_seed(0)
    painted, known = torch.randn(2, 2, 4, 5, generator=generator)
    shown = torch.tensor([[0], [2]])
    hidden = [(b, n) for b in range(2) for n in range(4) if n != shown[b, 0]]
    expected = sum(float(((painted[b, n] - known[b, n]) ** 2).mean()) for b, n in hidden) / len(hidden)
    assert masked_error(painted, known, shown).item() == pytest.approx(expected, rel=1e-5)


def test_pixels_are_those_of_each_patch_without_its_mean_and_spread():
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    found = pixels(images)
    assert found.shape == (2, 6, 192)
    patch = images[1, :, 8:16, 16:24].flatten()  # the last of two rows of three
    assert_close(found[1, 5], (patch - patch.mean()) / (patch.var() + 1e-4).sqrt())


def test_as_many_patches_are_seen_as_asked_each_once():
    shown = draw_shown(5, 16, 0.75, torch.Generator().manual_seed(0))
    assert shown.shape == (5, 4) and all(len(set(row)) == 4 for row in shown.tolist())
    assert draw_shown(1, 3, 0.99, torch.Generator().manual_seed(0)).shape == (1, 1)
    tokens = torch.arange(30.0).view(1, 10, 3)
    assert pick(tokens, torch.tensor([[7, 2]]))[0].tolist() == tokens[0, [7, 2]].tolist()


def test_what_enters_the_blocks_gives_the_tokens_of_the_network():
    torch.manual_seed(0)
    vit = build_network(DISTILLED).eval()
    images = torch.rand(2, 3, 16, 24)
    assert_close(vit.norm(vit.blocks(vit.norm_pre(embed(vit, images)))), all_tokens(vit, images))


def test_hidden_pixels_do_not_reach_the_network_and_the_loss_falls():
    torch.manual_seed(0)
    recipe = replace(DISTILLED, objective="mae", color_mixing=(0.0, 0.0, 0.0, 0.0))
    mae, images = Mae(build_network(recipe), recipe), torch.rand(4, 3, 32, 32)
    seen = []
    mae.vit.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    loss = lambda: mae(images, 32, torch.Generator().manual_seed(1))  # noqa: E731
    optimizer, first = torch.optim.Adam(mae.parameters(), lr=1e-2), loss().item()
    assert [tokens.shape for tokens in seen] == [(8, 1 + 4, 192)], "the class token and a quarter of 16 patches"
    views = crops.large_and_small_views(images, 32, 0, 0, recipe, torch.Generator().manual_seed(1))[0].flatten(0, 1)
    whole = embed(mae.vit, views)
    for tokens, all_of_them in zip(seen[0], whole, strict=True):
        near = torch.cdist(tokens[1:], all_of_them[1:])
        assert (near.min(1).values < 1e-4).all() and len(set(near.argmin(1).tolist())) == 4, (
            "four different patches, in their places"
        )
    for _ in range(30):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    assert value.item() < 0.8 * first
    assert all(weight.grad is not None for weight in mae.vit.blocks.parameters())
