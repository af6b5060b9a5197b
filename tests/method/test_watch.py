"""The watch: its counts against loops and made-up codes; it fires once on a collapsed head, never on a healthy one."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from common import tiny_experiment

from stego_lib import load_run, train, training, watch
from stego_lib.evaluation import observed
from stego_lib.model import Stego
from stego_lib.utils.files import read_json
from stego_lib.utils.notices import Notice
from stego_lib.watch import Watch, effective_groups, nearest_elsewhere


def unit_codes(images: int = 3, places: int = 4, dim: int = 5):
    return F.normalize(torch.randn(images, places, dim, generator=torch.Generator().manual_seed(0)), dim=2)


def test_groups_and_likes_are_those_of_a_loop():
    codes, positive, own, nearest = unit_codes(), [], [], []
    for p, one in enumerate(codes):
        own += [max(float(a @ b), 0) for i, a in enumerate(one) for j, b in enumerate(one) if i != j]
        for a in one:
            others = [float(a @ b) for q, other in enumerate(codes) if q != p for b in other]
            positive += [max(value, 0) for value in others]
            nearest.append(max(others))
    expected = [len(values) / sum(values) for values in (positive, own)]
    assert effective_groups(codes) == pytest.approx(expected, rel=1e-5)
    assert nearest_elsewhere(codes) == pytest.approx(sum(nearest) / len(nearest), rel=1e-5)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(watch, "EVERY", 4)
    monkeypatch.setattr(watch, "FIRST_REPORT", 8)


def experiment(scenes_root, backbone_file, **changes):
    return tiny_experiment(scenes_root, backbone_file, steps=20, lr_head=3e-2, **changes)


def test_a_run_in_which_everything_attracts_collapses_and_says_so_once(scenes_root, backbone_file, tmp_path, quick):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = train(experiment(scenes_root, backbone_file, shifts=(-1, -1, -1)), runs_dir=tmp_path)
    told = [str(one.message) for one in caught if issubclass(one.category, Notice) and "collapsed" in str(one.message)]
    assert len(told) == 1 and "shifts='auto'" in told[0] and told[0].startswith("step 8: ")
    seen = run.watched
    assert seen["collapsed"] is True and seen["seen"] == told[0] and seen["steps"] == [4, 8, 12, 16, 20]
    assert seen["groups"][-1] < watch.MIN_GROUPS and all(1 <= value <= 8 for value in seen["clusters"])
    assert observed(run)["collapsed"] is True and observed(run)["codes"]["groups"] == seen["groups"][-1]


def test_the_last_step_is_looked_at_and_probes_fitted_after_it_counted(scenes_root, backbone_file, tmp_path, quick):
    run = train(tiny_experiment(scenes_root, backbone_file, steps=6, probes="after"), runs_dir=tmp_path)
    seen = run.watched
    assert seen["steps"] == [4, 6] and seen["clusters"][0] is None and 1 <= seen["clusters"][1] <= 8


class Unlike(Stego):
    """A model whose codes all stand at right angles, as far as its channels go."""

    def forward(self, features):
        count, _, places, _ = features.shape
        return torch.eye(count * places).view(count, places, -1).transpose(1, 2)[..., None]


def test_codes_without_their_like_have_scattered(tmp_path, scenes_root, backbone_file):
    class Store(list):
        def rows(self, index):
            return torch.zeros(len(index), 5, 2, 3)

    asked = experiment(scenes_root, backbone_file, probes="after")
    found = Watch(tmp_path, Store(range(7)), asked, 0)
    model = Unlike(5, 7 * 6, 3)
    with pytest.warns(Notice, match="step 50: .*scattered"):
        found.update(model, 50)
    assert read_json(tmp_path / "watch.json") == {
        "steps": [50], "groups": [None], "within": [None], "nearest": [0.0], "clusters": [None], "collapsed": True,
        "seen": found.record["seen"],
    }, "no groups: infinity is null; the probe waits for the end"  # fmt: skip


def test_a_calibrated_run_is_silent(scenes_root, tmp_path, quick):
    """The embedded backbone: the tiny one's weights are random, and its features hold nothing to tell apart."""
    healthy = tiny_experiment(
        scenes_root, "scenes_vit_tiny8", steps=12, lr_head=2e-3, shifts="auto", code_dim=16, points=5
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        run = train(healthy, runs_dir=tmp_path)
    assert run.watched["collapsed"] is False and run.watched["seen"] is None
    assert run.watched["groups"][-1] > 2


def test_watching_changes_nothing(scenes_root, backbone_file, tmp_path, quick, monkeypatch):
    one = train(experiment(scenes_root, backbone_file), runs_dir=tmp_path)
    monkeypatch.setattr(training.Watch, "update", lambda self, model, step: None)
    other = train(experiment(scenes_root, backbone_file), runs_dir=tmp_path)
    assert all(torch.equal(value, other.model.state_dict()[name]) for name, value in one.model.state_dict().items())
    assert observed(other).keys() == {"calibration"}


def test_a_resumed_run_has_seen_the_same(scenes_root, backbone_file, tmp_path, quick, monkeypatch):
    asked = experiment(scenes_root, backbone_file, shifts=(-1, -1, -1))
    with pytest.warns(Notice, match="collapsed"):
        whole = train(asked, runs_dir=tmp_path / "whole")
    monkeypatch.setattr(training, "SAVE_EVERY", 10)
    update, updated = Watch.update, []

    def stop(self, model, step):
        update(self, model, step)
        updated.append(step)
        if len(updated) == 13:
            raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "update", stop)
    with pytest.raises(KeyboardInterrupt), pytest.warns(Notice, match="collapsed"):
        train(asked, runs_dir=tmp_path / "broken")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)  # what was said is not said again
        resumed = train(asked, runs_dir=tmp_path / "broken", resume=True)
    assert resumed.watched == whole.watched and load_run(resumed.folder).watched == whole.watched
