"""`~` is the home folder at every door, and an empty path is an error and not the working folder."""

from pathlib import Path

import pytest
from common import ROOT, few_samples, tiny_experiment
from records import record

from stego_book.notebooks import parameters_of
from stego_book.plots import figures as plots
from stego_book.plots.style import save
from stego_book.studies.results import read_records
from stego_book.studies.seeds import run_seeds
from stego_book.studies.study import Study
from stego_lib import StegoError, evaluate, load_run, open_dataset, train
from stego_lib.backbone import Backbone
from stego_lib.features import open_features
from stego_lib.run import newest_run
from stego_lib.segment import segment_folder
from stego_lib.utils.files import read_json, write_json
from stego_lib.utils.paths import user_path


@pytest.fixture
def home(monkeypatch, tmp_path, scenes_root, backbone_file) -> Path:
    """A home folder with data and a backbone, and another working folder."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "home" / "data").symlink_to(scenes_root)
    (tmp_path / "home" / "tiny.safetensors").symlink_to(backbone_file)
    return tmp_path / "home"


def test_the_home_folder_at_every_door(home, monkeypatch, tmp_path):
    few_samples(monkeypatch)
    experiment = tiny_experiment(Path("~/data"), Path("~/tiny.safetensors"), steps=2)
    (kept,) = run_seeds(experiment, [0], "~/records", runs_dir="~/runs")
    assert kept["scores"] and read_records("~/records") == [kept]
    folder = newest_run("~/runs")
    assert folder.parent == home / "runs"
    run = load_run(f"~/runs/{folder.name}")
    assert train(experiment, runs_dir="~/runs", resume=True).folder == folder
    again = train(experiment.but(start_from=f"~/runs/{folder.name}", seed=1), runs_dir="~/runs")
    assert evaluate(again, baselines=False)["scores"] and again.folder.parent == home / "runs"
    images = open_dataset("scenes", "~/data", "val").images[0].parent
    (home / "images").symlink_to(images)
    segment_folder(run, "~/images", "~/segmented")
    assert (home / "segmented" / "areas.csv").exists()
    assert run.predict(f"~/images/{sorted(images.iterdir())[0].name}") is not None
    write_json("~/one.json", record(0))
    assert read_json("~/one.json")["step"] == 5
    assert Study([], [], "~/records").folder == home / "records"
    store = open_features(open_dataset("scenes", "~/data", "val"), Backbone.of(experiment), 64, "~/runs/features")
    assert store.folder.is_relative_to(home)
    figure = plots.curves(run.log)
    assert save(figure, "~/figures", "curves").is_relative_to(home)
    assert "steps" in parameters_of(ROOT / "notebooks" / "train.ipynb")
    assert not list(Path.cwd().iterdir()), "no folder called ~"


@pytest.mark.parametrize(
    "door",
    [
        lambda: open_dataset("scenes", "", "val"),
        lambda: load_run(""),
        lambda: load_run(" "),
        lambda: newest_run(""),
        lambda: read_records(""),
        lambda: write_json("", {}),
        lambda: user_path(None),
    ],
)
def test_an_empty_path_is_an_error(door):
    with pytest.raises(StegoError, match="an empty path names nothing"):
        door()


def test_what_only_looks_like_a_home_folder_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StegoError, match="~nobody-of-this-name/x: there is no home folder of that name"):
        user_path("~nobody-of-this-name/x")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~odd").mkdir()
    assert user_path("~odd") == Path("~odd"), "what is there is meant"
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert user_path("$SCRATCH/runs") == Path("/scratch/me/runs") and user_path("cost $5") == Path("cost $5")
    assert user_path("a~/~") == Path("a~/~") and user_path(Path("~")) == tmp_path
    assert user_path(None, "~/x") == tmp_path / "x" and user_path("y", "~/x") == Path("y")
