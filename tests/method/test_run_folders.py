"""Which folder a run gets, which run is found again, and where its records go."""

import os
import shutil
from pathlib import Path

import pytest
from common import tiny_experiment
from PIL import Image

from stego_lib import Experiment, StegoError, evaluate, load_run, open_dataset, train
from stego_lib.provenance import Provenance
from stego_lib.run import find_run, new_folder
from stego_lib.utils.files import read_json, write_json
from stego_lib.utils.notices import Notice

pytestmark = pytest.mark.usefixtures("few_samples")

WANTED = Experiment(steps=10, seed=1)
MADE_FROM = Provenance(images="a", labels="b", weights="c", precision="float32", store="full", versions={"torch": "2"})


def made(folder: Path, experiment: Experiment = WANTED, **changes: str) -> Path:
    """A run folder with what it takes to be found."""
    write_json(folder / "experiment.json", experiment.to_dict())
    write_json(folder / "provenance.json", MADE_FROM.to_dict() | changes)
    for name in ("classes.json", "checkpoint.safetensors", "correspondences.json"):
        (folder / name).touch()
    return folder


def test_every_run_gets_a_folder_of_its_own(tmp_path):
    folders = {new_folder(tmp_path / "runs", WANTED) for _ in range(9)}
    assert len(folders) == 9 and all(WANTED.name in folder.name for folder in folders)
    (tmp_path / "file").touch()
    with pytest.raises(StegoError, match="file"):
        new_folder(tmp_path / "file", WANTED)


def test_the_newest_run_of_the_same_experiment_and_provenance_is_found(tmp_path):
    older, newer = (made(tmp_path / name) for name in ("z", "a"))
    os.utime(older / "checkpoint.safetensors", (1, 1))
    made(tmp_path / "unfinished" / "deeper")
    moved = WANTED.but(data_root="elsewhere", device="cpu", crf=False, eval_size=64)
    assert find_run(tmp_path, moved, MADE_FROM) == newer
    (newer / "checkpoint.safetensors").unlink()
    assert find_run(tmp_path, WANTED, Provenance.from_dict(MADE_FROM.to_dict() | {"versions": {}})) == older


@pytest.mark.parametrize("field", ["images", "labels", "weights", "precision", "store", "start"])
def test_a_run_with_another_provenance_is_not_resumed_and_a_notice_says_why(tmp_path, field):
    made(tmp_path / "a", **{field: "other"})
    with pytest.warns(Notice, match=f"step 0; a differs in {field}"):
        assert find_run(tmp_path, WANTED, MADE_FROM) is None


def test_a_run_of_another_experiment_is_not_resumed(tmp_path):
    made(tmp_path / "a", WANTED.but(steps=11))
    with pytest.warns(Notice, match=r"step 0\.$"):
        assert find_run(tmp_path, WANTED, MADE_FROM) is None


@pytest.mark.parametrize("content", ['{"published": true}', "{"])
def test_runs_of_other_versions_and_damaged_ones_do_not_stop_the_search(tmp_path, content):
    (made(tmp_path / "b") / "experiment.json").write_text(content)
    with pytest.warns(Notice, match=r"step 0\.$"):
        assert find_run(tmp_path, WANTED, MADE_FROM) is None
    other = made(tmp_path / "a")
    assert find_run(tmp_path, WANTED, MADE_FROM) == other


@pytest.fixture
def experiment(scenes_root, backbone_file, tmp_path):
    return tiny_experiment(shutil.copytree(scenes_root, tmp_path / "data"), backbone_file, steps=2)


