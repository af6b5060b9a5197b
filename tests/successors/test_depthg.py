"""DepthG: its points and its depth term by brute force, the defects of the released code on small numbers, depth maps on disk."""

import numpy as np
import pytest
import torch
from common import tiny_experiment
from PIL import Image

from stego_lib import StegoError, open_dataset
from stego_lib.datasets.crops import FiveCrop
from stego_lib.datasets.scenes import draw_scenes
from stego_lib.datasets.transforms import resize_image
from stego_lib.experiment import SUCCESSORS
from stego_lib.loss import sample
from stego_lib.successors import depthg
from stego_lib.training import train

GENERATOR = torch.Generator().manual_seed(0)
DEPTH = torch.rand(2, 1, 12, 16, generator=GENERATOR)
CODE = torch.randn(2, 5, 6, 8, generator=GENERATOR)


def test_farthest_points_are_those_of_a_naive_loop():
    points = torch.rand(3, 40, 3, generator=GENERATOR)
    found = depthg.farthest_points(points, 12)
    for cloud, chosen in zip(points.double().numpy(), found.tolist(), strict=True):
        expected = [0]
        while len(expected) < 12:
            distances = [min(np.linalg.norm(point - cloud[i]) for i in expected) for point in cloud]
            expected.append(int(np.argmax(distances)))
        assert chosen == expected


def test_points_that_coincide_are_each_taken_once():
    """Depths of 0 all lie in the camera."""
    assert depthg.farthest_points(torch.zeros(1, 6, 3), 6).sort(1).values.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_the_longer_side_is_seen_at_ninety_degrees():
    """Of a wall at distance d the image shows d to either side: 8 columns of d / 4, whose centers are the points."""
    cloud = depthg.point_cloud(torch.full((1, 1, 6, 8), 0.8)).view(6, 8, 3)
    right, down, towards = cloud.unbind(-1)
    torch.testing.assert_close(right, (0.2 * (torch.arange(8) - 3.5)).expand(6, 8))
    torch.testing.assert_close(down, (0.2 * (torch.arange(6) - 2.5))[:, None].expand(6, 8))
    torch.testing.assert_close(towards, torch.full((6, 8), -0.8 * depthg.STRETCH))


def test_more_points_than_patches_are_refused():
    with pytest.raises(StegoError, match="13 different points"):
        depthg.farthest_points(torch.rand(1, 12, 3), 13)


def test_points_follow_the_depth_and_lie_on_patches():
    """Half of the image is at one depth and holds one patch in eight of its own; the rest varies, and draws the points."""
    depth = torch.full((1, 1, 8, 8), 0.5)
    depth[..., 4:] = torch.rand(8, 4, generator=GENERATOR)
    coords = depthg.depth_coords(depth, (8, 8), 4)
    index = torch.arange(64.0).view(1, 1, 8, 8)
    read = sample(index, coords)
    assert torch.allclose(read, read.round(), atol=1e-4), "each point is the center of a patch as `sample` reads it"
    assert ((read.round() % 8) >= 4).float().mean() > 0.5 and len(read.round().unique()) == 16


def test_released_points_are_transposed():
    """Structure in the lower left draws the points there; the released code then reads the mirrored corner, upper right."""
    depth = torch.full((1, 1, 8, 8), 0.5)
    depth[..., 4:, :4] = torch.rand(4, 4, generator=GENERATOR)
    rows = torch.arange(8.0).repeat_interleave(8).view(1, 1, 8, 8)
    columns = torch.arange(8.0).repeat(8).view(1, 1, 8, 8)

    def lower_left(published: bool) -> float:
        coords = depthg.depth_coords(depth, (8, 8), 4, published=published)
        return ((sample(rows, coords) > 3.5) & (sample(columns, coords) < 3.5)).float().mean().item()

    def upper_right() -> float:
        coords = depthg.depth_coords(depth, (8, 8), 4, published=True)
        return ((sample(rows, coords) < 3.5) & (sample(columns, coords) > 3.0)).float().mean().item()

    assert lower_left(False) > 0.4 and upper_right() > 0.4 and lower_left(True) < 0.3


