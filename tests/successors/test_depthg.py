"""The depth term by brute force, the defects of the released code on small numbers, depth maps on disk."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from stego_lib import StegoError, open_dataset
from stego_lib.datasets.crops import FiveCrop
from stego_lib.datasets.scenes import draw_scenes
from stego_lib.loss import sample
from stego_lib.successors import depthg
from stego_lib.utils.notices import Notice

GENERATOR = torch.Generator().manual_seed(0)
DEPTH = torch.rand(2, 1, 12, 16, generator=GENERATOR)
CODE = torch.randn(2, 5, 6, 8, generator=GENERATOR)


def test_farthest_points_of_equal_or_too_few_points():
    assert depthg.farthest_points(torch.zeros(1, 6, 3), 6).sort(1).values.tolist() == [[0, 1, 2, 3, 4, 5]]
    with pytest.raises(StegoError, match="points"):
        depthg.farthest_points(torch.rand(1, 12, 3), 13)


def test_points_follow_the_depth_where_the_released_ones_are_transposed():
    """Structure in the lower left draws the points there; the released code reads the mirrored corner, upper right."""
    depth = torch.full((1, 1, 8, 8), 0.5)
    depth[..., 4:, :4] = torch.rand(4, 4, generator=GENERATOR)
    numbers = torch.arange(64.0).view(1, 1, 8, 8)
    read = sample(numbers, depthg.depth_coords(depth, (8, 8), 4))
    assert torch.allclose(read, read.round(), atol=1e-4), "each point is the center of a patch as `sample` reads it"
    cells = read.round().long()
    assert len(cells.unique()) == 16 and ((cells // 8 >= 4) & (cells % 8 < 4)).float().mean() > 0.4
    coords = depthg.depth_coords(depth, (8, 8), 4, published=True)
    rows, columns = sample((numbers // 8), coords), sample(numbers % 8, coords)
    assert ((rows < 3.5) & (columns > 3)).float().mean() > 0.4 > 0.3 > ((rows > 3.5) & (columns < 3.5)).float().mean()


def test_the_depth_term_is_a_naive_loop():
    coords = depthg.depth_coords(DEPTH, (6, 8), 3)
    losses = depthg.depth_loss(DEPTH, CODE, coords, 0.7)
    depths = sample(F.adaptive_avg_pool2d(DEPTH, (6, 8)), coords).flatten(1)
    codes = F.normalize(sample(CODE, coords), dim=1).flatten(2)
    for b in range(2):
        for p in range(9):
            for q in range(9):
                closeness = 1 - abs(depths[b, p] - depths[b, q])
                expected = -(closeness - 0.7) * (codes[b, :, p] @ codes[b, :, q]).clamp(min=0)
                assert losses.flatten(3).flatten(1, 2)[b, p, q] == pytest.approx(expected.item(), abs=1e-5)


@pytest.fixture
def scenes(tmp_path):
    draw_scenes(tmp_path / "scenes", train=4, val=1, size=64)
    return tmp_path


def test_depth_of_scenes_is_read_whole_and_cropped(scenes):
    dataset = open_dataset("scenes", scenes, "train")
    stored = np.asarray(Image.open(scenes / "scenes" / "depth" / "train" / f"{dataset.names[2]}.png"))
    assert np.array_equal(depthg.read_depth(dataset, 2)[0].numpy(), stored)
    assert np.array_equal(depthg.read_depth(FiveCrop(dataset), 12)[0].numpy(), stored[32:, :32])


def test_pixels_that_were_not_measured_are_left_out(scenes):
    dataset = open_dataset("scenes", scenes, "train")
    values = np.linspace(1000, 5000, 64 * 64).reshape(64, 64).astype(np.uint16)
    values[:16], values[50:] = 0, 65535
    Image.fromarray(values).save(scenes / "scenes" / "depth" / "train" / f"{dataset.names[0]}.png")
    depth, measured = depthg.read_depth(dataset, 0).numpy()
    np.testing.assert_array_equal(
        measured, np.where((np.arange(64) < 16) | (np.arange(64) >= 50), 0, 255)[:, None] + 0 * depth
    )
    assert (depth[:17] <= 8).all() and (depth[49:] >= 247).all(), "the range of what was measured, continued"

    maps, coords = DEPTH.clone(), depthg.depth_coords(DEPTH, (6, 8), 3)
    maps[:, :, :6] = torch.nan
    left_out = coords[..., 1].mT.flatten(1) < 0  # `sample` transposes
    losses, whole = (depthg.depth_loss(depth, CODE, coords, 0.7).flatten(3).flatten(1, 2) for depth in (maps, DEPTH))
    pairs = left_out[:, :, None] | left_out[:, None]
    assert (losses[pairs] == 0).all() and torch.allclose(losses[~pairs], whole[~pairs])
    assert 0 < pairs.sum() < pairs.numel()


def test_the_convention_of_depth_maps(scenes):
    dataset = open_dataset("scenes", scenes, "train")
    folder = scenes / "scenes" / "depth"
    before = [depthg.read_depth(dataset, i) for i in range(4)]
    depthg.check_depth(dataset)
    for name in dataset.names:
        path = folder / "train" / f"{name}.png"
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    with pytest.warns(Notice, match="inverse"):
        depthg.check_depth(dataset)
    (folder / "depth.json").write_text('{"inverse": true}')
    depthg.check_depth(dataset)
    assert all(torch.equal(depthg.read_depth(dataset, i), before[i]) for i in range(4))
    smooth = np.linspace(200, 100, 64 * 64).reshape(64, 64).astype(np.uint8)
    smooth[:4] = 0
    Image.fromarray(smooth).save(path)
    (folder / "depth.json").write_text('{"invalid": [0]}')
    assert (depthg.read_depth(dataset, 3)[1, :4] == 0).all()
    for wrong in ('{"inverze": true}', "["):
        (folder / "depth.json").write_text(wrong)
        with pytest.raises(StegoError, match=r"depth\.json"):
            depthg.read_depth(dataset, 0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: Image.new("P", (64, 64)).save(path),
        lambda path: Image.new("L", (32, 64)).save(path),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
    ],
    ids=["missing", "palette", "size", "truncated"],
)
def test_a_depth_map_that_cannot_be_used_is_named(scenes, damage):
    damage(scenes / "scenes" / "depth" / "train" / "0001.png")
    with pytest.raises(StegoError, match=r"0001\.png"):
        depthg.read_depth(open_dataset("scenes", scenes, "train"), 1)
