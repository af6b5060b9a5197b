"""One experiment with several seeds: which are run, which are kept."""

import shutil

import pytest
from common import few_samples, tiny_experiment

from stego_book.studies import seeds
from stego_book.studies.results import read_records
from stego_book.studies.seeds import finished_record, read_seeds, run_seeds
from stego_lib import StegoError
from stego_lib.utils.files import read_json, write_json


@pytest.mark.parametrize("text, expected", [("0 1 2", [0, 1, 2]), ("5,3", [5, 3]), ("7, 8", [7, 8]), (4, [4])])
def test_seeds_are_read_as_papermill_gives_them(text, expected):
    assert read_seeds(text) == expected


@pytest.mark.parametrize("text", ["", "1 1", "1 01", "a", "-1", "0.5", None])
def test_what_is_no_list_of_seeds_is_refused(text):
    with pytest.raises(StegoError, match="each once, such as '0 1 2'"):
        read_seeds(text)


@pytest.fixture(scope="module")
def experiment(scenes_root, backbone_file):
    return tiny_experiment(scenes_root, backbone_file, steps=2)


@pytest.fixture(scope="module")
def finished(experiment, tmp_path_factory):
    """A folder of runs with seeds 0 and 1, the records that came back, and the folder of their copies."""
    runs_dir, records = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("records")
    with pytest.MonkeyPatch.context() as monkeypatch:
        few_samples(monkeypatch)
        return runs_dir, run_seeds(experiment, [0, 1], records, runs_dir=runs_dir), records


@pytest.fixture
def runs_dir(finished, tmp_path):
    """A copy of these runs, to be changed."""
    return shutil.copytree(finished[0], tmp_path / "runs")


@pytest.fixture
def trained(monkeypatch):
    """The seeds that are trained from now on."""
    few_samples(monkeypatch)
    train, seen = seeds.train, []
    monkeypatch.setattr(
        seeds, "train", lambda experiment, **how: (seen.append(experiment.seed), train(experiment, **how))[1]
    )
    return seen


def test_every_seed_is_trained_scored_and_recorded(experiment, finished):
    runs_dir, found, records = finished
    assert [record["experiment"]["seed"] for record in found] == [0, 1] and read_records(records) == found
    for record in found:
        (folder,) = runs_dir.glob(f"*-seed{record['experiment']['seed']}")
        assert record == read_json(folder / "metrics.json") and record["step"] == 2
    assert found[0]["confusion"] != found[1]["confusion"]


def test_a_finished_seed_is_not_run_again(experiment, finished, runs_dir, trained, tmp_path):
    _, found, _ = finished
    again = run_seeds(experiment, [1, 0, 2], tmp_path / "records", runs_dir=runs_dir, resume=True)
    assert trained == [2] and again[:2] == [found[1], found[0]]
    assert len(read_records(tmp_path / "records")) == 3


def test_it_is_run_again_where_that_is_asked(experiment, runs_dir, trained, tmp_path):
    run_seeds(experiment, [0], tmp_path / "records", runs_dir=runs_dir)
    assert trained == [0]


def test_another_experiment_is_not_taken_for_it(experiment, finished):
    runs_dir, found, _ = finished
    assert finished_record(experiment.but(seed=1), runs_dir) == found[1]
    for change in (dict(steps=3), dict(code_dim=9), dict(seed=77), dict(crf=True), dict(published=True)):
        assert finished_record(experiment.but(**change), runs_dir) is None, change


@pytest.mark.parametrize("change", [dict(split="test"), dict(step=1), dict(experiment={"mirror": False})], ids=str)
def test_a_record_of_something_else_is_not_taken_for_it(experiment, finished, runs_dir, change):
    """Such as one of another split, or of an evaluation with other settings, in the same run folder."""
    (path,) = runs_dir.glob("*-seed1/metrics.json")
    write_json(path, finished[1][1] | change)
    assert finished_record(experiment.but(seed=1), runs_dir) is None


def test_a_run_without_scores_is_scored_and_not_trained_again(experiment, trained, tmp_path, monkeypatch):
    runs_dir, records = tmp_path / "runs", tmp_path / "records"
    with monkeypatch.context() as broken:
        broken.setattr(seeds, "evaluate", lambda run, split: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_seeds(experiment, [0], records, runs_dir=runs_dir)
    (folder,) = runs_dir.glob("*-seed0")
    before = (folder / "checkpoint.safetensors").read_bytes()
    run_seeds(experiment, [0], records, runs_dir=runs_dir, resume=True)
    assert (folder / "metrics.json").exists() and (folder / "checkpoint.safetensors").read_bytes() == before
    assert len(list(runs_dir.glob("*-seed0"))) == 1


def test_a_seed_out_of_range_stops_before_any_work(experiment, trained, tmp_path):
    with pytest.raises(ValueError, match="seed"):
        run_seeds(experiment, [0, 2**31], tmp_path, runs_dir=tmp_path)
    assert trained == []
