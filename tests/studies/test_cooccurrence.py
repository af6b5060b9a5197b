"""Label co-occurrence predicted by correspondences, against loops over single pairs."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from stego_book.studies.cooccurrence import draw_pairs, pair_correspondence, pair_kernel, precision_recall, untrained
from stego_lib import StegoError, crf

GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.randint(-1, 3, (5, 4, 6), generator=GENERATOR)
CELLS = 4 * 6


@pytest.mark.parametrize("across", [False, True])
def test_pairs_are_labeled_and_of_one_image_or_of_two(across):
    pairs = draw_pairs(LABELS, 3000, across=across, seed=1)
    left, right = LABELS.flatten()[pairs.left], LABELS.flatten()[pairs.right]
    assert len(left) == 3000 and (left >= 0).all() and (right >= 0).all()
    assert ((pairs.left // CELLS != pairs.right // CELLS) == across).all() and (pairs.left != pairs.right).all()
    assert torch.equal(pairs.same, left == right)
    assert set(pairs.left.tolist()) == set(torch.nonzero(LABELS.flatten() >= 0).flatten().tolist()), "all are drawn"
    assert torch.equal(pairs.left, draw_pairs(LABELS, 3000, across=across, seed=1).left)
    with pytest.raises(StegoError, match="labeled"):
        draw_pairs(torch.full((1, 2, 2), 0 if across else -1), 5, across=across)


def test_correspondence_of_pairs_is_the_cosine_of_their_cells():
    maps = torch.randn(5, 7, 4, 6, generator=GENERATOR)
    pairs = draw_pairs(LABELS, 50, across=True)
    for cosine, left, right in zip(pair_correspondence(maps, pairs), pairs.left, pairs.right, strict=True):
        first, second = (maps[c // CELLS, :, c % CELLS // 6, c % 6] for c in (left, right))
        assert cosine.item() == pytest.approx(torch.cosine_similarity(first, second, dim=0).item(), abs=1e-5)


def test_the_kernel_is_that_of_the_dense_crf():
    images = torch.randint(100, 106, (5, 3, 8, 12), generator=GENERATOR, dtype=torch.uint8)
    pairs = draw_pairs(LABELS, 60, across=False)
    kernel = pair_kernel(images, (4, 6), pairs)
    for value, *cells in zip(kernel.tolist(), pairs.left.tolist(), pairs.right.tolist(), strict=True):
        places, colors = [], []
        for cell in cells:
            row, column = cell % CELLS // 6, cell % 6
            places.append(np.array([2 * row, 2 * column], float))
            patch = images[cell // CELLS, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            colors.append(patch.double().mean((1, 2)).numpy())
        distance, contrast = (((a - b) ** 2).sum() for a, b in (places, colors))
        near, alike = crf.SMOOTHNESS, crf.APPEARANCE
        smooth = near["compat"] * np.exp(-distance / 2 / near["sxy"] ** 2)
        exponent = -distance / 2 / alike["sxy"] ** 2 - contrast / 2 / alike["srgb"] ** 2
        assert value == pytest.approx(np.log(smooth + alike["compat"] * np.exp(exponent)), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_scikit_learns(seed):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 8, (40,), generator=generator).double()  # with ties
    same = torch.rand(40, generator=generator) < 0.4
    curve = precision_recall(score, same)
    assert curve.average_precision == pytest.approx(average_precision_score(same, score))
    assert (np.diff(curve.recall) >= 0).all() and curve.recall[0] == 0 and curve.recall[-1] == 1
    with pytest.raises(StegoError, match="recall"):
        precision_recall(score, torch.zeros(40, dtype=torch.bool))


def test_an_untrained_backbone_has_random_weights_and_leaves_everything_else(backbone):
    before, state = backbone.fingerprint(), torch.get_rng_state()
    other = untrained(backbone, 3)
    assert torch.equal(torch.get_rng_state(), state) and backbone.fingerprint() == before
    weights = {name: value for name, value in backbone.vit.state_dict().items() if value.dim() > 1}
    assert not [name for name, value in weights.items() if torch.allclose(value, other.vit.state_dict()[name])]
    assert other.fingerprint() == untrained(backbone, 3).fingerprint() != untrained(backbone, 4).fingerprint()
