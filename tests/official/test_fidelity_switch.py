"""What `published=True` changes in training and evaluation, and the optional terms of the published step."""

import numpy as np
import pytest
import standins
import torch
from common import golden, golden_tensors, tiny_experiment
from torch.testing import assert_close

from stego_lib import (
    Experiment,
    Run,
    StegoError,
    baselines,
    batches,
    evaluate,
    evaluation,
    load_run,
    probes,
    train,
    training,
)
from stego_lib import run as running
from stego_lib.backbone import Backbone
from stego_lib.datasets import open_split, open_training_set
from stego_lib.features import open_features, source
from stego_lib.loss import negative_permutation, published_permutation
from stego_lib.metrics import published_map
from stego_lib.model import Stego
from stego_lib.neighbors import nearest_neighbors
from stego_lib.official import terms
from stego_lib.official import alignment_loss, image_crf_loss, reconstruction_loss
from stego_lib.official.views import augmented_views, view_coords

CLOSE = dict(rtol=1e-4, atol=1e-5)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def experiment(scenes_root, backbone_file):
    return tiny_experiment(scenes_root, backbone_file, steps=2, dropout=0.5, shifts=(0.1, 0.1, 0.1))


@pytest.fixture(scope="module")
def backbone(experiment) -> Backbone:
    return Backbone.of(experiment)


@pytest.fixture(scope="module")
def store(experiment, backbone, tmp_path_factory):
    return open_features(open_training_set(experiment), backbone, 64, tmp_path_factory.mktemp("features"))


def model_and_batch(store, backbone, experiment, step: int = 0):
    model = training.build_model(experiment, 32, 8)
    neighbors = nearest_neighbors(store.pooled, 2)
    return model, batches.draw_batch(store, neighbors, model, experiment, step, backbone)


# ---------------------------------------------------------------------------------------------- negatives


def test_published_partners_are_fixed_points_moved_on_by_one():
    """Replayed by hand from the same permutation."""
    for seed in range(50):
        drawn = torch.randperm(6, generator=torch.Generator().manual_seed(seed)).tolist()
        expected = [(partner + 1) % 6 if partner == own else partner for own, partner in enumerate(drawn)]
        assert published_permutation(6, torch.Generator().manual_seed(seed)).tolist() == expected


def test_published_partners_have_the_golden_draws_properties():
    generator = torch.Generator().manual_seed(0)
    golden_draws = golden_tensors("correlation_loss")["super_perm_examples_4"]
    ours = torch.stack([published_permutation(4, generator) for _ in range(3000)])
    for draws in (golden_draws, ours):
        assert (draws != torch.arange(4)).all() and draws.min() >= 0 and draws.max() <= 3
    repeats = [(draws.sort(1).values.diff(dim=1) == 0).any(1).double().mean() for draws in (golden_draws, ours)]
    assert repeats[1] == pytest.approx(14 / 24, abs=0.03), "14 of the 24 permutations of four end with an image twice"
    assert 0 < repeats[0] < 1 and {tuple(row) for row in golden_draws.tolist()} <= {tuple(row) for row in ours.tolist()}
    assert published_permutation(1, generator).tolist() == [0], "alone there is no other"


def test_a_published_batch_takes_published_partners(store, backbone, experiment, monkeypatch):
    def marked(size, generator):
        return torch.full((size,), 2)

    monkeypatch.setattr(batches, "published_permutation", marked)
    for published in (False, True):
        _, batch = model_and_batch(store, backbone, experiment.but(published=published))
        assert (batch.permutations == 2).all().item() == published
    assert (negative_permutation(4, torch.Generator().manual_seed(0)) != 2).any()


# ---------------------------------------------------------------------------------------------- noisy targets


def targets_of(step, monkeypatch, store, backbone, experiment) -> tuple[batches.Batch, torch.Tensor, torch.Tensor]:
    """The batch, and the features that the loss of one step is given."""
    model, batch = model_and_batch(store, backbone, experiment)
    seen, loss = [], training.stego_loss
    monkeypatch.setattr(training, "stego_loss", lambda *a, **k: (seen.extend(a[:2]), loss(*a, **k))[1])
    training.train_step(model, training.make_optimizer(model, experiment), batch, experiment, (0.1, 0.1, 0.1))
    return batch, *seen


