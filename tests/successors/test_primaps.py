"""PriMaPs-EM against naive loops and invariances, and its trainer on tiny scenes."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import broken_off, few_samples, tiny_experiment
from torch import Tensor
from torch.testing import assert_close

from stego_lib import StegoError, evaluate, load_run, open_dataset, train
from stego_lib.successors import primaps


@pytest.fixture
def feats() -> Tensor:
    """Features of an image with five parts and noise, (6, 5, 7)."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(5, 6, generator=generator)[torch.arange(35) * 5 // 35]
    return (parts + 0.2 * torch.randn(35, 6, generator=generator)).T.unflatten(1, (5, 7))


# ---------------------------------------------------------------------------------------------- masks


def test_masks_are_found_as_a_naive_loop_finds_them(feats):
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
    found = primaps.similarity_masks(feats)
    assert len(expected) > 2
    assert_close(found.flatten(1), torch.tensor(expected).float(), rtol=1e-4, atol=1e-5)


def test_masks_do_not_overlap_and_cover_the_image(feats):
    for features in (feats, torch.randn(6, 9, 9, generator=torch.Generator().manual_seed(2))):
        inside = primaps.similarity_masks(features) > 0
        assert inside.sum(0).max() == 1 and inside.any(0).float().mean() >= 0.95
        assert inside.flatten(1).any(1).all()


def test_masks_do_not_depend_on_the_scale_or_on_a_rotation_of_the_channels(feats):
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    expected = primaps.similarity_masks(feats)
    assert_close(primaps.similarity_masks(5 * feats), expected)
    assert_close(primaps.similarity_masks(torch.einsum("ij,jhw->ihw", rotation, feats)), expected, rtol=1e-4, atol=1e-5)


def test_a_used_patch_is_a_seed_only_as_published():
    projection, unused = torch.tensor([0.0, -0.5, -0.2, 0.0]), torch.tensor([False, True, True, False])
    assert primaps.seed_patch(projection, unused) == 2 and primaps.seed_patch(projection, unused, published=True) == 0


@pytest.mark.parametrize("published", [False, True])
def test_patches_without_a_feature_do_not_hang(published):
    found = primaps.similarity_masks(torch.zeros(4, 3, 3), published=published)
    assert not found.any() and not found.isnan().any()
    assert primaps.mask_proposals(torch.zeros(4, 3, 3), (6, 6), published=published).eq(-1).all()


def test_the_median_is_numpys():
    maps = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0))
    padded = np.pad(maps.numpy(), ((0, 0), (1, 1), (1, 1)), mode="reflect")
    expected = [[[np.median(one[y : y + 3, x : x + 3]) for x in range(5)] for y in range(4)] for one in padded]
    assert_close(primaps.median(maps), torch.tensor(np.array(expected)))


def test_the_crf_moves_borders_of_masks_to_edges_of_the_image():
    feats = torch.tensor([[1.0, 0.0]]).T[..., None].repeat(1, 4, 4)
    feats[:, :, 2:] = feats[:, :, 2:].flip(0)
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 18:] = 255  # the grid has the border at 16
    assert (primaps.mask_proposals(feats, (32, 32))[0].diff() != 0).nonzero().item() == 15
    assert (primaps.mask_proposals(feats, (32, 32), image)[16].diff() != 0).nonzero().item() == 17


# ---------------------------------------------------------------------------------------------- prototypes


def test_pseudo_labels_are_the_mode_of_each_mask():
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(-1, 5, (3, 6, 7), generator=generator)
    classes = torch.randint(0, 4, (3, 6, 7), generator=generator)
    found = primaps.pseudo_labels(masks, classes, 4)
    for image in range(3):
        for mask in range(-1, 5):
            inside = masks[image] == mask
            counts = Counter(classes[image][inside].tolist())
            best = -1 if mask < 0 else min(c for c, n in counts.items() if n == max(counts.values()))
            assert (found[image][inside] == best).all()


