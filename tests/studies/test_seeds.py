"""One experiment with several seeds: which are run, and what is kept."""

import shutil

import pytest
from common import few_samples, tiny_experiment, write_backbone

from stego_book.studies.results import read_records
from stego_book.studies.seeds import run_seeds, whole_numbers
from stego_lib import StegoError
from stego_lib.utils.files import read_json, write_json


def test_seeds_are_read_as_papermill_gives_them():
    for text, expected in {"0 1 2": [0, 1, 2], "5,3": [5, 3], 4: [4]}.items():
        assert whole_numbers(text) == expected
    for text in ("", "1 01", "a", "-1", "0.5", None):
        with pytest.raises(StegoError, match="seeds"):
            whole_numbers(text)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    few_samples(monkeypatch)


@pytest.fixture
def experiment(scenes_root, backbone_file):
    return tiny_experiment(scenes_root, backbone_file, steps=2)


def test_seeds_are_trained_scored_and_recorded_and_with_resume_not_repeated(experiment, tmp_path):
    runs, records = tmp_path / "runs", tmp_path / "records"
    first = run_seeds(experiment, [0, 1], records, runs_dir=runs)
    assert [record["experiment"]["seed"] for record in first] == [0, 1] and read_records(records) == first
    for record in first:
        (folder,) = runs.glob(f"*-seed{record['experiment']['seed']}")
        assert record == read_json(folder / "metrics.json") and record["step"] == 2
    assert first[0]["confusion"] != first[1]["confusion"]
    (unscored,) = runs.glob("*-seed1")
    checkpoint = (unscored / "checkpoint.safetensors").read_bytes()
    write_json(unscored / "metrics.json", first[1] | {"scores": {}})
    again = run_seeds(experiment, [1, 0], records, runs_dir=runs, resume=True)
    assert again[1] == first[0] and again[0]["scores"] == first[1]["scores"], "scored again"
    assert (unscored / "checkpoint.safetensors").read_bytes() == checkpoint, "but not trained again"
    assert len(list(runs.glob("*-seed*"))) == len(read_records(records)) == 2
    run_seeds(experiment, [0], records, runs_dir=runs)
    assert len(list(runs.glob("*-seed0*"))) == 2, "trained again without resume"


def test_records_of_other_data_or_weights_never_overwrite_each_other(experiment, tmp_path):
    """Experiments whose names and records agree: the folder of the data and of the weights file are no part of them."""
    root = shutil.copytree(experiment.data_root, tmp_path / "data")
    first, second, *_ = sorted((root / "scenes" / "imgs" / "train").iterdir())
    shutil.copy(second, first)
    (tmp_path / "other").mkdir()
    weights = write_backbone(tmp_path / "other" / str(experiment.backbone).rpartition("/")[2], seed=7)
    changes = [{}, {"data_root": str(root)}, {"backbone": str(weights)}]
    for change in changes:
        run_seeds(experiment.but(**change), [0], tmp_path / "records", runs_dir=tmp_path / "runs")
    records = read_records(tmp_path / "records")
    assert len(records) == 3 and all(record["experiment"] == records[0]["experiment"] for record in records)
