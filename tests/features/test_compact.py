"""The compact store: its error, its size, what it leaves to the files, and runs that train from it."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import few_samples, tiny_experiment, write_backbone
from torch.testing import assert_close

from stego_lib import StegoError, evaluate, train
from stego_lib.backbone import Backbone
from stego_lib.datasets import open_training_set
from stego_lib.features import compact, open_features
from stego_lib.features.compact import CompactFeatures, Components, correspondence_error, fit_components
from stego_lib.features.store import FeatureStore
from stego_lib.utils.files import read_json
from stego_lib.utils.notices import Notice


@pytest.fixture(scope="module")
def experiment(scenes_root, backbone_file):
    return tiny_experiment(scenes_root, backbone_file, feature_store="compact", probes="after")


@pytest.fixture(scope="module")
def backbone(experiment) -> Backbone:
    return Backbone.of(experiment)


@pytest.fixture(autouse=True)
def enough(monkeypatch):
    """Random weights spread features over more components than trained ones; what is left out is more."""
    few_samples(monkeypatch)
    monkeypatch.setattr(compact, "ERROR", 0.05)


def opened(experiment, backbone, root, kind: str = "compact", **options):
    return open_features(open_training_set(experiment), backbone, 64, root, kind, **options)


def smooth_maps(images: int = 6, channels: int = 48, rank: int = 12, side: int = 10) -> torch.Tensor:
    """Features of few directions of falling size, and a little of all others."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(images, rank, side, side, generator=generator) * (0.6 ** torch.arange(rank))[:, None, None]
    basis = torch.linalg.qr(torch.randn(channels, rank, generator=generator)).Q
    return (
        torch.einsum("cp,bphw->bchw", basis, codes)
        + 1
        + 0.003 * torch.randn(images, channels, side, side, generator=generator)
    )


def test_codes_are_coordinates_in_the_basis_rounded_to_8_bits():
    maps, generator = smooth_maps(), torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(48, 7, generator=generator)).Q.T.contiguous()
    parts = Components(torch.rand(48, generator=generator), basis, 0.0)
    codes, unit = parts.encode(maps)
    assert codes.dtype == torch.int8 and codes.shape == (6, 7, 10, 10) and unit.shape == (6, 7)
    for image in range(6):
        for number in range(7):
            exact = (maps[image] - parts.mean[:, None, None]).mul(basis[number, :, None, None]).sum(0)
            assert codes[image, number].abs().max() == 127, "the largest number of a map uses all bits"
            assert_close(
                codes[image, number] * unit[image, number], exact, rtol=0, atol=0.51 * float(unit[image, number])
            )
    decoded = parts.decode(codes, unit)
    by_hand = parts.mean[:, None, None] + sum(
        (codes[2, number] * unit[2, number])[None] * basis[number, :, None, None] for number in range(7)
    )
    assert_close(decoded[2], by_hand, rtol=1e-4, atol=1e-5)


def test_a_map_of_zeros_is_no_number_out_of_range():
    parts = Components(torch.ones(4), torch.eye(4)[:2], 0.0)
    codes, unit = parts.encode(torch.ones(1, 4, 3, 3))
    assert not codes.any() and unit.isfinite().all()
    assert torch.equal(parts.decode(codes, unit), torch.ones(1, 4, 3, 3))


def test_as_few_components_as_the_error_allows(monkeypatch):
    maps, found = smooth_maps(), {}
    for error in (0.02, 0.01, 0.002):
        monkeypatch.setattr(compact, "ERROR", error)
        found[error] = fit_components(maps)
        decoded = found[error].decode(*found[error].encode(maps))
        assert found[error].error <= error
        assert correspondence_error(maps, decoded) == pytest.approx(found[error].error, rel=0.3)
        fewer = Components(found[error].mean, found[error].basis[:-1], 0.0)
        assert correspondence_error(maps, fewer.decode(*fewer.encode(maps))) > 0.9 * error, "one less is too few"
        assert_close(found[error].basis @ found[error].basis.T, torch.eye(len(found[error].basis)), rtol=0, atol=1e-4)
    sizes = [len(parts.basis) for parts in found.values()]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] <= 16


def test_the_error_of_correspondences_is_that_of_all_pairs():
    first, second = torch.randn(2, 2, 5, 2, 3, generator=torch.Generator().manual_seed(2))
    cells = [
        [F.normalize(maps[b, :, y, x], dim=0) for b in range(2) for y in range(2) for x in range(3)]
        for maps in (first, second)
    ]
    pairs = [abs(float(cells[0][i] @ cells[0][j] - cells[1][i] @ cells[1][j])) for i in range(12) for j in range(12)]
    assert correspondence_error(first, second) == pytest.approx(np.mean(pairs), abs=1e-6)