def test_the_published_target_drops_channels_by_a_mask_of_its_own(store, backbone, experiment, monkeypatch):
    batch, feats, feats_knn = targets_of(0, monkeypatch, store, backbone, experiment.but(published=True))
    for clean, noisy in ((batch.feats, feats), (batch.feats_knn, feats_knn)):
        ratio = (noisy / clean).flatten(2)
        assert torch.isclose(ratio, torch.zeros(())).logical_or(torch.isclose(ratio, torch.tensor(2.0))).all()
        dropped = ratio.amax(2) == 0
        assert 0.3 < dropped.double().mean() < 0.7 and torch.equal(dropped, ratio.amin(2) == 0), "whole channels"
    assert not torch.equal((feats == 0).amin((2, 3)), (feats_knn == 0).amin((2, 3)))


def test_three_masks_are_drawn_for_each_image_in_published_mode_and_two_otherwise(
    store, backbone, experiment, monkeypatch
):
    for published, masks in ((False, 2), (True, 3)):
        changed = experiment.but(published=published)
        model, batch = model_and_batch(store, backbone, changed)
        calls = []
        model.head.dropout.register_forward_hook(lambda _, inputs, output, calls=calls: calls.append(output == 0))
        training.train_step(model, training.make_optimizer(model, changed), batch, changed, (0.1, 0.1, 0.1))
        assert len(calls) == 2 * masks
        assert len({tuple(call.flatten().tolist()) for call in calls}) == 2 * masks, "independent of one another"


def test_by_default_the_target_is_clean(store, backbone, experiment, monkeypatch):
    batch, feats, feats_knn = targets_of(0, monkeypatch, store, backbone, experiment)
    assert torch.equal(feats, batch.feats) and torch.equal(feats_knn, batch.feats_knn)


def test_published_neighbors_come_from_noisy_features(store, experiment):
    model = training.build_model(experiment, 32, 8)
    clean = nearest_neighbors(store.pooled, 2)
    assert torch.equal(batches.find_neighbors(store, model, experiment), clean)
    state = torch.get_rng_state()
    noisy = batches.find_neighbors(store, model, experiment.but(published=True))
    assert torch.equal(torch.get_rng_state(), state), "the draws of others are left alone"
    torch.rand(3)  # whatever was drawn meanwhile must not matter
    assert not torch.equal(noisy, clean) and noisy.shape == clean.shape
    assert torch.equal(batches.find_neighbors(store, model, experiment.but(published=True)), noisy), "by the seed"
    still = experiment.but(published=True, dropout=0.0)
    assert torch.equal(batches.find_neighbors(store, model, still), clean)


# ---------------------------------------------------------------------------------------------- images


def test_images_are_resized_as_published_in_training_evaluation_and_prediction(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "SAMPLES", 500)
    monkeypatch.setattr(probes, "RESTARTS", 1)
    asked = []
    for module in (source, running):
        resize = module.resize_image
        monkeypatch.setattr(
            module, "resize_image", lambda *a, resize=resize: (asked.append(bool(a[2:] and a[2])), resize(*a))[1]
        )
    for published in (False, True):
        changed = experiment.but(steps=1, train_size=40, eval_size=48, published=published)
        run = train(changed, runs_dir=tmp_path / str(published))  # nothing stored by the other way is read
        assert asked == [published] * 12
        evaluate(run)
        run.predict(np.zeros((64, 64, 3), np.uint8))
        assert len(asked) == 12 + 6 + 6 + 1 and set(asked) == {published}
        asked.clear()


@pytest.mark.parametrize("crop", ["none", "five"])
def test_labels_are_decoded_as_published_in_training_and_evaluation(tmp_path, crop):
    standins.cocostuff(tmp_path, {"train": 1, "val": 1}, ("Coco164kFull_Stuff_Coarse_7.txt",), height=8, width=8)
    for split in ("train", "val"):
        path = tmp_path / f"cocostuff/annotations/{split}2017/000000000009.png"
        standins.save(path, np.full((8, 8), 200, np.uint8))
    for published in (False, True):
        experiment = Experiment(dataset="cocostuff27", data_root=str(tmp_path), published=published, crop=crop)
        for dataset in (open_training_set(experiment), open_split(experiment, "val")):
            if published:
                assert (dataset.label(0) == 0).all()
            else:
                with pytest.raises(StegoError, match="holds id 200"):
                    dataset.label(0)


def test_an_experiments_backbone_reads_keys_as_published(experiment):
    """32 channels do not divide into the six heads that the published code assumes; they are two."""
    assert Backbone.of(experiment.but(features="KK")).key_heads == 2
    with pytest.raises(StegoError, match="6"):
        Backbone.of(experiment.but(features="KK", published=True))