@pytest.mark.parametrize("published", [False, True])
def test_focal_loss_is_that_of_a_naive_loop(published):
    generator = torch.Generator().manual_seed(0)
    logits, pseudo = torch.randn(2, 4, 3, 3, generator=generator), torch.randint(-1, 4, (2, 3, 3), generator=generator)
    probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
    weights = [(1 - probabilities[:, k].mean()) ** 2 for k in range(4)]
    terms = [
        -weights[k] * probabilities[image, k, y, x].log()
        for image in range(2) for y in range(3) for x in range(3) if (k := int(pseudo[image, y, x])) >= 0
    ]  # fmt: skip
    assert 0 < len(terms) < 18
    expected = torch.stack(terms).sum() / (18 if published else len(terms))
    assert_close(primaps.focal_loss(logits, pseudo, published=published), expected)


def test_focal_loss_without_a_pseudo_label_is_zero():
    assert primaps.focal_loss(torch.rand(1, 3, 2, 2), torch.full((1, 2, 2), -1)) == 0


def test_logits_of_prototypes_are_those_of_upsampled_codes():
    generator = torch.Generator().manual_seed(0)
    prototypes, code = (
        primaps.Prototypes(torch.randn(3, 5, generator=generator)),
        torch.randn(2, 5, 4, 4, generator=generator),
    )
    prototypes.lengths.data = torch.tensor([1.0, 2.0, -0.5])
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(5, 3, 1, bias=False))
    layer.parametrizations.weight.original0.data = prototypes.lengths.data.view(3, 1, 1, 1).clone()
    layer.parametrizations.weight.original1.data = prototypes.directions.data.view(3, 5, 1, 1).clone()
    expected = layer(F.interpolate(code, (9, 11), mode="bilinear"))
    assert_close(prototypes(code, (9, 11)), expected, rtol=1e-4, atol=1e-5)


