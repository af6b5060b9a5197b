"""What `published=True` changes in training and evaluation, and the optional terms of the authors' step."""

import numpy as np
import pytest
import torch
from common import golden, golden_tensors, tiny_experiment
from torch.testing import assert_close

from stego_lib import batches, evaluate, evaluation, load_run, train, training
from stego_lib.datasets import open_training_set
from stego_lib.features import open_features
from stego_lib.loss import published_permutation
from stego_lib.metrics import published_map
from stego_lib.model import build_model
from stego_lib.neighbors import nearest_neighbors
from stego_lib.official import alignment_loss, reconstruction_loss, view_coords

pytestmark = pytest.mark.usefixtures("few_samples")

CLOSE = dict(rtol=1e-4, atol=1e-5)
PUBLISHED = dict(official={"published": True})
WEIGHTS = {"rec_weight": "loss_rec", "crf_weight": "loss_crf", "aug_alignment_weight": "loss_aug"}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def experiment(scenes_root, backbone_file):
    return tiny_experiment(scenes_root, backbone_file, steps=2, dropout=0.5, shifts=(0.1, 0.1, 0.1))


@pytest.fixture(scope="module")
def features(experiment, backbone, tmp_path_factory):
    return open_features(open_training_set(experiment), backbone, 64, tmp_path_factory.mktemp("features"))


def model_and_batch(features, backbone, experiment):
    model = build_model(experiment, 32, 8)
    neighbors = nearest_neighbors(features.pooled, 2)
    return model, batches.draw_batch(features, neighbors, model, experiment, 0, backbone)


def one_step(model, batch, experiment) -> dict[str, float]:
    optimizer = training.make_optimizer(model, experiment)
    return training.train_step(model, optimizer, batch, experiment, (0.1, 0.1, 0.1))


def test_published_partners_are_fixed_points_moved_on_by_one(features, backbone, experiment):
    for seed in range(50):
        drawn = torch.randperm(6, generator=torch.Generator().manual_seed(seed)).tolist()
        expected = [(partner + 1) % 6 if partner == own else partner for own, partner in enumerate(drawn)]
        assert published_permutation(6, torch.Generator().manual_seed(seed)).tolist() == expected
    draws = golden_tensors("correlation_loss")["super_perm_examples_4"]
    ours = {tuple(published_permutation(4, torch.Generator().manual_seed(i)).tolist()) for i in range(3000)}
    assert {tuple(row) for row in draws.tolist()} <= ours
    by_mode = [
        {len(partners.unique()) for seed in range(20) for partners in drawn.permutations}
        for changes in ({}, PUBLISHED)
        for seed in range(20)
        for drawn in [model_and_batch(features, backbone, experiment.but(seed=seed, **changes))[1]]
    ]
    assert set().union(*by_mode[:20]) == {4} and min(set().union(*by_mode[20:])) < 4


@pytest.mark.parametrize("published", [False, True])
def test_the_published_target_drops_channels_by_a_mask_of_its_own(
    features, backbone, experiment, monkeypatch, published
):
    changed = experiment.but(official={"published": published})
    model, batch = model_and_batch(features, backbone, changed)
    masks, targets, loss = [], [], training.stego_loss
    model.head.dropout.register_forward_hook(lambda _, inputs, output: masks.append(output == 0))
    monkeypatch.setattr(training, "stego_loss", lambda *a, **k: (targets.extend(a[:2]), loss(*a, **k))[1])
    one_step(model, batch, changed)
    assert len(masks) == (6 if published else 4) == len({tuple(mask.flatten().tolist()) for mask in masks})
    for clean, target in zip((batch.feats, batch.feats_knn), targets, strict=True):
        ratio = (target / clean).flatten(2)
        assert torch.equal(ratio.amax(2) == 0, ratio.amin(2) == 0), "whole channels"
        assert ((ratio == 0).any().item(), torch.equal(target, clean)) == (published, not published)


def test_published_neighbors_come_from_noisy_features(features, experiment):
    model = build_model(experiment, 32, 8)
    clean = nearest_neighbors(features.pooled, 2)
    assert torch.equal(batches.find_neighbors(features, model, experiment), clean)
    state = torch.get_rng_state()
    noisy = batches.find_neighbors(features, model, experiment.but(**PUBLISHED))
    assert torch.equal(torch.get_rng_state(), state) and not torch.equal(noisy, clean)
    assert torch.equal(batches.find_neighbors(features, model, experiment.but(**PUBLISHED)), noisy), "by the seed"
    assert torch.equal(batches.find_neighbors(features, model, experiment.but(dropout=0.0, **PUBLISHED)), clean)


def test_images_are_resized_as_published_in_training_evaluation_and_prediction(experiment, tmp_path):
    """The stored images differ, and so does what is predicted at another size."""
    runs = [
        train(experiment.but(steps=1, train_size=40, eval_size=48, **changes), runs_dir=tmp_path)
        for changes in ({}, PUBLISHED)
    ]
    records = [evaluate(run, baselines=False) for run in runs]
    assert records[0]["confusion"] != records[1]["confusion"]
    other = load_run(runs[0].folder, **PUBLISHED)
    image = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    assert (other.predict(image) != runs[0].predict(image)).any()


@pytest.mark.parametrize("published", [False, True])
def test_extra_clusters_are_counted_or_dropped(experiment, tmp_path, published):
    official = {"extra_clusters": 6, "published": published}
    table = np.array(evaluate(train(experiment.but(steps=1, official=official), runs_dir=tmp_path))["confusion"])
    assert table.shape == (14, 8) and (table[8:].sum() == 0) == published
    assert (table.sum() < 6 * 64 * 64) == published, "pixels of extra clusters are errors, or they do not count"