def test_the_depth_term_is_a_naive_loop():
    coords = depthg.depth_coords(DEPTH, (6, 8), 3)
    found = depthg.depth_loss(DEPTH, CODE, coords, 0.7)
    pooled = torch.nn.functional.adaptive_avg_pool2d(DEPTH, (6, 8))
    depths, codes = sample(pooled, coords), torch.nn.functional.normalize(sample(CODE, coords), dim=1)
    for b in range(2):
        for p in range(9):
            for q in range(9):
                (i, j), (k, m) = divmod(p, 3), divmod(q, 3)
                closeness = 1 - abs(depths[b, 0, i, j] - depths[b, 0, k, m])
                cosine = codes[b, :, i, j] @ codes[b, :, k, m]
                expected = -(closeness - 0.7) * cosine.clamp(min=0)
                assert found[b, i, j, k, m] == pytest.approx(expected.item(), abs=1e-5)


def test_the_released_term_is_the_same_for_any_depth_and_ours_is_not():
    coords = depthg.depth_coords(DEPTH, (6, 8), 3)
    other = 0.1 + 0.9 * torch.rand(2, 1, 12, 16, generator=GENERATOR)
    values = {
        published: [
            depthg.depth_loss(depth, CODE, coords, 0.03, published=published).mean() for depth in (DEPTH + 0.01, other)
        ]
        for published in (True, False)
    }
    assert values[True][0] == values[True][1], "no zero in either depth, so the correspondence is 1 everywhere"
    assert abs(values[False][0] - values[False][1]) > 1e-3


# ---------------------------------------------------------------------------------------------- depth maps


@pytest.fixture
def scenes(tmp_path):
    draw_scenes(tmp_path / "scenes", train=4, val=1, size=64)
    return tmp_path


def test_depth_of_scenes_is_read_whole_and_cut(scenes):
    dataset = open_dataset("scenes", scenes, "train")
    stored = np.asarray(Image.open(scenes / "scenes" / "depth" / "train" / f"{dataset.names[2]}.png"))
    assert stored.min() == 0 and stored.max() == 255
    assert np.array_equal(depthg.read_depth(dataset, 2)[0].numpy(), stored)
    crops = FiveCrop(dataset)
    assert np.array_equal(depthg.read_depth(crops, 12)[0].numpy(), stored[32:, :32])


def test_sixteen_bits_are_scaled_by_their_own_range(scenes):
    dataset = open_dataset("scenes", scenes, "train")
    path = scenes / "scenes" / "depth" / "train" / f"{dataset.names[0]}.png"
    Image.fromarray(np.linspace(1000, 5000, 64 * 64).reshape(64, 64).astype(np.uint16)).save(path)
    found = depthg.read_depth(dataset, 0)
    assert (
        found.shape == (1, 64, 64) and found[0, 0, 0] == 0 and found[0, -1, -1] == 255 and 126 <= found[0, 32, 0] <= 129
    )


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), r"0001.png has no depth/train/0001.png.*drawn anew"),
        (lambda path: Image.new("RGB", (64, 64)).save(path), r"0001.png has shape \(64, 64, 3\).*one gray value"),
        (lambda path: Image.new("P", (64, 64)).save(path), r"0001.png has colors of a palette.*one gray value"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:100]),
            r"depth map .*0001.png cannot be read .*replace the file",
        ),
        (lambda path: path.write_text("no image"), r"depth map .*0001.png cannot be read .*replace the file"),
        (lambda path: Image.new("L", (32, 64)).save(path), r"0001.png is \(64, 32\), its image .* is \(64, 64\)"),
    ],
)
def test_a_depth_map_that_cannot_be_used_is_named(scenes, damage, said):
    damage(scenes / "scenes" / "depth" / "train" / "0001.png")
    with pytest.raises(StegoError, match=said):
        depthg.read_depth(open_dataset("scenes", scenes, "train"), 1)


def test_training_depends_on_depth(scenes, backbone_file, tmp_path):
    asked = tiny_experiment(scenes, backbone_file, method="depthg", **(SUCCESSORS["depthg"] | {"code_dim": 8}), steps=2)
    first = train(asked, runs_dir=tmp_path / "a")
    for path in (scenes / "scenes" / "depth" / "train").glob("*.png"):
        Image.fromarray(np.asarray(Image.open(path))[:, ::-1].copy()).save(path)
    second = train(asked, runs_dir=tmp_path / "b")
    assert not torch.equal(first.model.head.linear.weight, second.model.head.linear.weight)
    assert first.correspondences["depth_shift"] == pytest.approx(second.correspondences["depth_shift"], abs=0.2)


