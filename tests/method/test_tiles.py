"""Label maps from sliding windows: no seams, and the same as a naive computation; the CRF of `predict`."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stego_lib import StegoError, crf, evaluate, open_dataset, tiles
from stego_lib.datasets.transforms import resize_image
from stego_lib.loss import upsample
from stego_lib.metrics import confusion
from stego_lib.model import Stego
from stego_lib.networks.geometry import Geometry
from stego_lib.predict import Scores, label_maps
from stego_lib.tiles import label_strips

PATCH = 8


def smooth_image(height: int, width: int) -> torch.Tensor:
    coarse = torch.rand(1, 3, 1 + height // 30, 1 + width // 30, generator=torch.Generator().manual_seed(height))
    return (255 * F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1))[0].to(torch.uint8)


def reader(image: torch.Tensor):
    """Reads parts of an image; they must lie inside it."""

    def read(top, left, height, width):
        assert top >= 0 and left >= 0 and top + height <= image.shape[1] and left + width <= image.shape[2]
        return image[:, top : top + height, left : left + width]

    return read


def local_run(only: tuple[int, int] | None = None):
    """A stand-in whose code is the mean color of a cell, so that it does not depend on the window."""
    torch.manual_seed(0)
    backbone = SimpleNamespace(patch=PATCH, device=torch.device("cpu"), geometry=Geometry(3, PATCH, only, True))
    model = Stego(3, 3, 6, head="none")
    return SimpleNamespace(
        backbone=backbone,
        model=model,
        score_maps=lambda code: Scores(model.cluster_probe.similarity(code), code),
        maps=lambda images: F.avg_pool2d(images.float() / 255 - 0.5, PATCH),
        ids=np.array([4, 0, 2, 1, 255, 3], np.uint8),
    )


def padded(image: torch.Tensor) -> torch.Tensor:
    down, across = (-side % PATCH for side in image.shape[1:])
    return F.pad(image[None].float(), (0, across, 0, down), mode="replicate").to(torch.uint8)


@pytest.mark.parametrize("size", [(160, 240), (161, 247), (5, 300), (90, 9), (64, 64), (31, 33)])
@pytest.mark.parametrize("tile", [8, 24, 64, 1000])
def test_windows_leave_no_seams(size, tile, monkeypatch):
    """With codes that do not depend on the window, tiles change nothing, also where blocks of labels meet."""
    monkeypatch.setattr(tiles, "STRIP_BLOCK", 96)
    stand_in, image = local_run(), smooth_image(*size)
    strips = list(label_strips(stand_in, reader(image), size, tile, crf=False))
    assert len(strips) == -(-size[0] // 80), "strips of 12 cells less a margin of one on each side"
    whole = padded(image)
    scores = Scores(stand_in.model.cluster_probe.similarity(stand_in.maps(whole)))
    expected = label_maps(scores, tuple(whole.shape[-2:]), stand_in.ids)[0, : size[0], : size[1]].numpy()
    found = np.concatenate(strips)
    assert found.dtype == np.uint8 and found.shape == size
    assert (found != expected).mean() < 1e-3, "the last bit of a sum decides between equals"


def test_a_backbone_of_a_single_size_gets_windows_of_that_size():
    stand_in, shapes = local_run(only=(64, 64)), set()
    maps = stand_in.maps
    stand_in.maps = lambda images: shapes.add(images.shape[1:]) or maps(images)
    for size in ((200, 100), (40, 100), (10, 20)):
        strips = label_strips(stand_in, reader(smooth_image(*size)), size, 99, crf=False)
        assert np.concatenate(list(strips)).shape == size
    assert shapes == {(3, 64, 64)}


@torch.inference_mode()
@pytest.mark.parametrize("size", [(96, 128), (101, 70)])
def test_tiles_equal_a_naive_computation(run, size):
    """Windows of 5 x 5 cells, each weighted by sin^2 at its cells, summed over the whole grid."""
    image, window = smooth_image(*size), 5
    whole = padded(image)[0]
    grid = whole.shape[1] // PATCH, whole.shape[2] // PATCH
    total, weights = torch.zeros(run.model.head.code_dim, *grid), torch.zeros(grid)
    fade = np.sin(np.pi * (np.arange(window) + 0.5) / window) ** 2
    starts = [np.linspace(0, cells - window, -(-(cells - window) // 3) + 1).round().astype(int) for cells in grid]
    for top in starts[0]:
        for left in starts[1]:
            pixels = whole[:, top * PATCH :, left * PATCH :][:, : window * PATCH, : window * PATCH]
            code = run.code(pixels[None])[0]
            for y in range(window):
                for x in range(window):
                    total[:, top + y, left + x] += fade[y] * fade[x] * code[:, y, x]
                    weights[top + y, left + x] += fade[y] * fade[x]
    similarity = run.model.cluster_probe.similarity((total / weights)[None])
    expected = upsample(similarity, whole.shape[1:]).argmax(1)[0, : size[0], : size[1]]
    assert (run.predict(image, tile=window * PATCH, refine="none") != expected.numpy()).mean() < 1e-3


def test_a_tile_as_large_as_the_image_is_the_whole_image(run):
    image = smooth_image(96, 128)
    for tile in (128, 500):
        plain = run.predict(image, size=96, refine="none")
        np.testing.assert_array_equal(run.predict(image, tile=tile, refine="none"), plain)
        twice = run.predict(image, size=192, tile=2 * tile, refine="none")
        assert (twice == run.predict(image, size=192, refine="none")).mean() > 0.97, "scaled back by nearest pixels"
    assert (run.predict(image, tile=40, refine="none") != plain).any()
    assert (run.predict(image, size=40, refine="none") != plain).any()


def test_predict_refines_as_the_experiment_says(run):
    image = open_dataset("scenes", run.experiment.data_root, "val").image(0)
    with torch.inference_mode():
        logits = run.scores(image).logits(image.shape[1:])[0]
    expected = crf.dense_crf(image.permute(1, 2, 0).numpy(), logits).argmax(0).numpy()
    for tile in (None, 500):
        refined = run.predict(image, refine="crf", tile=tile)
        np.testing.assert_array_equal(refined, run.ids[expected])
    plain = run.predict(image, refine="none")
    assert (plain != refined).any()
    assert not run.experiment.crf
    np.testing.assert_array_equal(run.predict(image), plain)
    run.experiment = run.experiment.but(crf=True)
    np.testing.assert_array_equal(run.predict(image), refined)
    run.experiment = run.experiment.but(crf=False)


def test_the_crf_of_a_large_image_works_on_a_smaller_one(run, monkeypatch):
    image, sizes, refine = smooth_image(210, 280), [], crf.refine
    monkeypatch.setattr("stego_lib.predict.CRF_PIXELS", 84 * 112)
    monkeypatch.setattr(
        crf, "refine", lambda small, *more, **named: sizes.append(small.shape) or refine(small, *more, **named)
    )
    labels = run.predict(image, refine="crf")
    assert labels.shape == (210, 280) and sizes == [(84, 112, 3)]
    small = run.predict(resize_image(image, (84, 112)), refine="crf", size=run.experiment.eval_size)
    assert (labels[1::5, 1::5] == small[::2, ::2]).mean() > 0.9


def test_the_crf_on_blocks_is_nearly_that_of_the_whole_image(run, monkeypatch):
    image = smooth_image(96, 144)
    whole, plain = (run.predict(image, tile=64, refine=refine) for refine in ("crf", "none"))
    monkeypatch.setattr(tiles, "STRIP_BLOCK", 112)
    monkeypatch.setattr(tiles, "MARGIN", 32)
    blocks = run.predict(image, tile=64, refine="crf")
    assert (blocks != whole).mean() < 0.5 * (plain != whole).mean()


def test_a_large_image_gets_a_notice_and_wrong_values_an_error(run):
    with pytest.warns(UserWarning, match="by 5.*tile="):
        run.predict(smooth_image(330, 330), refine="none")
    for wrong in ({"size": 0}, {"tile": 0}, {"tile": "448"}, {"size": 10**6}, {"refine": "guided"}):
        with pytest.raises(StegoError, match=next(iter(wrong))):
            run.predict(smooth_image(64, 64), **wrong)


def test_evaluation_in_tiles_scores_what_is_predicted_in_tiles(run):
    """Codes and features are blended differently where the head is not linear, so a few pixels may differ."""
    record = evaluate(run, baselines=False, tile=40)
    assert record["tile"] == 40 and not run.matched, "whole images name the segments"
    dataset = open_dataset("scenes", run.experiment.data_root, "val")
    table = sum(confusion(run.predict(image, tile=40, refine="none"), label, 8, 8) for image, label in dataset)
    assert (table - torch.tensor(record["confusion"])).abs().sum() < 0.02 * table.sum()
    features = tiles.TiledBackbone(run.backbone, 40)
    image = dataset.image(0)[None]
    assert (features(image) - run.backbone(image)).abs().max() > 0.01
    assert features.fingerprint() != run.backbone.fingerprint()
    torch.testing.assert_close(tiles.TiledBackbone(run.backbone, 64)(image), run.backbone(image), rtol=1e-4, atol=1e-4)
