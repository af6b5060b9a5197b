"""HP against the released code's numbers: codes, local mix, positives, losses and gradients."""

import pytest
import torch
from common import assert_gradient, golden_tensors
from torch.testing import assert_close

from stego_lib.model import SegmentationHead
from stego_lib.successors import hp
from stego_lib.successors.base import unit_patches, update_ema

G = golden_tensors("family/hp")
VALUES = dict(rtol=1e-4, atol=1e-6)
PARTS = ("weight", "bias")
# End of the released names of layers -> ours.
LAYERS = {"1.0": "linear", "2.0": "nonlinear.0", "2.2": "nonlinear.2"}
COUNT, CHANNELS, *GRID = G["feats"].shape
CELLS = torch.arange(GRID[0] * GRID[1]).expand(COUNT, -1)


def head(kind: str, prefix: str = "net") -> SegmentationHead:
    """The head with stored weights: kind "cluster" or "ema_model"."""
    state = {
        f"{ours}.{part}": G[f"{prefix}.{kind}{theirs}.{part}"] for theirs, ours in LAYERS.items() for part in PARTS
    }
    net = SegmentationHead(CHANNELS, len(state["linear.bias"]), dropout=0.0)
    net.load_state_dict(state)
    return net


@torch.no_grad()
def test_codes_and_projections():
    for name, kind in {"code": "cluster", "code_ema": "ema_model"}.items():
        assert_close(head(kind)(G["feats"]), G[name], rtol=1e-4, atol=1e-5)
    project = torch.nn.Conv2d(*G["net.project.weight"].shape[::-1], 1)
    project.load_state_dict({"weight": G["net.project.weight"][..., None, None], "bias": G["net.project.bias"]})
    for name, code in {"z": "code", "z_local": "code_local"}.items():
        assert_close(unit_patches(project(G[code])), G[name], **VALUES)


def test_averaged_head():
    average = head("ema_model")
    update_ema(average, head("cluster"), hp.DECAY)
    for name, expected in head("ema_model", "net_after").state_dict().items():
        assert_close(average.state_dict()[name], expected, rtol=0, atol=1e-6)


def test_local_mix():
    weights = torch.stack([hp.attention_weights(one, tuple(GRID), G["sigma_f64"].item()) for one in G["attn"]])
    assert_close(hp.local_mix(G["code"], weights, CELLS)[..., 0], G["code_local"].flatten(2), **VALUES)


@pytest.mark.parametrize(("maps", "pool", "end"), [("feats", "pool_ag", ""), ("code_ema", "pool_sp", "_ema")])
def test_hidden_positives(maps, pool, end):
    patches = unit_patches(G[maps])
    assert_close(hp.thresholds(patches, G[pool]), G[f"threshold{end}"], **VALUES)
    positives = hp.hidden_positives(patches, G[f"threshold{end}"])
    assert torch.equal(positives.view_as(G[f"positives{end}"]), G[f"positives{end}"].bool())


@pytest.mark.parametrize(("case", "lam"), [("lam0", 0.0), ("lam05", 0.5), ("lam1", 1.0)])
def test_losses_and_gradients(case, lam):
    z, z_local = (G[name].clone().requires_grad_() for name in ("z", "z_local"))
    pools, negatives = (G["pool_ag"], G["pool_sp"]), G["negatives"].bool()
    loss, parts = hp.hp_loss(G["feats"], G["code_ema"], z, z_local, pools, negatives, lam, G["tau_f64"].item())
    loss.backward()
    assert_close(loss.detach(), G[f"{case}.loss"], **VALUES)
    for part in ("loss_global", "loss_local"):
        assert_close(parts[part], G[f"{case}.{part}_per_image"], **VALUES)
    assert_gradient(z.grad, G[f"{case}.grad_z"])
    assert_gradient(z_local.grad, G[f"{case}.grad_z_local"])
