"""HP against the released code's numbers: every array of tests/golden/family/hp.npz.

Replayed: code, code_ema, code_aug and the head's weights net.*; net_after.* (the averaged head after its update); z, z_aug,
z_local; code_local from attn and sigma, with index_mask and neighbours; threshold and threshold_ema with both pools; positives,
positives_ema, denominator from negatives; of lam0, lam05, lam1 and norew the loss, both losses of each image, anchor_weight and
both gradients; loss_consistency; lam05.loss_total and lam05.grad_total.*.
"""

import pytest
import torch
from common import golden_tensors
from torch import Tensor
from torch.testing import assert_close

from stego_lib.model import SegmentationHead
from stego_lib.successors import hp

G = golden_tensors("family/hp")
VALUES = dict(rtol=1e-4, atol=1e-6)
PARTS = ("weight", "bias")
LAYERS = {"1.0": "linear", "2.0": "nonlinear.0", "2.2": "nonlinear.2"}
"""The end of the published names of layers -> ours."""
CASES = {"lam0": (0.0, True), "lam05": (0.5, True), "lam1": (1.0, True), "norew": (0.5, False)}


NAMES = {
    *("feats", "feats_aug", "attn", "pool_ag", "pool_sp", "negatives", "tau_f64", "rho_f64", "sigma_f64", "ema_m_f64"),
    *("code", "code_ema", "code_aug", "code_local", "index_mask", "neighbours", "z", "z_aug", "z_local"),
    *(
        "threshold",
        "threshold_ema",
        "positives",
        "positives_ema",
        "denominator",
        "loss_consistency",
        "lam05.loss_total",
    ),
    *(
        f"net{head}{layer}.{part}"
        for head in (".cluster", ".ema_model", "_after.ema_model")
        for layer in LAYERS
        for part in PARTS
    ),
    *(f"lam05.grad_total.cluster{layer}.{part}" for layer in LAYERS for part in PARTS),
    *(f"{name}.project.{part}" for name in ("net", "lam05.grad_total") for part in PARTS),
    *(f"{case}.{name}" for case in CASES for name in ("loss", "grad_z", "grad_z_local", "anchor_weight")),
    *(f"{case}.loss_{part}_per_image" for case in CASES for part in ("global", "local")),
}
"""What the tests of this file look up."""
COUNT, CHANNELS, *GRID = G["feats"].shape
CELLS = GRID[0] * GRID[1]
TAU, SIGMA, DECAY = (G[name].item() for name in ("tau_f64", "sigma_f64", "ema_m_f64"))