@pytest.mark.parametrize("published", [False, True])
def test_scores_record_and_predictions_use_the_published_map(experiment, tmp_path, monkeypatch, published):
    """Given a matching in which the map is off: a cluster without a class that is not the last."""
    matching = torch.tensor([2, -1, 0, 1, 3, 4, 5, 6, 7])
    monkeypatch.setattr(evaluation, "match", lambda table: matching)
    run = train(experiment.but(steps=1, official={"extra_clusters": 1, "published": published}), runs_dir=tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    clusters = run.predict(image)
    expected = published_map(matching) if published else matching
    record = evaluate(run, baselines=False)
    assert record["matching"] == expected.tolist() and sum(record["confusion"][1]) > 0
    iou = np.array(record["scores"]["cluster"]["iou"], float)
    known = np.count_nonzero(~np.isnan(iou)) + published  # "no class" counts as a class of IoU 0
    assert record["scores"]["cluster"]["miou"] == pytest.approx(np.nansum(iou) / known)
    ids = torch.where(expected < 0, 8, expected)  # the cluster without a class comes after the eight classes
    np.testing.assert_array_equal(run.predict(image), ids[clusters.astype(int)])


def test_the_published_map_of_clusters_is_one_place_off():
    arrays, differing = golden("metrics"), 0
    for name in {key.split(".")[0] for key in arrays}:
        if f"{name}.map_clusters_ideal" in arrays:
            ideal, theirs = arrays[f"{name}.map_clusters_ideal"], arrays[f"{name}.map_clusters"]
            np.testing.assert_array_equal(published_map(ideal), theirs)
            differing += not np.array_equal(ideal, theirs)
    assert differing and published_map([2, -1, 0, 1]).tolist() == [2, 0, -1, 1]


def test_reconstruction_is_minus_the_mean_cosine():
    feats, rebuilt = rand(2, 5, 3, 4), rand(2, 5, 3, 4, seed=1)
    pairs = zip(feats.movedim(1, -1).reshape(-1, 5), rebuilt.movedim(1, -1).reshape(-1, 5), strict=True)
    cosines = [float(a @ b / a.norm() / b.norm()) for a, b in pairs]
    assert reconstruction_loss(feats, rebuilt).item() == pytest.approx(-sum(cosines) / len(cosines), abs=1e-5)


@pytest.mark.parametrize("key, name", WEIGHTS.items())
def test_an_optional_term_joins_the_loss_by_its_weight_and_shapes_the_head(
    experiment, features, backbone, tmp_path, key, name
):
    changed = experiment.but(official={key: 0.25})
    run = train(changed, runs_dir=tmp_path)
    log = run.log
    parts = log.loss_cluster + log.loss_linear + 0.25 * log[name]
    parts += sum(w * log[f"loss_{kind}"] for w, kind in zip(experiment.weights, ("self", "knn", "rand"), strict=True))
    np.testing.assert_allclose(log.loss, parts, rtol=1e-4)
    assert (log[name] != 0).all() and not set(WEIGHTS.values()) - {name} & set(log.columns)
    assert load_run(run.folder).predict(np.zeros((64, 64, 3), np.uint8)).shape == (64, 64)
    gradients, drawn = [], []
    for one in (experiment.but(dropout=0.0), changed.but(dropout=0.0)):
        model, batch = model_and_batch(features, backbone, one)
        one_step(model, batch, one)
        gradients.append(model.head.linear.weight.grad)
        drawn.append(vars(batch))
    assert not torch.allclose(*gradients)
    assert all(torch.equal(value, drawn[1][key]) for key, value in drawn[0].items() if value is not None)


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_image_at_the_coordinates_is_the_view(mirrored):
    """An image that says where it is: each pixel's color is its place."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing="ij")
    code = torch.stack([y, x, torch.ones_like(x)])[None]
    view = torch.nn.functional.interpolate(code[:, :, 1:7, 2:11], (8, 12), mode="bilinear", align_corners=False)
    view = view.flip(-1) if mirrored else view
    coords = view_coords((1, 2, 6, 9), mirrored, (8, 12), (8, 12))[None]
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))  # at the border the crop's own edge is repeated
    looked_up = torch.nn.functional.grid_sample(code, coords, padding_mode="border", align_corners=True)
    assert_close(looked_up[inner], view[inner], **CLOSE)
    assert_close(alignment_loss(code, looked_up, coords), torch.tensor(-1.0), **CLOSE)


def test_a_horizontal_mirror_aligns_with_the_image_and_in_published_mode_with_the_wrong_axis():
    code = rand(2, 6, 5, 5)
    coords = view_coords((0, 0, 40, 40), True, (40, 40), (5, 5)).expand(2, -1, -1, -1)
    assert_close(alignment_loss(code, code.flip(-1), coords), torch.tensor(-1.0), **CLOSE)
    assert alignment_loss(code, code.flip(-1), coords, published=True) > -0.5
    # The published lookup takes rows for columns: it finds the mirror image turned over the diagonal.
    turned = code.flip(-1).transpose(2, 3)
    assert_close(alignment_loss(code, turned, coords, published=True), torch.tensor(-1.0), **CLOSE)
    with pytest.raises(ValueError, match="square grids"):
        alignment_loss(rand(1, 3, 2, 4), rand(1, 3, 2, 4), coords, published=True)


def test_a_run_on_keys_of_an_earlier_block_loads_as_such(experiment, tmp_path):
    run = train(experiment.but(steps=1, official={"keys": True, "block": -2}), runs_dir=tmp_path)
    again = load_run(run.folder)
    assert again.backbone.block == 0 and again.backbone.fingerprint() == run.backbone.fingerprint()
