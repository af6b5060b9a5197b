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
from stego_lib.watch import Watch, effective_clusters, effective_groups, nearest_elsewhere


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


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_groups_at_right_angles_are_counted(groups):
    codes = torch.eye(6)[:groups].repeat_interleave(100, 0).expand(4, -1, -1)
    assert effective_groups(codes) == pytest.approx((groups, groups), rel=0.01)
    assert nearest_elsewhere(codes) == pytest.approx(1)


def test_a_code_for_each_image_is_collapse_within_images():
    codes = torch.eye(6)[:4].repeat_interleave(5, 0).view(4, 5, 6)
    assert effective_groups(codes) == (float("inf"), pytest.approx(1))


def test_codes_that_are_opposite_have_the_opposite_of_a_like():
    """Those of the same image are no like, however near they are."""
    codes = torch.tensor([1.0, -1.0]).view(2, 1, 1).expand(2, 3, 1)
    assert nearest_elsewhere(codes) == -1 and effective_groups(codes) == (float("inf"), 1)


@pytest.mark.parametrize("counts, expected", [((5, 5, 5), 3), ((7, 0, 0), 1), ((4, 4, 0), 2)])
def test_clusters_in_use_are_counted(counts, expected):
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    assert effective_clusters(labels, 3) == pytest.approx(expected)


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


class Grid:
    """Features (count, 5, side, side) of which each channel says the image's number and the cell's."""

    def __init__(self, count: int, side: int = 8):
        self.count, self.side = count, side

    def __len__(self):
        return self.count

    def rows(self, index):
        cells = torch.arange(self.side**2).view(self.side, self.side)
        return (100 * index.view(-1, 1, 1, 1) + cells).expand(-1, 5, -1, -1).float()


@pytest.mark.parametrize(("count", "side", "looked"), [(100, 8, (32, 16)), (33, 8, (32, 16)), (7, 3, (7, 9))])
def test_places_all_over_the_set_are_looked_at_once_each(tmp_path, scenes_root, backbone_file, count, side, looked):
    found = Watch(tmp_path, Grid(count, side), experiment(scenes_root, backbone_file), 0).features[:, 0, :, 0]
    images, cells = found[:, 0] // 100, found[0] % 100
    assert torch.equal(found, 100 * images[:, None] + cells) and found.shape == looked
    for numbers, total in ((images, count), (cells, side**2)):
        steps = numbers.diff()
        assert numbers[0] == 0 and numbers[-1] == total - 1 and steps.min() >= 1 and steps.max() - steps.min() <= 1


class Divided(Stego):
    """A model whose codes point to the first cluster in one half of the cells, to the second in the other."""

    def forward(self, features):
        count, _, places, _ = features.shape
        return torch.eye(2)[torch.arange(places) % 2].T.expand(count, -1, -1)[..., None]


def test_clusters_are_those_that_the_probe_chooses(tmp_path, scenes_root, backbone_file):
    """The third cluster points away from all codes."""
    model = Divided(5, 2, 3)
    model.cluster_probe.clusters.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    found = Watch(tmp_path, Grid(6), experiment(scenes_root, backbone_file), 0)
    found.update(model, 25)
    assert found.record["clusters"] == [2.0] and found.record["collapsed"] is False


@pytest.mark.parametrize("mode", [True, False])
def test_a_look_draws_nothing_drops_nothing_and_leaves_the_model_as_it_is(
    tmp_path, scenes_root, backbone_file, monkeypatch, mode
):
    monkeypatch.setattr(watch, "EVERY", 2)
    model, before = Stego(5, 6, 3, dropout=0.8).train(mode), torch.get_rng_state()
    found = Watch(tmp_path, Grid(9), experiment(scenes_root, backbone_file), 0)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for step in (2, 4, 5):
        found.update(model, step)
    seen = read_json(tmp_path / "watch.json")
    assert seen["steps"] == [2, 4] and all(len(set(seen[name])) == 1 for name in watch.MEASURES)
    assert all(model.training == module.training == mode for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(
        torch.equal(value, weights[name]) and not value.requires_grad for name, value in model.state_dict().items()
    )


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
    with pytest.warns(Notice, match=r"step 50: .*scattered.*lower the shifts"):
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