def asked_of(scenes, backbone_file, **changes):
    return tiny_experiment(scenes, backbone_file, method="depthg", **(SUCCESSORS["depthg"] | {"code_dim": 8} | changes))


def test_a_step_sees_the_depth_of_its_images_and_a_term_that_fades(scenes, backbone_file, tmp_path, monkeypatch):
    seen, loss = [], depthg.depthg_loss

    def spied(feats, feats_knn, *arguments, **named):
        seen.append((feats, feats_knn, arguments))
        return loss(feats, feats_knn, *arguments, **named)

    monkeypatch.setattr(depthg, "EVERY", 2)
    monkeypatch.setattr(depthg, "FADE", 0.5)
    monkeypatch.setattr(depthg, "depthg_loss", spied)
    # 4 training images and batches of 2, so that images and partners differ
    run = train(
        asked_of(scenes, backbone_file, steps=5, batch_size=2, train_size=32, shifts=(0.1, 0.1, 0.1)), runs_dir=tmp_path
    )
    dataset = open_dataset("scenes", scenes, "train")
    feats = run.backbone(torch.stack([resize_image(dataset.image(i), 32) for i in range(len(dataset))])).cpu()
    maps = torch.stack([resize_image(depthg.read_depth(dataset, i), 32) for i in range(len(dataset))]) / 255
    depths = torch.nn.functional.avg_pool2d(maps, 8)

    def numbers(maps):
        """Which images a batch of features is of."""
        return [int((feats - one).square().flatten(1).sum(1).argmin()) for one in maps]

    differ = 0
    for number, (feats1, feats2, (_, _, depth, coords1, coords2, _, weights, shifts)) in enumerate(seen):
        own, partners = numbers(feats1), numbers(feats2)
        differ += own != partners
        torch.testing.assert_close(depth, depths[own])
        torch.testing.assert_close(coords1, depthg.depth_coords(depths[own], (4, 4), 3))
        torch.testing.assert_close(coords2, depthg.depth_coords(depths[partners], (4, 4), 3))
        fade = 0.5 ** (number // 2)
        assert weights == (*run.experiment.weights, pytest.approx(fade * depthg.WEIGHT))
        assert shifts == (*run.shifts, pytest.approx(fade * depthg.SHIFT))
    assert len(seen) == 5 and differ


def test_the_shift_that_was_found_holds_after_a_break(scenes, backbone_file, tmp_path, monkeypatch):
    asked, step = asked_of(scenes, backbone_file, shifts="auto", steps=4), depthg.Trainer.step

    def breaks(self, number):
        if number == 2:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(depthg.Trainer, "step", breaks)
        with pytest.raises(KeyboardInterrupt):
            train(asked, runs_dir=tmp_path / "broken")
    resumed = train(asked, runs_dir=tmp_path / "broken", resume=True)
    straight = train(asked, runs_dir=tmp_path / "straight")
    assert resumed.log.equals(straight.log)
    dataset = open_dataset("scenes", scenes, "train")
    maps = torch.stack([depthg.read_depth(dataset, i) for i in range(len(dataset))]) / 255
    cells = torch.nn.functional.avg_pool2d(maps, 8).flatten(1).double().numpy()
    closeness = 1 - np.abs(cells[:, :, None] - cells[:, None])
    assert straight.correspondences["depth_shift"] == pytest.approx(np.percentile(closeness, depthg.AUTO), abs=0.01)


def test_a_measured_shift_does_not_fade_and_other_maps_are_noticed(scenes, backbone_file, tmp_path, monkeypatch):
    seen, loss = [], depthg.depthg_loss
    monkeypatch.setattr(depthg, "EVERY", 1)
    monkeypatch.setattr(
        depthg, "depthg_loss", lambda *given, **named: (seen.append(given[9][3]), loss(*given, **named))[1]
    )
    asked, step = asked_of(scenes, backbone_file, steps=3), depthg.Trainer.step

    def breaks(self, number):
        if number == 2:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(depthg.Trainer, "step", breaks)
        train(asked, runs_dir=tmp_path / "runs")
    assert len(seen) == 2 and seen[0] == seen[1] > 0.1
    path = scenes / "scenes" / "depth" / "train" / "0001.png"
    Image.fromarray(np.asarray(Image.open(path))[::-1].copy()).save(path)
    with pytest.raises(StegoError, match="other depth maps"):
        train(asked, runs_dir=tmp_path / "runs", resume=True)
