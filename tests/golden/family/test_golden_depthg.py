"""The depth term's `published` form against DepthG's released numbers, with their defects."""

import pytest
import torch
import torch.nn.functional as F
from common import assert_gradient, golden_tensors
from torch.testing import assert_close

from stego_lib.loss import sample, stego_loss
from stego_lib.successors import depthg

G = golden_tensors("family/depthg")
VALUES = dict(rtol=1e-4, atol=1e-6)
# Our names of the three parts of STEGO's loss, in their order -> the released ones.
PARTS = {"self": "pos_intra", "knn": "pos_inter", "rand": "neg_inter"}
WEIGHTS, SHIFTS = (tuple(G[f"{name}_{kind}_f64"].item() for name in PARTS.values()) for kind in ("weight", "shift"))


def test_depth_correspondence():
    depth = depthg.depth_correspondence(G["depth_resized"], G["depth_resized"], published=True)
    assert_close(depth, G["depth_cd"], **VALUES)


@pytest.mark.parametrize("case", ["fps", "rand"])
def test_losses_and_gradients(case):
    coords1, coords2 = G[f"{case}.coords1"], G[f"{case}.coords2"]
    assert_close(sample(G["code"], coords1), G[f"{case}.sampled_code"], **VALUES)
    code, code_knn = (G[name].clone().requires_grad_() for name in ("code", "code_pos"))
    total, parts = stego_loss(G["feats"], G["feats_pos"], code, code_knn, coords1, coords2, G["perms"], WEIGHTS, SHIFTS)
    term = depthg.depth_loss(G["depth"], code, coords1, G["depth_feat_shift_f64"].item(), published=True).mean()
    assert_gradient(torch.autograd.grad(term, code, retain_graph=True)[0], G[f"{case}.grad_code_depth"])
    total = total + G["depth_feat_weight_f64"].item() * term
    total.backward()
    assert_close(total.detach(), G[f"{case}.loss_total"], **VALUES)
    assert_close(term.detach(), G[f"{case}.loss_depth"], **VALUES)
    for kind, name in PARTS.items():
        assert_close(parts[f"loss_{kind}"], G[f"{case}.loss_{name}"], **VALUES)
    assert_gradient(code.grad, G[f"{case}.grad_code"])
    assert_gradient(code_knn.grad, G[f"{case}.grad_code_pos"])


def test_farthest_points():
    size = tuple(G["feats"].shape[-2:])
    points = depthg.point_cloud(F.adaptive_avg_pool2d(G["depth"], size), published=True)
    assert_close(points, G["fps.points"], **VALUES)
    order = G["fps.order"]
    assert torch.equal(depthg.farthest_points(points, order.shape[1]), order)
    for name, coords in {"depth": "fps.coords1", "depth_pos": "fps.coords2"}.items():
        found = depthg.depth_coords(G[name], size, G[coords].shape[1], published=True)
        assert_close(found, G[coords], **VALUES)


def test_where_farthest_points_are_read():
    height, width = G["feats"].shape[-2:]
    numbers = torch.arange(height * width, dtype=torch.float).view(1, 1, height, width)
    read = sample(numbers.expand(len(G["depth"]), -1, -1, -1), G["fps.coords1"])
    assert_close(read, G["fps.index_map_sampled"], rtol=1e-4, atol=1e-5)
