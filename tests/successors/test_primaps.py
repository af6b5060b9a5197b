"""PriMaPs-EM against naive loops, and its trainer on the features of a run."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import tiny_experiment
from torch import Tensor
from torch.testing import assert_close

from stego_lib import StegoError, train
from stego_lib.successors import primaps

pytestmark = pytest.mark.usefixtures("few_samples")


@pytest.fixture
def feats() -> Tensor:
    """Features of an image with five parts and noise, (6, 5, 7)."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(5, 6, generator=generator)[torch.arange(35) * 5 // 35]
    return (parts + 0.2 * torch.randn(35, 6, generator=generator)).T.unflatten(1, (5, 7))


def test_masks_are_those_of_a_naive_loop(feats):
    patches = feats.flatten(1).T.double().numpy()
    unit = patches / np.linalg.norm(patches, axis=1, keepdims=True)
    free, expected = list(range(35)), []
    while 35 - len(free) < 0.95 * 35:
        inside = patches[free] - patches[free].mean(0)
        direction = np.linalg.svd(inside)[2][0]
        direction = direction if unit[free].sum(0) @ direction > 0 else -direction
        seed = max(free, key=lambda p: unit[p] @ direction)
        most = max(unit[p] @ unit[seed] for p in free)
        mask = {p: unit[p] @ unit[seed] / most for p in free if unit[p] @ unit[seed] >= 0.4 * most}
        expected.append([mask.get(p, 0.0) for p in range(35)])
        free = [p for p in free if p not in mask]
    assert len(expected) > 2
    assert_close(primaps.similarity_masks(feats).flatten(1), torch.tensor(expected).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("published", [False, True])
def test_patches_without_a_feature_do_not_hang(published):
    masks = primaps.similarity_masks(torch.zeros(4, 3, 3), published=published)
    assert not masks.any() and not masks.isnan().any()
    assert (primaps.mask_log_probabilities(masks).argmax(0) == 0).all(), "background"


@pytest.mark.parametrize("published", [False, True])
def test_focal_loss_is_that_of_a_naive_loop(published):
    generator = torch.Generator().manual_seed(0)
    logits, pseudo = torch.randn(2, 4, 3, 3, generator=generator), torch.randint(-1, 4, (2, 3, 3), generator=generator)
    probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
    weights = [(1 - probabilities[:, k].mean()) ** 2 for k in range(4)]
    terms = []
    for image, y, x in (pseudo >= 0).nonzero().tolist():
        k = int(pseudo[image, y, x])
        terms.append(-weights[k] * probabilities[image, k, y, x].log())
    assert 0 < len(terms) < 18
    expected = torch.stack(terms).sum() / (18 if published else len(terms))
    assert_close(primaps.focal_loss(logits, pseudo, published=published), expected)
    assert primaps.focal_loss(logits, torch.full_like(pseudo, -1), published=published) == 0


def test_prototypes_begin_with_principal_directions():
    scales = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    codes = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * scales + 7
    directions = primaps.principal_prototypes(codes, 3)
    expected = torch.linalg.svd(codes - codes.mean(0))[2][:3]
    assert_close((directions * expected).sum(1).abs(), torch.ones(3))
    assert (directions.amax(1) > -directions.amin(1)).all()
    with pytest.raises(StegoError, match="channels"):
        primaps.principal_prototypes(codes, 6)


def test_head_stays_as_the_run_left_it_and_its_clusters_begin_the_prototypes(scenes_root, backbone_file, tmp_path):
    source = train(tiny_experiment(scenes_root, backbone_file, probes="after", steps=2), runs_dir=tmp_path)
    changes = dict(method="primaps", probes="after", start_from=str(source.folder), lr_probes=1e-9, steps=3)
    runs = [
        train(tiny_experiment(scenes_root, backbone_file, dropout=dropout, **changes), runs_dir=tmp_path)
        for dropout in (0.0, 0.5)
    ]
    for name, value in runs[0].model.head.state_dict().items():
        assert torch.equal(value, source.model.head.state_dict()[name]), name
    directions = F.normalize(source.model.cluster_probe.clusters.detach(), dim=1)
    assert_close(runs[0].model.cluster_probe.clusters.detach(), directions, rtol=0, atol=1e-6)
    assert torch.equal(*(run.model.cluster_probe.clusters for run in runs)), "nothing drops out of a frozen head"
    assert len(list((tmp_path / "features").glob("masks-*.npy"))) == 1
    with pytest.raises(StegoError, match="head='nonlinear'"):
        train(tiny_experiment(scenes_root, backbone_file, method="primaps", probes="after"), runs_dir=tmp_path)


def test_em_starts_from_k_means_on_the_features(scenes_root, backbone_file, tmp_path):
    changes = dict(head="none", probes="after", steps=1)
    kmeans = train(tiny_experiment(scenes_root, backbone_file, **changes), runs_dir=tmp_path)
    changes |= dict(method="primaps", start_from=str(kmeans.folder), lr_probes=1e-9)
    run = train(tiny_experiment(scenes_root, backbone_file, **changes), runs_dir=tmp_path)
    assert (run.log["loss"] > 0).all(), "no first stage"
    expected = F.normalize(kmeans.model.cluster_probe.clusters.detach(), dim=1)
    assert_close(run.model.cluster_probe.clusters.detach(), expected, rtol=0, atol=1e-6)
