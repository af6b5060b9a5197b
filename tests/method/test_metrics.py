"""Confusion matrix, matching and scores: naive versions beside them, and what must not change them."""

from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stego_lib.metrics import assigned, border_counts, confusion, identity, majority, match, own_assigned, scores

SOME = settings(max_examples=30, deadline=None)


def drawn(n_pred: int, n_classes: int, seed: int, shape: tuple[int, ...] = (2, 9, 11)) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels that agree now and then; labels hold -1 and 255 (ignored) too."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, n_classes, shape)
    order = rng.permutation(n_pred)[np.arange(n_classes) % n_pred]
    pred = np.where(rng.random(shape) < 0.6, order[label], rng.integers(0, n_pred, shape))
    label = np.where(rng.random(shape) < 0.1, rng.choice([-1, 255], shape), label)
    return pred, label


def best_by_brute_force(counts: np.ndarray) -> int:
    """Most pixels that can agree, trying every way to give clusters to classes one to one."""
    n_pred, n_classes = counts.shape
    if n_pred >= n_classes:
        return max(sum(counts[p, c] for c, p in enumerate(order)) for order in permutations(range(n_pred), n_classes))
    return max(sum(counts[p, c] for p, c in enumerate(order)) for order in permutations(range(n_classes), n_pred))


@SOME
@given(
    n_pred=st.integers(1, 6),
    n_classes=st.integers(1, 6),
    high=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 10**6),
)
def test_matching_is_optimal(n_pred, n_classes, high, seed):
    counts = np.random.default_rng(seed).integers(0, high + 1, (n_pred, n_classes))
    matching = match(counts)
    assert matching.shape == (n_pred,) and matching.dtype == torch.int64
    given_ = [c for c in matching.tolist() if c >= 0]
    assert len(given_) == min(n_pred, n_classes) == len(set(given_)), "as many pairs as can be, each class once"
    assert sum(counts[p, c] for p, c in enumerate(matching.tolist()) if c >= 0) == best_by_brute_force(counts)