# ---------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("case", ["default", "published"])
def test_extra_clusters_are_counted_or_dropped(experiment, tmp_path, monkeypatch, case):
    monkeypatch.setattr(baselines, "SAMPLES", 500)
    monkeypatch.setattr(probes, "RESTARTS", 1)
    published = case == "published"
    run = train(experiment.but(extra_clusters=6, steps=1, published=published, crf=True), runs_dir=tmp_path)
    told, count = [], evaluation.confusion
    monkeypatch.setattr(evaluation, "confusion", lambda *a, **k: (told.append(k["published"]), count(*a, **k))[1])
    record = evaluate(run)
    assert set(told) == {published} and len(told) >= 5, "both probes and every baseline"
    table = np.array(record["confusion"])
    assert table.shape == (14, 8) and (table[8:].sum() == 0) == published
    assert (table.sum() < 6 * 64 * 64) == published, "pixels of extra clusters are errors, or they do not count"


def test_scores_record_and_predictions_use_the_published_map_in_published_mode(experiment, tmp_path, monkeypatch):
    """Given a matching in which the map is off: a cluster without a class that is not the last."""
    matching = torch.tensor([2, -1, 0, 1, 3, 4, 5, 6, 7])
    monkeypatch.setattr(evaluation, "match", lambda table: matching)
    for published in (False, True):
        run = train(experiment.but(extra_clusters=1, steps=1, published=published), runs_dir=tmp_path)
        image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        clusters = run.predict(image)
        expected = published_map(matching) if published else matching
        record = evaluate(run, baselines=False)
        assert record["matching"] == expected.tolist()
        assert sum(record["confusion"][1]) > 0, "pixels without a class: one class more in the published mean, of IoU 0"
        iou = np.array(record["scores"]["cluster"]["iou"], float)
        known = np.count_nonzero(~np.isnan(iou)) + published
        assert record["scores"]["cluster"]["miou"] == pytest.approx(np.nansum(iou) / known)
        ids = torch.where(expected < 0, 8, expected)  # the cluster without a class comes after the eight classes
        np.testing.assert_array_equal(run.predict(image), ids[clusters.astype(int)])


def test_the_published_map_of_clusters_is_one_place_off():
    found = 0
    for name in {key.split(".")[0] for key in golden("metrics")}:
        case = {
            key.removeprefix(f"{name}."): value
            for key, value in golden("metrics").items()
            if key.startswith(f"{name}.")
        }
        if "map_clusters_ideal" in case:
            np.testing.assert_array_equal(published_map(case["map_clusters_ideal"]), case["map_clusters"])
            found += not np.array_equal(case["map_clusters_ideal"], case["map_clusters"])
    assert found >= 1
    assert published_map([2, -1, 0, 1]).tolist() == [2, 0, -1, 1] and published_map([1, 0, -1]).tolist() == [1, 0, -1]


# ---------------------------------------------------------------------------------------------- optional terms


def test_reconstruction_is_minus_the_mean_cosine():
    feats, rebuilt = rand(2, 5, 3, 4), rand(2, 5, 3, 4, seed=1)
    cosines = [
        float(a @ b / a.norm() / b.norm())
        for a, b in zip(feats.movedim(1, -1).reshape(-1, 5), rebuilt.movedim(1, -1).reshape(-1, 5), strict=True)
    ]
    assert reconstruction_loss(feats, rebuilt).item() == pytest.approx(-sum(cosines) / len(cosines), abs=1e-5)
    assert_close(reconstruction_loss(feats, 3 * feats), torch.tensor(-1.0))


WEIGHTS = {"rec_weight": "loss_rec", "crf_weight": "loss_crf", "aug_alignment_weight": "loss_aug"}


@pytest.mark.parametrize("key, name", WEIGHTS.items())
def test_an_optional_term_is_logged_and_joins_the_loss_by_its_weight(experiment, tmp_path, key, name):
    run = train(experiment.but(**{key: 0.25}), runs_dir=tmp_path)
    log = run.log
    parts = log.loss_cluster + log.loss_linear + 0.25 * log[name]
    parts += sum(w * log[f"loss_{kind}"] for w, kind in zip(experiment.weights, ("self", "knn", "rand"), strict=True))
    np.testing.assert_allclose(log.loss, parts, rtol=1e-4)
    assert np.isfinite(log[name]).all() and (log[name] != 0).all()
    assert not set(WEIGHTS.values()) - {name} & set(log.columns)
    again = load_run(run.folder)
    assert all(torch.equal(value, again.model.state_dict()[k]) for k, value in run.model.state_dict().items())
    assert again.predict(np.zeros((64, 64, 3), np.uint8)).shape == (64, 64)


