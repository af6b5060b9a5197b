"""The benchmarks: the baseline computes what the library computes, and every row runs."""

import json

import pytest
import torch
from common import tiny_experiment
from torch.testing import assert_close

from benchmarks.__main__ import main
from benchmarks.published_order import Published, crf, nearest
from stego_book.studies import speed
from stego_lib import Backbone, StegoError
from stego_lib.batches import Batch
from stego_lib.crf import dense_crf
from stego_lib.loss import published_permutation, random_coords
from stego_lib.model import Stego, build_model
from stego_lib.neighbors import nearest_neighbors
from stego_lib.predict import probe_scores
from stego_lib.training import make_optimizer, train_step


@pytest.fixture
def model() -> Stego:
    torch.manual_seed(0)
    return Stego(32, 8, 5, dropout=0.0, extra_clusters=2)


def baseline(backbone: Backbone, model: Stego, centering: bool = True) -> Published:
    return Published(backbone, model, (0.67, 0.25, 0.63), (0.08, 0.02, 0.3), centering=centering)


@pytest.mark.parametrize("centering", [True, False])
def test_the_baseline_trains_to_the_same_losses_and_weights(backbone, backbone_file, tmp_path, centering):
    experiment = tiny_experiment(
        tmp_path, backbone_file, dropout=0.0, centering=centering, weights=(0.67, 0.25, 0.63), shifts=(0.08, 0.02, 0.3)
    )
    ours = build_model(experiment, 32, 5)
    theirs, optimizer = baseline(backbone, ours, centering), make_optimizer(ours, experiment)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        images = torch.randint(0, 256, (8, 3, 64, 64), generator=generator, dtype=torch.uint8)
        label = torch.randint(-1, 6, (4, 64, 64), generator=generator)
        coords = [random_coords(4, 3, generator) for _ in range(2)]
        permutations = torch.stack([published_permutation(4, generator) for _ in range(2)])
        feats, feats_knn = (features.clone() for features in backbone(images).chunk(2))
        found = train_step(
            ours, optimizer, Batch(feats, feats_knn, *coords, permutations, label), experiment, (0.08, 0.02, 0.3)
        )
        expected = theirs.step(*images.chunk(2), label, *coords, permutations)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for name, weight in ours.state_dict().items():
        assert_close(weight, theirs.model.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


@torch.inference_mode()
def test_the_baseline_evaluates_to_the_same_maps(backbone, model):
    images = torch.randint(0, 256, (1, 3, 64, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    theirs = baseline(backbone, model)
    code = model.eval().mean_code(backbone(images), backbone(images.flip(-1)))
    assert_close(theirs.code(images), code, rtol=0, atol=1e-4)
    for name, expected in theirs.maps(code, (64, 96)).items():
        found = probe_scores(model, code)[name].logits((64, 96)).log_softmax(1)[0]
        assert_close(found, expected, rtol=0, atol=1e-5)
        labels = dense_crf(images[0].permute(1, 2, 0).contiguous().numpy(), found).argmax(0)
        assert (labels.numpy() == crf(images[0], expected)).mean() > 0.999


def test_the_baseline_finds_the_same_neighbors():
    features = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(nearest(features, 8)[:, 1:], nearest_neighbors(features, 7))


def test_rows_are_measured_beside_the_baseline(tmp_path):
    threads = torch.get_num_threads()
    names = ["rest", "step", "neighbors"]
    path = main([*names, "--tiny", "--repeats", "1", "--threads", "1", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == names
    for name in names:
        for way, times in rows[name]["ways"].items():
            assert 0 < times["min_s"] <= times["median_s"] <= times["max_s"] and times["n"] >= 1, (name, way)
    assert {"published", "store", "online float32", "online bfloat16"} <= set(rows["step"]["ways"])


def test_the_newest_whole_result_and_the_newest_rows_count_and_trials_do_not(tmp_path):
    def write(name: str, date: str, rows: list[str], tiny: bool = False) -> None:
        result = {"machine": {"date": date}, "settings": {"tiny": tiny}, "rows": {row: {"of": name} for row in rows}}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))

    with pytest.raises(StegoError, match="make bench"):
        speed.newest_results(tmp_path)
    write("old", "2026-01-01", ["a", "b"])
    write("new", "2026-01-02", ["a", "b"])
    write("part", "2026-01-03", ["a"])
    write("trial", "2026-01-04", ["a", "b", "full_recipe"], tiny=True)
    assert speed.newest_results(tmp_path)[0].name == "new.json"
    rows = speed.newest_rows(tmp_path)
    assert {name: row["of"] for name, row in rows.items()} == {"a": "part", "b": "new"}
    assert rows["a"]["machine"]["date"] == "2026-01-03"
