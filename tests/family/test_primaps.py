"""PriMaPs-EM: masks, votes and the focal loss by naive loops, and a run that sits on STEGO's code."""

import numpy as np
import pytest
import torch
from common import few_samples, tiny_experiment

from stego_lib import StegoError, train
from stego_lib.experiment import SUCCESSORS
from stego_lib.family import primaps

GENERATOR = torch.Generator().manual_seed(0)


def test_masks_share_out_the_patches():
    """Three kinds of patches: a mask each, no patch in two, nearly all in one."""
    kinds = torch.eye(3, 8)[torch.tensor([0, 0, 1, 1, 2, 2]).repeat(4, 1)]
    feats = (kinds + 0.02 * torch.randn(4, 6, 8, generator=GENERATOR)).permute(2, 0, 1)
    found = primaps.similarity_masks(feats) > 0
    assert len(found) == 3 and (found.sum(0) <= 1).all() and found.any(0).float().mean() >= 0.95
    for mask in found:
        assert len({int(column) // 2 for column in mask.nonzero()[:, 1]}) == 1, "one kind a mask"


def test_every_mask_takes_the_class_of_most_of_its_pixels():
    masks = torch.randint(-1, 5, (2, 7, 9), generator=GENERATOR)
    classes = torch.randint(0, 4, (2, 7, 9), generator=GENERATOR)
    found = primaps.pseudo_labels(masks, classes, 4)
    for image, own, result in zip(masks, classes, found, strict=True):
        for number in range(5):
            counts = [int(((image == number) & (own == label)).sum()) for label in range(4)]
            assert (result[image == number] == int(np.argmax(counts))).all()
        assert (result[image < 0] == -1).all()


def test_the_focal_loss_is_a_naive_loop():
    logits, pseudo = torch.randn(2, 3, 4, 5, generator=GENERATOR), torch.randint(-1, 3, (2, 4, 5), generator=GENERATOR)
    probabilities = logits.softmax(1)
    weights = [(1 - float(probabilities[:, label].mean())) ** 2 for label in range(3)]
    terms = [
        -weights[int(pseudo[b, y, x])] * float(probabilities[b, pseudo[b, y, x], y, x].log())
        for b in range(2)
        for y in range(4)
        for x in range(5)
        if pseudo[b, y, x] >= 0
    ]
    assert primaps.focal_loss(logits, pseudo) == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    assert primaps.focal_loss(logits, pseudo, published=True) == pytest.approx(sum(terms) / pseudo.numel(), rel=1e-4)
    assert primaps.focal_loss(logits, torch.full_like(pseudo, -1)) == 0


def test_the_head_of_a_run_stays_as_it_is(scenes_root, backbone_file, tmp_path, monkeypatch):
    few_samples(monkeypatch)
    stego = train(tiny_experiment(scenes_root, backbone_file, probes="after", code_dim=8), runs_dir=tmp_path)
    changes = SUCCESSORS["primaps"] | {"head": stego.experiment.head, "code_dim": 8}
    asked = tiny_experiment(scenes_root, backbone_file, method="primaps", **changes, steps=4)
    with pytest.raises(StegoError, match="start_from=RUN"):
        train(asked, runs_dir=tmp_path)
    run = train(asked.but(start_from=str(stego.folder)), runs_dir=tmp_path)
    for name, value in stego.model.head.state_dict().items():
        assert torch.equal(value, run.model.head.state_dict()[name]), name
    assert not torch.equal(run.model.cluster_probe.clusters, stego.model.cluster_probe.clusters)