def assert_gradient(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def head(kind: str, prefix: str = "net") -> SegmentationHead:
    """The head with stored weights: kind "cluster" or "ema_model"."""
    state = {
        f"{ours}.{part}": G[f"{prefix}.{kind}{theirs}.{part}"] for theirs, ours in LAYERS.items() for part in PARTS
    }
    found = SegmentationHead(CHANNELS, len(state["linear.bias"]), dropout=0.0)
    found.load_state_dict(state)
    return found


def project() -> torch.nn.Linear:
    weight = G["net.project.weight"]
    layer = torch.nn.Linear(*weight.shape[::-1])
    layer.load_state_dict({"weight": weight, "bias": G["net.project.bias"]})
    return layer


def projected(layer: torch.nn.Linear, code: Tensor) -> Tensor:
    return hp.unit_patches(layer(code.movedim(1, -1)).movedim(-1, 1))


def of_images(function) -> Tensor:
    """What `function` gives for the anchors of each image, stacked."""
    return torch.stack([function(anchors) for anchors in torch.arange(COUNT * CELLS).split(CELLS)])


@torch.no_grad()
def test_codes_and_projections():
    codes = {
        "code": head("cluster")(G["feats"]),
        "code_aug": head("cluster")(G["feats_aug"]),
        "code_ema": head("ema_model")(G["feats"]),
    }
    for name, code in codes.items():
        assert_close(code, G[name], rtol=1e-4, atol=1e-5)
    for name, code in (("z", "code"), ("z_aug", "code_aug"), ("z_local", "code_local")):
        assert_close(projected(project(), G[code]), G[name], **VALUES)


def test_the_averaged_head_moves_after_its_code_was_taken():
    average = head("ema_model")
    hp.update_ema(average, head("cluster"), DECAY)
    for name, expected in head("ema_model", "net_after").state_dict().items():
        assert_close(average.state_dict()[name], expected, rtol=0, atol=1e-6)
    assert DECAY == hp.DECAY


def test_local_mix():
    weights = hp.attention_weights(G["attn"], (GRID[0], GRID[1]), SIGMA)
    assert_close(hp.local_mix(G["code"], weights), G["code_local"], **VALUES)


def test_neighborhoods_of_the_mix():
    one_hot = torch.eye(CELLS).view(1, CELLS, *GRID)
    taken = hp.local_mix(one_hot, torch.ones(1, 9, *GRID)).flatten(2)[0]
    assert_close(taken.T, G["index_mask"].float(), rtol=0, atol=0)
    # Flat attention is nowhere below its mean, so weights are sigma / cells / neighbors.
    flat = hp.attention_weights(torch.full_like(G["attn"][:1], 0.125), (GRID[0], GRID[1]), float(CELLS))
    assert_close(1 / flat[0, 4].flatten(), G["neighbours"].float())


def test_thresholds():
    assert_close(hp.thresholds(hp.unit_patches(G["feats"]), G["pool_ag"]), G["threshold"], **VALUES)
    assert_close(hp.thresholds(hp.unit_patches(G["code_ema"]), G["pool_sp"]), G["threshold_ema"], **VALUES)


def test_masks():
    for maps, limits, name in (("feats", "threshold", "positives"), ("code_ema", "threshold_ema", "positives_ema")):
        units = hp.unit_patches(G[maps])
        found = of_images(lambda anchors, units=units, limits=limits: hp.hidden_positives(units, G[limits], anchors))
        assert torch.equal(found, G[name].bool())
    allowed = [
        hp.denominator(p.bool(), G["negatives"].bool(), a)
        for p, a in zip(G["positives"], torch.arange(COUNT * CELLS).split(CELLS), strict=True)
    ]
    assert torch.equal(torch.stack(allowed), G["denominator"].bool())
    assert G["negatives"].double().mean().item() == pytest.approx(G["rho_f64"].item(), rel=0.2)


@pytest.mark.parametrize("case", CASES)
def test_anchor_weights(case):
    lam, reweight = CASES[case]
    for positives, positives_ema, expected in zip(
        G["positives"].bool(), G["positives_ema"].bool(), G[f"{case}.anchor_weight"], strict=True
    ):
        counts = hp.anchor_weights(hp.pair_weights(positives, positives_ema, lam), reweight=reweight)
        assert_close(counts / counts[counts > 0].mean(), expected, **VALUES)


def loss_of(case: str, z: Tensor, z_local: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    lam, reweight = CASES[case]
    pools = G["pool_ag"], G["pool_sp"]
    return hp.hp_loss(G["feats"], G["code_ema"], z, z_local, pools, G["negatives"].bool(), lam, TAU, reweight=reweight)


@pytest.mark.parametrize("chunk", [hp.CHUNK, 5 * COUNT * CELLS], ids=["at once", "five anchors at a time"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(case, chunk, monkeypatch):
    monkeypatch.setattr(hp, "CHUNK", chunk)
    z, z_local = (G[name].clone().requires_grad_() for name in ("z", "z_local"))
    loss, parts = loss_of(case, z, z_local)
    loss.backward()
    assert_close(loss.detach(), G[f"{case}.loss"], **VALUES)
    for part in ("loss_global", "loss_local"):
        assert_close(parts[part], G[f"{case}.{part}_per_image"], **VALUES)
    assert_gradient(z.grad, G[f"{case}.grad_z"])
    assert_gradient(z_local.grad, G[f"{case}.grad_z_local"])


def test_consistency():
    assert_close(hp.consistency_loss(G["z"], G["z_aug"]), G["loss_consistency"], **VALUES)


def test_total_and_gradients_of_head_and_projection():
    net, layer = head("cluster"), project()
    weights = hp.attention_weights(G["attn"], (GRID[0], GRID[1]), SIGMA)
    code, augmented = net(G["feats"]), net(G["feats_aug"])
    z, z_aug, z_local = (projected(layer, c) for c in (code, augmented, hp.local_mix(code, weights)))
    total = loss_of("lam05", z, z_local)[0] + hp.CONSISTENCY_WEIGHT * hp.consistency_loss(z, z_aug)
    total.backward()
    assert_close(total.detach(), G["lam05.loss_total"], **VALUES)
    parameters = dict(net.named_parameters())
    for part in PARTS:
        assert_gradient(getattr(layer, part).grad, G[f"lam05.grad_total.project.{part}"])
        for theirs, ours in LAYERS.items():
            assert_gradient(parameters[f"{ours}.{part}"].grad, G[f"lam05.grad_total.cluster{theirs}.{part}"])


def test_every_array_is_replayed():
    assert set(G) == NAMES