@pytest.mark.parametrize("key", WEIGHTS)
def test_an_optional_term_shapes_the_head_and_draws_nothing_from_the_others(store, backbone, experiment, key):
    """The batch is the same but for what the term needs; the head's gradient is another."""
    gradients = []
    for changed in (experiment, experiment.but(**{key: 1.0})):
        model, batch = model_and_batch(store, backbone, changed.but(dropout=0.0))
        training.train_step(model, training.make_optimizer(model, changed), batch, changed, (0.1, 0.1, 0.1))
        gradients.append((model.head.linear.weight.grad.clone(), batch))
    assert not torch.allclose(gradients[0][0], gradients[1][0])
    plain, more = (vars(batch) for _, batch in gradients)
    assert all(torch.equal(value, more[name]) for name, value in plain.items() if value is not None)


@pytest.mark.parametrize("published", [False, True])
def test_optional_terms_see_the_target_and_the_axes_of_the_switch(store, backbone, experiment, monkeypatch, published):
    changed = experiment.but(published=published, rec_weight=1.0, aug_alignment_weight=1.0)
    model, batch = model_and_batch(store, backbone, changed)
    seen, align, rebuild = {}, terms.alignment_loss, terms.reconstruction_loss
    monkeypatch.setattr(terms, "alignment_loss", lambda *a, **k: (seen.update(k), align(*a, **k))[1])
    monkeypatch.setattr(terms, "reconstruction_loss", lambda f, r: (seen.update(feats=f), rebuild(f, r))[1])
    training.train_step(model, training.make_optimizer(model, changed), batch, changed, (0.1, 0.1, 0.1))
    assert seen["published"] == published and torch.equal(seen["feats"], batch.feats) != published


def test_the_decoder_is_there_only_for_the_reconstruction_and_learns(store, backbone, experiment):
    assert not hasattr(Stego(32, 8, 8), "decoder")
    changed = experiment.but(rec_weight=1.0)
    model, batch = model_and_batch(store, backbone, changed)
    before = model.decoder.weight.clone()
    training.train_step(model, training.make_optimizer(model, changed), batch, changed, (0.1, 0.1, 0.1))
    assert not torch.equal(model.decoder.weight, before)
    plain = training.build_model(experiment, 32, 8).state_dict()
    assert all(
        torch.equal(value, plain[name])
        for name, value in training.build_model(changed, 32, 8).state_dict().items()
        if name in plain
    )


def test_the_crf_term_sees_the_images_of_the_batch(store, backbone, experiment):
    _, batch = model_and_batch(store, backbone, experiment.but(crf_weight=1.0))
    _, plain = model_and_batch(store, backbone, experiment)
    rows = [i for wanted in plain.feats for i in range(12) if torch.equal(store.rows(torch.tensor([i]))[0], wanted)]
    assert torch.equal(batch.images, backbone.normalize(store.image_rows(torch.tensor(rows))))
    assert batch.crf_points.shape == (2, 1000) and plain.images is None
    assert image_crf_loss(batch.images, rand(4, 8, 8, 8), batch.crf_points).isfinite()


# ---------------------------------------------------------------------------------------------- augmentation alignment


def test_a_whole_image_seen_as_it_is_lies_on_its_own_grid():
    found = view_coords((0, 0, 64, 96), False, (64, 96), (8, 12))
    assert found.shape == (8, 12, 2)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 12), indexing="ij")
    assert_close(found, torch.stack([x, y], -1), **CLOSE)
    assert_close(view_coords((0, 0, 64, 96), True, (64, 96), (8, 12)), torch.stack([-x, y], -1), **CLOSE)