def test_a_run_is_resumed_wherever_its_data_lie_but_not_on_other_data(experiment, tmp_path):
    run = train(experiment, runs_dir=tmp_path / "runs")
    shutil.copytree(tmp_path / "data", tmp_path / "moved", copy_function=shutil.copyfile)
    moved = experiment.but(data_root=str(tmp_path / "moved"), mirror=False)
    assert train(moved, runs_dir=tmp_path / "runs", resume=True).folder == run.folder
    image = open_dataset("scenes", tmp_path / "moved", "train").images[0]
    Image.open(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(image)
    with pytest.warns(Notice, match="differs in images"):
        assert train(moved, runs_dir=tmp_path / "runs", resume=True).folder != run.folder


def test_a_shared_run_is_not_resumed(experiment, tmp_path):
    train(experiment, runs_dir=tmp_path / "runs").save_pretrained(tmp_path / "given")
    shared = load_run(tmp_path / "given", runs_dir=tmp_path / "runs", backbone=experiment.backbone)
    with pytest.warns(Notice, match="no run to resume"):
        run = train(experiment, runs_dir=shared.folder.parent, resume=True)
    assert run.folder != shared.folder


def test_each_evaluation_has_its_own_record_and_predict_uses_that_of_the_own_data(experiment, tmp_path):
    run = train(experiment, runs_dir=tmp_path / "runs")
    shutil.copytree(tmp_path / "data", tmp_path / "other")
    for path in (tmp_path / "other" / "scenes").rglob("val/*.png"):
        Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)
    record = evaluate(run)
    others = [
        evaluate(run, "train"),
        evaluate(load_run(run.folder, data_root=str(tmp_path / "other"))),
        evaluate(load_run(run.folder, eval_size=32)),
    ]
    assert run.metrics == record
    kept = [read_json(path) for path in run.folder.glob("metrics-*.json")]
    assert len(kept) == 3 and all(other in kept for other in others), "each in a file of its own"
    shutil.move(tmp_path / "data", tmp_path / "moved")
    assert evaluate(load_run(run.folder, data_root=str(tmp_path / "moved")))["data"] == record["data"]
    assert len(list(run.folder.glob("metrics*.json"))) == 4, "the same evaluation replaces its record"


def test_a_record_tells_when_it_was_scored_in_another_way_than_the_run_was_trained(experiment, tmp_path):
    """Else its scores would be averaged with those of runs that were trained and scored alike."""
    run = train(experiment, runs_dir=tmp_path / "runs")
    alike = Provenance.from_dict(evaluate(run, baselines=False)["provenance"])
    assert alike.differing(run.provenance) == []
    other = evaluate(load_run(run.folder, feature_store="online"), baselines=False)["provenance"]
    assert Provenance.from_dict(other).differing(alike) == ["store"]


def test_a_run_that_must_not_change_is_used_as_a_copy(scenes_root, backbone_file, tmp_path):
    run = train(tiny_experiment(scenes_root, backbone_file, steps=2, keep_every=1), runs_dir=tmp_path / "theirs")
    before = {path: path.read_bytes() for path in run.folder.rglob("*.*")}
    copy = load_run(run.folder, runs_dir=tmp_path / "mine")
    record = evaluate(copy, baselines=False)
    copy.name_segments({copy.segments.names[0]: "mine"})
    again = load_run(run.folder, runs_dir=tmp_path / "mine")
    assert again.folder == copy.folder and again.matched and again.segments.names[0] == "mine"
    assert before == {path: path.read_bytes() for path in run.folder.rglob("*.*")}
    assert record == evaluate(run, baselines=False) | {"evaluation_seconds": record["evaluation_seconds"]}


def test_folders_that_cannot_be_written_are_an_error_before_work(scenes_root, backbone_file, tmp_path):
    (tmp_path / "file").touch()
    experiment = tiny_experiment(scenes_root, backbone_file, steps=2)
    with pytest.raises(StegoError, match="file"):
        train(experiment.but(data_root=str(tmp_path / "nowhere")), runs_dir=tmp_path / "file" / "runs")
    run = train(experiment, runs_dir=tmp_path / "runs")
    run.folder = tmp_path / "file" / "run"
    with pytest.raises(StegoError, match="runs_dir"):
        evaluate(run)
