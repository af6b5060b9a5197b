"""Ten training steps against the published code's numbers: losses, code correspondences and the weights at the end."""

import pytest
import torch
from common import golden_tensors
from torch.testing import assert_close

from stego_lib import Experiment
from stego_lib.batches import Batch
from stego_lib.model import Stego
from stego_lib.training import make_optimizer, train_step

G = golden_tensors("trajectory")
# The published names of layers and of the three kinds of pairs -> ours.
LAYERS = {
    "net.cluster1.0": "head.linear",
    "net.cluster2.0": "head.nonlinear.0",
    "net.cluster2.2": "head.nonlinear.2",
    "linear_probe": "linear_probe.classifier",
}
KINDS = {"self": "pos_intra", "knn": "pos_inter", "rand": "neg_inter"}


def weights(when: str) -> dict[str, torch.Tensor]:
    """All weights, under our names, `when` = 'init' or 'final'."""
    named = {
        f"{ours}.{part}": G[f"{when}.{theirs}.{part}"] for theirs, ours in LAYERS.items() for part in ("weight", "bias")
    }
    return named | {"cluster_probe.clusters": G[f"{when}.cluster_probe.clusters"]}


@pytest.fixture(scope="module")
def replayed() -> tuple[Stego, list[dict[str, float]]]:
    """The model after the ten steps, and the values of each step."""
    experiment = Experiment(
        code_dim=10, batch_size=4, dropout=0.0, official={"extra_clusters": int(G["extra_clusters"])},
        points=int(G["feature_samples"]), negatives=int(G["neg_samples"]),
        weights=tuple(G[f"w_{name}_weight_f64"].item() for name in KINDS.values()),
        shifts=tuple(G[f"w_{name}_shift_f64"].item() for name in KINDS.values()),
        centering=True, lr_head=5e-4, lr_probes=5e-3,
    )  # fmt: skip
    assert experiment.lr_head == pytest.approx(G["lr_net"].item()) and experiment.lr_probes == pytest.approx(
        G["lr_probes"].item()
    )
    model = Stego(
        32, 10, int(G["n_classes"]), dropout=experiment.dropout, extra_clusters=experiment.official.extra_clusters
    )
    model.load_state_dict(weights("init") | {"feature_mean": model.feature_mean})
    optimizer = make_optimizer(model, experiment)
    values = []
    for coords1, coords2, permutations in zip(G["coords1"], G["coords2"], G["perms"], strict=True):
        batch = Batch(G["feats"], G["feats_pos"], coords1, coords2, permutations, G["label"])
        values.append(train_step(model, optimizer, batch, experiment, experiment.shifts))
    return model, values


@pytest.mark.parametrize("ours, published", [
    ("loss", "loss_total"), ("loss_cluster", "loss_cluster"), ("loss_linear", "loss_linear"),
    *[(f"loss_{kind}", f"loss_{name}") for kind, name in KINDS.items()],
    *[(f"code_{kind}", f"cd_{name}") for kind, name in KINDS.items()],
])  # fmt: skip
def test_values_of_every_step(replayed, ours, published):
    found = torch.tensor([values[ours] for values in replayed[1]])
    assert len(found) == 10
    assert_close(found, G[f"log.{published}"], rtol=1e-5, atol=1e-5)


def test_final_weights(replayed):
    state = replayed[0].state_dict()
    for name, expected in weights("final").items():
        assert (expected - weights("init")[name]).abs().max() > 1e-3, f"{name} is meant to have moved"
        assert_close(state[name], expected, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@torch.inference_mode()
def test_final_code(replayed):
    assert_close(replayed[0].eval()(G["feats"]), G["final_code"], rtol=1e-4, atol=2e-5)