@SOME
@given(n_classes=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_scores_equal_a_loop_over_pixels(n_classes, seed):
    pred, label = drawn(n_classes, n_classes, seed)
    found = scores(confusion(pred, label, n_classes, n_classes), identity(n_classes))
    pixels = [(p, t) for p, t in zip(pred.ravel().tolist(), label.ravel().tolist(), strict=True) if 0 <= t < n_classes]
    assert found["accuracy"] == pytest.approx(100 * sum(p == t for p, t in pixels) / len(pixels))
    for c in range(n_classes):
        both, either = sum(p == c and t == c for p, t in pixels), sum(p == c or t == c for p, t in pixels)
        assert found["iou"][c] == pytest.approx(100 * both / either if either else float("nan"), nan_ok=True)
    assert found["miou"] == pytest.approx(np.nanmean(found["iou"]))


def test_extra_clusters_count_as_errors():
    label = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    pred = np.array([0, 0, 0, 2, 1, 1, 1, 1])  # a quarter of class 0 went to a third cluster
    table = confusion(pred, label, 3, 2)
    assert table.sum() == 8, "their pixels are counted"
    matching = match(table)
    assert matching.tolist() == [0, 1, -1]
    found = scores(table, matching)
    assert found["accuracy"] == pytest.approx(100 * 7 / 8)
    assert found["iou"] == pytest.approx([75, 100]) and found["miou"] == pytest.approx(87.5)
    assert assigned(table, matching).tolist() == [[3, 0], [0, 4], [1, 0]]
    published = confusion(pred, label, 3, 2, published=True)
    assert confusion([-1, 0, 1], [0, 0, 1], 2, 2, published=True).tolist() == [[1, 0], [0, 1]], "dropped as well"
    assert published.sum() == 7
    assert scores(published, match(published), published=True)["accuracy"] == 100, "the defect, on request"


def test_fewer_clusters_than_classes():
    table = np.array([[5, 0, 1], [0, 4, 0]])
    assert match(table).tolist() == [0, 1]
    found = scores(table, match(table))
    assert found["accuracy"] == pytest.approx(90) and found["iou"] == pytest.approx([100 * 5 / 6, 100, 0])


@pytest.mark.parametrize("wrong", [-1, 4, 255])
def test_a_prediction_out_of_range_at_a_counted_pixel_is_an_error(wrong):
    with pytest.raises(ValueError, match=rf"{wrong}.*not in"):
        confusion(np.array([0, wrong]), np.array([0, 1]), 4, 4)


def test_a_class_that_does_not_occur_is_left_out_of_the_mean_and_one_never_found_is_not():
    # Class 2 is neither there nor predicted; class 1 is there and never predicted.
    found = scores(np.array([[6, 2, 0], [0, 0, 0], [0, 0, 0]]), identity(3))
    assert found["iou"][:2] == pytest.approx([75, 0]) and np.isnan(found["iou"][2])
    assert found["miou"] == pytest.approx(37.5)


@SOME
@given(st.integers(0, 2**16))
def test_the_majority_matching_is_the_best_that_ignores_the_one_to_one_rule(seed):
    counts = np.random.default_rng(seed).integers(0, 9, (4, 3))
    matching = majority(counts)
    agree = sum(counts[p, c] for p, c in enumerate(matching.tolist()) if c >= 0)
    assert agree == max(sum(counts[p, c] for p, c in enumerate(way)) for way in product(range(3), repeat=4))
    assert scores(counts, matching)["accuracy"] >= scores(counts, match(counts))["accuracy"]


def borders_by_loops(pred: np.ndarray, label: np.ndarray, n_classes: int) -> list[int]:
    """`border_counts` of one image, from the distances of all pairs of border pixels."""
    height, width = label.shape

    def borders(ids):
        around = [(-1, 0), (1, 0), (0, -1), (0, 1)]
        for y, x in np.ndindex(height, width):
            inside = [(y + v, x + u) for v, u in around if 0 <= y + v < height and 0 <= x + u < width]
            if 0 <= label[y, x] < n_classes and any(
                0 <= label[place] < n_classes and ids[place] != ids[y, x] for place in inside
            ):
                yield y, x

    def near(some, others):
        return sum(any((a - c) ** 2 + (b - d) ** 2 <= 9 for c, d in others) for a, b in some)

    predicted, true = list(borders(pred)), list(borders(label))
    return [len(predicted), near(predicted, true), len(true), near(true, predicted)]


@SOME
@given(height=st.integers(1, 14), width=st.integers(1, 14), seed=st.integers(0, 10**6))
def test_border_counts_equal_a_loop_over_all_pairs_of_pixels(height, width, seed):
    rng = np.random.default_rng(seed)
    pred, label = (np.kron(rng.integers(0, 3, (2, 3, 3)), np.ones((5, 5), int))[:, :height, :width] for _ in range(2))
    label = np.where(rng.random(label.shape) < 0.1, rng.choice([-1, 255], label.shape), label)
    expected = np.sum([borders_by_loops(p, t, 3) for p, t in zip(pred, label, strict=True)], 0)
    assert border_counts(pred, label, 3).tolist() == expected.tolist()


def test_matching_each_image_by_itself_by_hand():
    # Two images with perfect segments and swapped names, and a third cluster that meets no class of its own.
    tables = [np.array([[6, 0], [0, 4], [0, 0]]), np.array([[0, 6], [3, 0], [1, 0]])]
    split = sum(tables)
    assert scores(split, match(split))["accuracy"] == pytest.approx(50)
    own = sum(own_assigned(table) for table in tables)
    assert own.tolist() == [[9, 0], [0, 10], [1, 0]]
    found = scores(own, torch.tensor([0, 1, -1]))
    assert found["accuracy"] == pytest.approx(95) and found["iou"] == pytest.approx([90, 100])
    # One class in the image, three clusters: the others get no class, so none is a wrong prediction of class 1.
    assert own_assigned([[5, 0], [3, 0], [2, 0]]).tolist() == [[5, 0], [0, 0], [5, 0]]
