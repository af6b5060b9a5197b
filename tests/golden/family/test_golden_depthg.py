"""DepthG against the released code's numbers, with its defects: every array of tests/golden/family/depthg.npz.

Replayed: depth_resized and depth_cd; of fps. and rand. the sampled codes, the losses, their sum and the gradients; of fps. the
pooled depth, the points, the order of choice, the coordinates, and where they are read.
"""

import torch
import torch.nn.functional as F
from common import Replayed
from torch import Tensor
from torch.testing import assert_close

from stego_lib.loss import sample
from stego_lib.successors import depthg

G = Replayed("family/depthg")
VALUES = dict(rtol=1e-4, atol=1e-6)
# The project's order is (self, knn, rand, depth); the published names of the four are these.
PUBLISHED = {"self": "pos_intra", "knn": "pos_inter", "rand": "neg_inter", "depth": "depth"}


def four(kind: str) -> tuple[float, float, float, float]:
    """Weights or shifts."""
    a, b, c, d = (G[f"{name}_{kind}_f64"].item() for name in ("pos_intra", "pos_inter", "neg_inter", "depth_feat"))
    return a, b, c, d


def assert_gradient(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_depth_and_its_correspondence():
    for case in ("fps", "rand"):
        coords = G[f"{case}.coords1"]
        depth = depthg.sampled_depth(G["depth"], coords, G["code"].shape[-2:], published=True)
        assert_close(depth, G["depth_resized"], **VALUES)
        found = depthg.depth_correspondence(depth, depth, published=True)
        assert_close(found, G["depth_cd"], **VALUES)
        for name in ("mean", "min", "max"):
            assert_close(getattr(found, name)(), G[f"{case}.depth_cd_{name}"], **VALUES)


def test_losses_and_gradients():
    for case in ("fps", "rand"):
        coords1, coords2 = G[f"{case}.coords1"], G[f"{case}.coords2"]
        assert_close(sample(G["code"], coords1), G[f"{case}.sampled_code"], **VALUES)
        code, code_knn = (G[name].clone().requires_grad_() for name in ("code", "code_pos"))
        total, parts = depthg.depthg_loss(
            G["feats"], G["feats_pos"], code, code_knn, G["depth"], coords1, coords2, G["perms"],
            four("weight"), four("shift"), published=True,
        )  # fmt: skip
        total.backward()
        assert_close(total.detach(), G[f"{case}.loss_total"], **VALUES)
        for kind, name in PUBLISHED.items():
            assert_close(parts[f"loss_{kind}"], G[f"{case}.loss_{name}"], **VALUES)
        assert_gradient(code.grad, G[f"{case}.grad_code"])
        assert_gradient(code_knn.grad, G[f"{case}.grad_code_pos"])
        code = G["code"].clone().requires_grad_()
        depthg.depth_loss(G["depth"], code, coords1, four("shift")[3], published=True).mean().backward()
        assert_gradient(code.grad, G[f"{case}.grad_code_depth"])


def test_farthest_points():
    size = G["feats"].shape[-2:]
    pooled = F.adaptive_avg_pool2d(G["depth"], size)
    assert_close(pooled, G["fps.depth_pooled"], **VALUES)
    points = depthg.point_cloud(pooled, published=True)
    assert_close(points, G["fps.points"], **VALUES)
    order = G["fps.order"]
    assert torch.equal(depthg.farthest_points(points, order.shape[1]), order)
    for name, coords in {"depth": "fps.coords1", "depth_pos": "fps.coords2"}.items():
        found = depthg.depth_coords(G[name], size, G[coords].shape[1], published=True)
        assert_close(found, G[coords], **VALUES)


def test_where_farthest_points_are_read():
    height, width = G["feats"].shape[-2:]
    index = torch.arange(height * width, dtype=torch.float).view(1, 1, height, width)
    coords = depthg.depth_coords(G["depth"], (height, width), G["fps.coords1"].shape[1], published=True)
    found = sample(index.expand(len(coords), -1, -1, -1), coords)
    assert_close(found, G["fps.index_map_sampled"], rtol=1e-4, atol=1e-5)


def test_every_array_is_replayed():
    assert not G.left_by(globals())
