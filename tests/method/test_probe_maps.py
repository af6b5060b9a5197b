"""Probing on the grid against the published order: the code upsampled first, and probed then."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from randomrun import random_run
from torch.testing import assert_close

from stego_lib import StegoError
from stego_lib.loss import upsample
from stego_lib.model import Stego
from stego_lib.predict import Scores, label_maps, probe_scores

SIZES = [
    ((5, 7), (40, 56)), ((4, 4), (30, 45)), ((1, 1), (8, 8)), ((1, 6), (3, 20)), ((6, 5), (6, 5)), ((9, 8), (5, 3)),
]  # fmt: skip
"""Grids and what they are brought to: whole patches, other ratios, a single row, the same size, a smaller one."""


def code_of(grid: tuple[int, int]) -> torch.Tensor:
    """Codes whose neighbors all but cancel here and there, and one that is zero."""
    code = torch.randn(2, 12, *grid, generator=torch.Generator().manual_seed(0))
    code[0, :, 0, -1] = -0.999 * code[0, :, 0, 0]
    code[1, :, -1, -1] = 0
    return code


@pytest.mark.parametrize(("grid", "size"), SIZES)
@torch.inference_mode()
def test_log_probabilities_are_those_of_the_published_order(grid, size):
    torch.manual_seed(1)
    model, code = Stego(16, 12, 6, extra_clusters=3).eval(), code_of(grid)
    full = upsample(code, size)
    published = {
        "cluster": model.cluster_probe.log_probabilities(full),
        "linear": model.linear_probe(full).log_softmax(1),
    }
    scores = probe_scores(model, code)
    for name, expected in published.items():
        assert_close(scores[name].logits(size).log_softmax(1), expected, rtol=0, atol=1e-5)
        ranked = expected.topk(2, dim=1).values
        clear = ranked[:, 0] - ranked[:, 1] > 1e-4
        assert torch.equal(label_maps(scores[name], size)[clear].long(), expected.argmax(1)[clear]) and clear.any()


def test_upsampling_is_interpolation_in_value_and_gradient_also_after_an_evaluation():
    """Matrices are cached: made in inference mode, for sizes that no other test has, they must serve training too."""
    maps, grown = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 23, 19)
    with torch.inference_mode():
        upsample(maps, (23, 19))
    ours, theirs = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    found = upsample(ours, (23, 19))
    expected = F.interpolate(theirs, (23, 19), mode="bilinear", align_corners=False)
    assert_close(found, expected, rtol=0, atol=1e-6)
    (found * grown).sum().backward()
    (expected * grown).sum().backward()
    assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "grid, size",
    [((5, 7), (700, 530)), ((40, 30), (300, 601)), ((3, 4), (257, 256)), ((16, 16), (5, 9)), ((1, 9), (2, 900))],
)
def test_label_maps_block_by_block_are_those_of_all_at_once(grid, size):
    maps = torch.randn(2, 9, *grid, generator=torch.Generator().manual_seed(0)).cumsum(-1)
    ids = np.array([3, 1, 4, 0, 5, 9, 2, 6, 255], np.uint8)
    labels = label_maps(Scores(maps), size, ids).numpy()
    expected = ids[upsample(maps, size).argmax(1)]
    assert labels.dtype == np.uint8 and labels.shape == (2, *size)
    assert (labels != expected).mean() < 1e-4, "the last bit of a sum decides between equals"


def test_predict_takes_an_upsampler_of_features(tmp_path):
    """The head is linear, so bilinear features give the usual labels, and repeated ones those of whole cells."""
    run = random_run(tmp_path, crf=False, eval_size=64)
    image = torch.randint(0, 256, (3, 64, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sizes = []

    def upsampler(mode):
        def upsample_features(images, features):
            sizes.append((images.shape[1:], features.shape[1:]))
            assert images.dtype == torch.float32 and images.mean().abs() < 2
            return F.interpolate(features, images.shape[-2:], mode=mode)

        return upsample_features

    expected = run.predict(image)
    assert (run.predict(image, upsampler=upsampler("bilinear")) == expected).mean() > 0.999
    assert set(sizes) == {((3, 64, 96), (run.backbone.dim, 8, 12))}
    cells = run.predict(image, upsampler=upsampler("nearest"))
    assert np.array_equal(cells, cells[::8, ::8].repeat(8, 0).repeat(8, 1)) and not np.array_equal(cells, expected)
    with pytest.raises(StegoError, match="tile"):
        run.predict(image, upsampler=upsampler("nearest"), tile=64)
    for wrong in (lambda images, features: features[:, :3], lambda images, features: None):
        with pytest.raises(StegoError, match="upsampler"):
            run.predict(image, upsampler=wrong)