def test_rows_are_close_to_the_full_ones_in_a_sixth_of_the_room(experiment, backbone, tmp_path, capsys):
    full, found = opened(experiment, backbone, tmp_path, "store"), opened(experiment, backbone, tmp_path)
    assert isinstance(found, CompactFeatures) and found.kind == "compact" and found.shape == full.shape
    assert "components in 8 bits, mean error of a correspondence 0.0" in capsys.readouterr().err
    rows = torch.tensor([3, 0, 3, 11])
    assert correspondence_error(full.rows(rows), found.rows(rows)) < 0.08  # 10 of 32 components of random weights
    for place, row in enumerate(rows):
        assert_close(found.rows(row[None])[0], found.rows(rows)[place], rtol=1e-5, atol=1e-5)
    assert (found.folder / "features.npy").stat().st_size <= (full.folder / "features.npy").stat().st_size / 6 + 128
    assert not list(found.folder.glob("images*")) and not list(found.folder.glob("labels*"))
    for name in ("label_rows", "image_rows"):
        assert torch.equal(getattr(found, name)(rows), getattr(full, name)(rows)), "read from the files"
    assert_close(found.pooled, full.pooled, rtol=1e-4, atol=1e-4)


def test_it_is_computed_once_and_damage_is_noticed(experiment, backbone, tmp_path, monkeypatch):
    first = opened(experiment, backbone, tmp_path)
    rows = torch.arange(12)
    expected, again = first.rows(rows), opened(experiment, backbone, tmp_path)
    assert again.folder == first.folder and torch.equal(again.rows(rows), expected)
    content = bytearray((first.folder / "features.npy").read_bytes())
    content[-5] ^= 255
    (first.folder / "features.npy").write_bytes(content)
    with pytest.warns(Notice, match="is damaged.*computed anew"):
        mended = opened(experiment, backbone, tmp_path)
    assert torch.equal(mended.rows(rows), expected)
    (stored,) = (tmp_path / ".components").glob("*.npz")
    stored.unlink()
    assert torch.equal(opened(experiment, backbone, tmp_path).rows(rows), expected), (
        "fitted anew to the same components"
    )


def test_other_weights_have_a_store_of_their_own(experiment, backbone, tmp_path):
    other = Backbone(str(write_backbone(tmp_path / "other.safetensors", seed=1)), device="cpu", precision="float32")
    assert opened(experiment, backbone, tmp_path).folder != opened(experiment, other, tmp_path).folder


def test_too_few_components_are_a_notice(experiment, backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(compact, "ERROR", 1e-6)
    with pytest.warns(
        Notice, match=r"need more than 10 components: mean error of a correspondence 0\.\d+; feature_store='store'"
    ):
        opened(experiment, backbone, tmp_path)


def test_a_run_from_a_compact_store_says_so_and_resumes_from_it(experiment, tmp_path):
    run = train(experiment, runs_dir=tmp_path)
    record = evaluate(run)
    assert run.feature_store == "compact" and record["feature_store"] == "compact"
    assert all("compact" in path.name for path in (tmp_path / "features").glob("scenes-*")), (
        "no full store was made beside it"
    )
    usual = train(experiment.but(feature_store="store"), runs_dir=tmp_path / "usual")
    whole = evaluate(usual)
    assert "feature_store" not in whole and usual.log["loss"].iloc[0] == pytest.approx(
        run.log["loss"].iloc[0], abs=0.05
    )
    assert train(experiment, runs_dir=tmp_path, resume=True).folder == run.folder


def test_auto_takes_it_where_a_full_one_does_not_fit(experiment, backbone, tmp_path, monkeypatch):
    """The notice says which and why, with sizes; with published=True it goes online instead."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**12, used=0, free=100_000))
    with pytest.warns(
        Notice,
        match=r"kept on fewer components, in 0\.0 GB at most \(feature_store='compact'\): a full store takes 0\.0 GB",
    ):
        found = opened(experiment, backbone, tmp_path, "auto")
    assert found.kind == "compact"
    with pytest.warns(Notice, match=r"computed anew whenever they are needed \(feature_store='online'\)"):
        assert opened(experiment, backbone, tmp_path, "auto", published=True).kind == "online"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**12, used=0, free=100))
    with pytest.warns(Notice, match="kept on fewer components"):
        assert opened(experiment, backbone, tmp_path, "auto").folder == found.folder, "one that is there takes no room"
    monkeypatch.undo()
    assert isinstance(opened(experiment, backbone, tmp_path, "auto"), FeatureStore), (
        "a full one, now that there is room"
    )


def test_published_numbers_take_no_compact_store(experiment, backbone, tmp_path):
    with pytest.raises(StegoError, match=r"published=True .* feature_store='store' or 'online'"):
        opened(experiment, backbone, tmp_path, published=True)
    assert not list(tmp_path.iterdir())


def test_codes_are_kept_on_a_device_with_room(experiment, backbone, tmp_path, monkeypatch):
    found, rows = opened(experiment, backbone, tmp_path), torch.tensor([5, 2])
    expected = found.rows(rows)
    assert not found.keep_on(torch.device("cpu")) and not found.keep_on(torch.device("cpu"), free=1000)
    assert found.keep_on(torch.device("cpu"), free=10**9)
    monkeypatch.setattr(compact, "read_rows", lambda *_: pytest.fail("they are on the device"))
    assert torch.equal(found.rows(rows), expected)


def test_what_the_store_says_of_itself(experiment, backbone, tmp_path):
    about = read_json(opened(experiment, backbone, tmp_path).folder / "about.json")
    assert set(about["sha256"]) == {"features", "units", "pooled"}
