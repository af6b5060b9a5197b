"""Negative results: each change of the features does what it says, and the study compares like with like."""

import numpy as np
import pandas as pd
import pytest
import torch
from common import tiny_experiment
from scipy.ndimage import uniform_filter
from torch.testing import assert_close

from stego_book.studies import negative


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    noise = torch.randn(9, 12, 6, 8, generator=generator)
    return (
        noise + torch.randn(12, 1, 1, generator=generator) * rows + torch.randn(12, 1, 1, generator=generator) * columns
    )


def test_what_is_removed_is_gone(maps):
    points = negative.without_position(maps, rounds=4)(maps).movedim(1, -1).reshape(-1, 12)
    place = torch.arange(6.0).repeat_interleave(8).repeat(9)[:, None]
    inputs = torch.cat([points, torch.ones(len(points), 1)], 1).double()
    error = place - inputs @ torch.linalg.lstsq(inputs, place.double(), rcond=1e-4, driver="gelsd").solution
    assert error.var() > 0.7 * place.var()
    places = negative.without_place_means(maps)(maps).mean(0)
    assert_close(places, maps.mean((0, 2, 3))[:, None, None].expand_as(places), rtol=1e-3, atol=1e-4)
    means = negative.without_image_means(maps, 0.5)(maps).mean((2, 3)) - maps.mean((0, 2, 3))
    assert_close(means, 0.5 * (maps.mean((2, 3)) - maps.mean((0, 2, 3))), rtol=1e-3, atol=1e-4)
    white = negative.whitened(maps, dim=5)(maps).movedim(1, -1).reshape(-1, 5)  # fitted to all cells here
    assert_close(torch.cov(white.T), torch.eye(5), rtol=1e-2, atol=1e-2)


def test_guided_filter_of_a_constant_image_is_a_mean():
    probabilities = torch.rand(2, 20, 30, generator=torch.Generator().manual_seed(0))
    smoothed = negative.guided_filter(torch.full((3, 20, 30), 80, dtype=torch.uint8), probabilities, radius=2)
    mean = [uniform_filter(uniform_filter(map_, 5), 5) for map_ in probabilities.numpy()]
    assert_close(smoothed.float(), torch.from_numpy(np.stack(mean)).float(), rtol=1e-3, atol=1e-3)


def test_the_study_compares_the_same_images(scenes_root, backbone_file, tmp_path, monkeypatch):
    monkeypatch.setattr(negative, "runs_root", lambda: tmp_path)  # the default folder of features
    tiny = tiny_experiment(scenes_root, backbone_file)
    features = negative.changed_features(tiny, seeds=[0], blocks=[-2])
    rows = pd.concat([features, negative.changed_label_maps(tiny, seeds=[0], every=2)])
    scores = rows.set_index(["kind", "way"])[list(negative.SCORES)]
    assert_close(scores.loc["segments", "unchanged"].to_numpy(), scores.loc["label map", "upsampled"].to_numpy())
    assert scores.stack().between(0, 100).all() and set(rows["kind"]) == {"features", "block", "segments", "label map"}
    block = negative.table(rows, "block")["mIoU", "scenes"]
    assert (
        list(block.index) == ["block -1", "block -2"]
        and block.iloc[0] == f"{scores.loc['features', 'unchanged'].miou:.1f}"
    )
