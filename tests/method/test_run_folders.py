"""Which folder a run gets, and which runs are found again."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stego_lib import Experiment, StegoError
from stego_lib import run as run_module
from stego_lib.run import find_run, new_folder, newest_run
from stego_lib.utils.files import save_state, write_json
from stego_lib.utils.notices import Notice

ASKED = Experiment(steps=10, seed=1)
BACKBONE = SimpleNamespace(weights_id="ours")
DATA = {"images": "these", "all": "these and their labels"}


def made(folder: Path, experiment: object = ASKED, weights: str | None = "ours", data: object = DATA) -> Path:
    """A run folder with the least that it takes to be found."""
    state = {"step": 3, "model": {"feature_mean": torch.zeros(1, 2, 1, 1)}, "optimizer": {}, "shifts": [0.1, 0.2, 0.3]}
    state["data"] = data
    save_state(folder / "checkpoint.pt", state if weights is None else state | {"backbone_weights": weights})
    write_json(folder / "experiment.json", experiment.to_dict() if isinstance(experiment, Experiment) else experiment)
    return folder


# ---------------------------------------------------------------------------------------------- a new folder


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path):
    """Below a folder that is made if need be; named by time and experiment."""
    where = tmp_path / "not" / "there yet"
    found = [new_folder(where, ASKED) for _ in range(30)]
    assert (
        len(set(found)) == 30
        and sorted(where.iterdir()) == sorted(found)
        and not any(map(list, map(Path.iterdir, found)))
    )
    names = re.compile(rf"(\d{{8}}-\d{{6}})-{re.escape(ASKED.name)}(-\d+)?")
    assert all(names.fullmatch(folder.name) for folder in found)
    moments = {names.fullmatch(folder.name)[1] for folder in found}
    for moment in moments:
        numbers = [names.fullmatch(folder.name)[2] for folder in found if folder.name.startswith(moment)]
        assert numbers == [None, *(f"-{number}" for number in range(2, len(numbers) + 1))]


def test_a_place_that_cannot_hold_runs_is_named(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StegoError, match=r"runs cannot be written .*name a folder that can"):
        new_folder(tmp_path / "runs", ASKED)


# ---------------------------------------------------------------------------------------------- finding a run again


def test_the_newest_run_of_this_experiment_is_found(tmp_path):
    """Newest by the time and number in its name; how and where it was computed does not matter, nor where its data lay."""
    assert (
        find_run(tmp_path, ASKED, BACKBONE, DATA) is None
        and find_run(tmp_path / "nowhere", ASKED, BACKBONE, DATA) is None
    )
    for number in ("", "-2", "-9"):
        made(tmp_path / f"20260102-000000-a{number}")
    second = made(
        tmp_path / "20260102-000000-a-10", ASKED.but(feature_store="online", device="cpu", data_root="elsewhere")
    )
    for number, change in enumerate(
        [dict(seed=2), dict(steps=11, code_dim=3, batch_size=2, points=4), dict(seed=4, backbone="other")]
    ):
        made(tmp_path / f"20260103-00000{number}-a", ASKED.but(**change))
    os.utime(second / "checkpoint.pt", (0, 0))
    assert find_run(tmp_path, ASKED, BACKBONE, DATA) == second
    assert find_run(tmp_path, ASKED.but(seed=3), BACKBONE, DATA) is None


@pytest.mark.parametrize("content", ["{", "[]", "[1]", "3", '{"steps": -1}', '{"novelty": 1}', '{"steps": []}'])
def test_a_run_that_cannot_be_read_is_passed_over_and_an_older_one_found(tmp_path, content):
    older = made(tmp_path / "20260101-000000-a")
    made(tmp_path / "20260102-000000-a")
    (tmp_path / "20260102-000000-a" / "experiment.json").write_text(content)
    with pytest.warns(Notice, match=r"20260102-000000-a/experiment\.json is passed over: "):
        assert find_run(tmp_path, ASKED, BACKBONE, DATA) == older


def test_a_run_without_a_checkpoint_is_no_run(tmp_path):
    older, newer = made(tmp_path / "20260101-000000-a"), made(tmp_path / "20260102-000000-a")
    (newer / "checkpoint.pt").unlink()
    assert find_run(tmp_path, ASKED, BACKBONE, DATA) == older
    (older / "checkpoint.pt").unlink()
    assert find_run(tmp_path, ASKED, BACKBONE, DATA) is None


def test_a_run_on_other_weights_is_passed_over_and_an_older_one_found(tmp_path):
    older = made(tmp_path / "20260101-000000-a")
    made(tmp_path / "20260102-000000-a", weights="theirs")
    with pytest.warns(Notice, match="20260102-000000-a is passed over: it was trained on other weights of"):
        assert find_run(tmp_path, ASKED, BACKBONE, DATA) == older


@pytest.mark.parametrize("other, why", [
    ({"images": "others", "all": "others too"}, "its training images were others"),
    ({"images": "these", "all": "and other labels"}, "the label maps of its training images have changed"),
])  # fmt: skip
def test_a_run_on_other_data_is_passed_over_and_an_older_one_found(tmp_path, other, why):
    older = made(tmp_path / "20260101-000000-a")
    made(tmp_path / "20260102-000000-a", data=other)
    with pytest.warns(Notice, match=f"20260102-000000-a is passed over: {why}"):
        assert find_run(tmp_path, ASKED, BACKBONE, DATA) == older


def test_of_a_checkpoint_that_does_not_name_its_data_the_place_tells(tmp_path):
    """Those of earlier versions; the same place, however it is spelled."""
    folder = made(tmp_path / "20260101-000000-a", ASKED.but(data_root="data/../data"), data=None)
    assert find_run(tmp_path, ASKED.but(data_root=str(Path("data").resolve())), BACKBONE, DATA) == folder
    with pytest.warns(Notice, match="it was trained on data in .*, and does not tell which files these were"):
        assert find_run(tmp_path, ASKED.but(data_root="elsewhere"), BACKBONE, DATA) is None


def test_the_same_weights_may_have_another_name_or_place_now(tmp_path):
    """A file that was moved, or a network by its long name; other weights under another name are another experiment."""
    folder = made(tmp_path / "20260101-000000-a", ASKED.but(backbone="/a/mine.safetensors"))
    assert find_run(tmp_path, ASKED.but(backbone="/b/mine.safetensors"), BACKBONE, DATA) == folder
    assert find_run(tmp_path, ASKED.but(backbone="vit_tiny_patch16_224"), BACKBONE, DATA) == folder
    with pytest.warns(
        Notice, match="no run of exactly this experiment .* has backbone /a/mine.safetensors, now dino_vits8"
    ):
        assert find_run(tmp_path, ASKED.but(backbone="dino_vits8"), SimpleNamespace(weights_id="theirs"), DATA) is None


def test_a_checkpoint_that_names_no_weights_is_taken(tmp_path):
    """Those of earlier versions."""
    assert find_run(tmp_path, ASKED, BACKBONE, DATA) is None
    folder = made(tmp_path / "20260101-000000-a", weights=None)
    assert find_run(tmp_path, ASKED, BACKBONE, DATA) == folder


def test_the_run_made_last_is_the_one_whose_checkpoint_is(tmp_path, monkeypatch):
    """Whatever the folders are called; those without a checkpoint are no runs."""
    folders = [made(tmp_path / name) for name in ("b", "c", "a")]
    for age, folder in enumerate(folders):
        os.utime(folder / "checkpoint.pt", (1000 + age, 1000 + age))
    (tmp_path / "d").mkdir()
    made(tmp_path / "features" / "deeper")
    assert newest_run(tmp_path) == newest_run(str(tmp_path)) == tmp_path / "a"
    monkeypatch.setattr(run_module, "runs_root", lambda: tmp_path)
    assert newest_run() == tmp_path / "a"
    with pytest.raises(StegoError, match=r"d holds no run; train one first"):
        newest_run(tmp_path / "d")