def test_a_view_of_the_lower_right_quarter_looks_there():
    """Its first cell's center is half a (small) cell beyond the middle of the image."""
    found = view_coords((32, 48, 32, 48), False, (64, 96), (8, 12))
    assert_close(found[0, 0], torch.tensor([2 * 5.75 / 11 - 1, 2 * 3.75 / 7 - 1]), **CLOSE)
    assert (found > 0).all()


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_image_at_the_coordinates_is_the_view(mirrored):
    """An image that says where it is: each pixel's color is its place."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing="ij")
    code = torch.stack([y, x, torch.ones_like(x)])[None]
    box = (1, 2, 6, 9)
    view = torch.nn.functional.interpolate(code[:, :, 1:7, 2:11], (8, 12), mode="bilinear", align_corners=False)
    view = view.flip(-1) if mirrored else view
    coords = view_coords(box, mirrored, (8, 12), (8, 12))[None]
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))  # at the border the crop's own edge is repeated
    looked_up = torch.nn.functional.grid_sample(code, coords, padding_mode="border", align_corners=True)
    assert_close(looked_up[inner], view[inner], **CLOSE)
    assert_close(alignment_loss(code, looked_up, coords), torch.tensor(-1.0), **CLOSE)


def test_a_horizontal_mirror_aligns_with_the_image_and_in_published_mode_with_the_wrong_axis():
    code = rand(2, 6, 5, 5)
    coords = view_coords((0, 0, 40, 40), True, (40, 40), (5, 5)).expand(2, -1, -1, -1)
    assert_close(alignment_loss(code, code.flip(-1), coords), torch.tensor(-1.0), **CLOSE)
    assert alignment_loss(code, code.flip(-1), coords, published=True) > -0.5
    # The published lookup takes rows for columns: what it finds is the mirror image turned over the diagonal.
    assert_close(
        alignment_loss(code, code.flip(-1).transpose(2, 3), coords, published=True), torch.tensor(-1.0), **CLOSE
    )
    # Of an image that is its own mirror image over the diagonal, a horizontal mirror thus aligns with a vertical one.
    even = code + code.transpose(2, 3)
    assert_close(alignment_loss(even, even.flip(-2), coords, published=True), torch.tensor(-1.0), **CLOSE)
    with pytest.raises(ValueError, match="square grids"):
        alignment_loss(rand(1, 3, 2, 4), rand(1, 3, 2, 4), coords, published=True)


def test_views_are_made_anew_each_time_and_repeat_with_the_seed():
    images = torch.randint(0, 256, (6, 3, 64, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    views, coords = augmented_views(images, (8, 6))
    assert views.shape == images.shape and views.dtype == torch.uint8 and coords.shape == (6, 8, 6, 2)
    assert len({tuple(c.flatten().tolist()) for c in coords}) == 6
    others, _ = augmented_views(images, (8, 6))
    torch.manual_seed(0)
    again, same = augmented_views(images, (8, 6))
    assert torch.equal(again, views) and torch.equal(same, coords) and not torch.equal(others, views)


def test_the_views_features_are_the_backbones(store, backbone, experiment, monkeypatch):
    def views(images, grid):
        return images.flip(-1), view_coords((0, 0, 64, 64), True, (64, 64), grid).expand(len(images), -1, -1, -1)

    monkeypatch.setattr(batches, "augmented_views", views)
    _, batch = model_and_batch(store, backbone, experiment.but(aug_alignment_weight=1.0))
    shown = [store.image_rows(torch.tensor([i])) for i in range(12)]
    expected = torch.cat([backbone(image.flip(-1)) for image in shown])
    for feats, own in zip(batch.feats_view, batch.feats, strict=True):
        row = next(i for i in range(12) if torch.equal(store.rows(torch.tensor([i]))[0], own))
        assert_close(feats, expected[row], rtol=1e-3, atol=1e-3)


def test_resuming_with_every_term_gives_the_same_weights(experiment, tmp_path, monkeypatch):
    changed = experiment.but(steps=4, rec_weight=0.5, crf_weight=0.1, aug_alignment_weight=0.5, published=True)
    whole = train(changed, runs_dir=tmp_path / "a")
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    step, calls = training.train_step, []

    def breaks(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", breaks)
        with pytest.raises(KeyboardInterrupt):
            train(changed, runs_dir=tmp_path / "b")
    resumed: Run = train(changed, runs_dir=tmp_path / "b", resume=True)
    assert all(torch.equal(value, resumed.model.state_dict()[k]) for k, value in whole.model.state_dict().items())
    assert (resumed.folder / "log.csv").read_text() == (whole.folder / "log.csv").read_text()


@pytest.mark.parametrize(
    "key, value", [("features", "QQ"), ("block", 0.5), ("rec_weight", -1), ("crf_weight", float("nan"))]
)
def test_wrong_values_are_named(experiment, key, value):
    with pytest.raises(StegoError, match=key):
        type(experiment).from_dict(experiment.to_dict() | {key: value})


def test_a_run_trained_on_keys_of_an_earlier_block_loads_as_such(experiment, tmp_path):
    run = train(experiment.but(features="KK", block=-2, steps=1), runs_dir=tmp_path)
    again = load_run(run.folder)
    assert (again.backbone.keys, again.backbone.block) == (True, 0)
    assert again.backbone.fingerprint() == run.backbone.fingerprint()
