"""`~` and variables are expanded in what a user typed; an empty path is an error and not the working folder."""

from pathlib import Path

import pytest
from common import tiny_experiment

from stego_lib import StegoError, evaluate, load_run, open_dataset, train
from stego_lib.segment import segment_folder
from stego_lib.utils.paths import shown_path, user_path

pytestmark = pytest.mark.usefixtures("few_samples")


def test_the_home_folder_in_every_path(monkeypatch, tmp_path, scenes_root, backbone_file):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir(), work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    (home / "data").symlink_to(scenes_root)
    (home / "tiny.safetensors").symlink_to(backbone_file)
    experiment = tiny_experiment(Path("~/data"), Path("~/tiny.safetensors"), steps=2)
    run = train(experiment, runs_dir="~/runs")
    assert run.folder.parent == home / "runs"
    opened = load_run(f"~/runs/{run.folder.name}")
    assert evaluate(opened, baselines=False)["scores"]
    images = open_dataset("scenes", "~/data", "val").images[0].parent
    (home / "images").symlink_to(images)
    segment_folder(opened, "~/images", "~/segmented")
    assert (home / "segmented" / "areas.csv").exists() and not list(work.iterdir()), "no folder called ~"


@pytest.mark.parametrize("use", [lambda: open_dataset("scenes", "", "val"), lambda: load_run(" ")])
def test_an_empty_path_is_an_error(use):
    with pytest.raises(StegoError, match="empty"):
        use()


def test_expansion(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    expected = {"$SCRATCH/runs": "/scratch/me/runs", "cost $5": "cost $5", "a~/~": "a~/~", "~": str(tmp_path)}
    assert {text: str(user_path(text)) for text in expected} == expected
    assert user_path(None, "~/x") == tmp_path / "x" and user_path("y", "~/x") == Path("y")
    assert shown_path("/nowhere/x") == "/nowhere/x"