def test_prototypes_begin_with_principal_directions():
    codes = (
        torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]) + 7
    )
    found = primaps.principal_prototypes(codes, 3)
    expected = torch.linalg.svd(codes - codes.mean(0))[2][:3]
    assert_close((found * expected).sum(1).abs(), torch.ones(3))
    rotated = primaps.principal_prototypes(codes.flip(1), 3)  # whose decomposition may have other signs
    assert (found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all() and (
        rotated.amax(1) > -rotated.amin(1)
    ).all()
    with pytest.raises(StegoError, match=r"codes of 5 channels have no 6 principal directions"):
        primaps.principal_prototypes(codes, 6)


def test_the_teacher_is_the_mean_of_its_students_until_the_decay_is_full():
    """After update k it is the mean of students 2 to k, where the first of these counts twice; then it forgets."""
    values = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student, teacher = (primaps.Prototypes(torch.zeros(1, 1, dtype=torch.float64)) for _ in range(2))
    for update, value in enumerate(values, 1):
        student.directions.data.fill_(value)
        primaps.update_teacher(teacher, student, update)
        if update > 1:
            assert_close(teacher.directions.item(), ((values[1] + values[1:update].sum()) / update).item())
    assert primaps.ema_decay(49) < primaps.ema_decay(50) == primaps.ema_decay(1000) == 0.98


# ---------------------------------------------------------------------------------------------- training


@pytest.fixture
def raw(scenes_root, backbone_file):
    """An experiment on raw features: 12 steps, the first 4 of them for the first stage, and one update of the teacher every other."""
    return tiny_experiment(
        scenes_root, backbone_file, method="primaps", head="none", probes="after", dropout=0.0, steps=12
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    few_samples(monkeypatch)
    monkeypatch.setattr(primaps, "EMA_EVERY", 2)


def stego_run(scenes_root, backbone_file, runs_dir):
    return train(tiny_experiment(scenes_root, backbone_file, probes="after", steps=2), runs_dir=runs_dir)


@pytest.mark.parametrize("head", ["raw", "stego"])
def test_a_run_trains_resumes_is_scored_and_predicts(raw, head, scenes_root, backbone_file, tmp_path, monkeypatch):
    experiment = raw
    if head == "stego":
        source = stego_run(scenes_root, backbone_file, tmp_path / "source")
        experiment = raw.but(head="nonlinear", dropout=0.5, start_from=str(source.folder))
    expected = train(experiment, runs_dir=tmp_path / "straight")
    for after in (3, 9):  # in the first stage, and behind it
        broken_off(experiment, tmp_path / f"broken{after}", monkeypatch, after)
        resumed = train(experiment, runs_dir=tmp_path / f"broken{after}", resume=True)
        for name, value in resumed.model.state_dict().items():
            assert torch.equal(value, expected.model.state_dict()[name]), name
        assert list(resumed.log.columns) == ["loss", "confidence", "clusters"] and len(resumed.log) == 12
    lengths = expected.model.cluster_probe.clusters.norm(dim=1)
    assert (lengths - 1).abs().max() > 1e-3, "lengths are trained"
    record = evaluate(load_run(expected.folder), baselines=False)
    assert record["step"] == 12 and 0 <= record["scores"]["cluster"]["miou"] <= 100
    image = open_dataset("scenes", scenes_root, "val").images[0]
    assert load_run(expected.folder).predict(image).shape == (64, 64)


def test_the_head_stays_as_the_run_left_it_and_its_clusters_begin_the_prototypes(
    raw, scenes_root, backbone_file, tmp_path
):
    source = stego_run(scenes_root, backbone_file, tmp_path)
    run = train(
        raw.but(head="nonlinear", dropout=0.5, start_from=str(source.folder), lr_probes=1e-9), runs_dir=tmp_path
    )
    for name, value in run.model.head.state_dict().items():
        assert torch.equal(value, source.model.head.state_dict()[name]), name
    directions = F.normalize(source.model.cluster_probe.clusters.detach(), dim=1)
    assert_close(run.model.cluster_probe.clusters.detach(), directions, rtol=0, atol=1e-6)


def test_a_head_of_random_weights_is_refused(raw, tmp_path):
    with pytest.raises(StegoError, match=r"head='linear' has random weights; take head='none', or start_from=RUN"):
        train(raw.but(head="linear"), runs_dir=tmp_path)


def test_stored_masks_are_the_proposals_of_each_image(raw, scenes_root, tmp_path):
    train(raw.but(steps=1), runs_dir=tmp_path)
    (path,) = (tmp_path / "features").glob("masks-*.npy")
    stored = np.load(path)
    (store,) = (tmp_path / "features").glob("scenes-train-*")
    features, images = np.load(store / "features.npy"), np.load(store / "images.npy")
    assert stored.shape == (12, 64, 64) and len(np.unique(stored)) > 2
    for feats, image, masks in zip(features, images, stored, strict=True):
        expected = primaps.mask_proposals(torch.from_numpy(feats).float(), (64, 64), image.transpose(1, 2, 0).copy())
        assert (expected.numpy() == masks).mean() > 0.999  # rounding moves pixels on a border
    before = path.stat().st_mtime_ns
    train(raw.but(steps=1, seed=1), runs_dir=tmp_path)
    assert path.stat().st_mtime_ns == before and len(list((tmp_path / "features").glob("masks-*"))) == 1


def test_features_computed_at_every_step_give_the_same_run(raw, tmp_path):
    runs = [train(raw.but(feature_store=kind), runs_dir=tmp_path / kind) for kind in ("store", "online")]
    stored = [np.load(next((tmp_path / kind / "features").glob("masks-*"))) for kind in ("store", "online")]
    assert (stored[0] == stored[1]).mean() > 0.999
    assert_close(*(run.model.cluster_probe.clusters for run in runs), rtol=0, atol=1e-2)


def test_nothing_drops_out_of_the_frozen_head(raw, scenes_root, backbone_file, tmp_path):
    source = stego_run(scenes_root, backbone_file, tmp_path)
    kept = raw.but(head="nonlinear", start_from=str(source.folder))
    runs = [train(kept.but(dropout=dropout), runs_dir=tmp_path) for dropout in (0.0, 0.5)]
    assert torch.equal(*(run.model.cluster_probe.clusters for run in runs))
