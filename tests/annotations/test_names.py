"""Names of segments and branches: merged, dropped, kept beside the run, and refused for other clusters."""

import json
import shutil
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from common import tiny_experiment
from PIL import Image

from stego_lib import StegoError, evaluate, load_run, train
from stego_lib.annotations.names import branches
from stego_lib.segment import segment_folder

NAMES = {"cluster 0": "road", "cluster 3": "road", "cluster 5": None, "cluster 7": "the sky"}


@pytest.fixture
def run(run, tmp_path):
    """A copy of the run, which may be changed."""
    return load_run(shutil.copytree(run.folder, tmp_path / "runs" / "run"))


@pytest.fixture
def image(tmp_path):
    (tmp_path / "in").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((320, 200)).save(tmp_path / "in" / "a.png")
    return tmp_path / "in" / "a.png"


def test_names_merge_and_drop_clusters_everywhere(run, image, tmp_path):
    before, known = run.predict(image), run.segments
    assert len(np.unique(before)) > 4, "else this test shows little"
    run.name_segments(NAMES)
    for named in (run, load_run(run.folder)):
        assert named.segments.names == ("road", "cluster 1", "cluster 2", "cluster 4", "cluster 6", "the sky")
        assert named.segments.colors[0] == known.colors[0] and named.unnamed_segments == known
        now = named.predict(image)
        for cluster, name in enumerate(known.names):
            expected = NAMES.get(name, name)
            id_ = 255 if expected is None else named.segments.names.index(expected)
            assert (now[before == cluster] == id_).all()
    table = segment_folder(run, image.parent, tmp_path / "out", format="coco-panoptic")
    written = pd.read_csv(tmp_path / "out" / "areas.csv", index_col=0)
    assert list(table.columns) == list(written.columns) == list(run.segments.names)
    kept = before != 5
    assert table.loc["a.png", "road"] == pytest.approx(100 * np.isin(before, (0, 3))[kept].mean())
    categories = json.loads((tmp_path / "out" / "panoptic.json").read_text())["categories"]
    assert [one["name"] for one in categories] == list(run.segments.names)
    run.name_segments(None)
    assert run.segments == known and (run.predict(image) == before).all()


def test_names_outlast_evaluation_and_do_not_touch_scores(run, image):
    plain = evaluate(run, baselines=False)
    (run.folder / "metrics.json").unlink()
    before = run.predict(image)
    run.name_segments(NAMES)
    assert evaluate(run, baselines=False)["scores"] == plain["scores"] and run.matched
    now, names = run.predict(image), run.segments.names
    assert (now[before == 5] == 255).all() and (now[np.isin(before, (0, 3))] == names.index("road")).all()
    others = [
        run.classes.names[class_] for cluster, class_ in enumerate(plain["matching"]) if cluster not in (0, 3, 5, 7)
    ]
    assert set(names) == {"road", "the sky", *others}, "clusters that were not named have the names of their classes"


def test_a_class_takes_a_cluster_that_is_called_like_it(run, image):
    evaluate(run, baselines=False)
    before, (first, second) = run.predict(image), run.classes.names[:2]
    run.name_segments({second: first})
    assert run.segments.names == tuple(name for name in run.classes.names if name != second)
    assert run.segments.colors[0] == run.classes.colors[0]
    np.testing.assert_array_equal(run.predict(image) == 0, before < 2)


def test_names_of_another_training_are_refused(run, image, scenes_root, backbone_file, tmp_path):
    other = train(tiny_experiment(scenes_root, backbone_file, steps=3), runs_dir=tmp_path / "others")
    run.name_segments(NAMES)
    (other.folder / "names.json").write_bytes((run.folder / "names.json").read_bytes())
    with pytest.raises(StegoError, match=r"names\.json"):
        other.predict(image)
    other.name_segments({"cluster 1": "tree"})
    assert other.segments.names[1] == "tree"


@pytest.mark.parametrize(
    "names",
    [
        {"cluster 9": "road"}, {"branch 7": "road"}, {"cluster 1": ""}, {"cluster 1": 5}, {"branch 0": None},
        {f"cluster {i}": None for i in range(8)},
    ],
    ids=str,
)  # fmt: skip
def test_bad_names_are_refused_and_earlier_names_stay(run, names):
    run.name_segments({"cluster 0": "sky"})
    with pytest.raises(StegoError):
        run.name_segments(names)
    assert run.segments.names[0] == "sky"


def test_branches_are_those_of_ward_linkage_by_brute_force():
    centers = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 10)[:, None]
    unit = centers / centers.norm(dim=1, keepdim=True)

    def spread(part):
        return float(sum(((unit[i] - unit[list(part)].mean(0)) ** 2).sum() for i in part))

    parts, joined = [(cluster,) for cluster in range(9)], []
    while len(parts) > 1:
        rise = {(a, b): spread(a + b) - spread(a) - spread(b) for a, b in combinations(parts, 2)}
        a, b = min(rise, key=rise.get)
        joined.append((sorted(a + b), (2 * rise[a, b]) ** 0.5))
        parts = [part for part in parts if part not in (a, b)] + [a + b]
    nodes = branches(centers)
    assert list(nodes) == [f"branch {number}" for number in range(8)]
    for node, (clusters, height) in zip(nodes.values(), reversed(joined), strict=True):
        assert sorted(node.pre_order()) == clusters and node.dist == pytest.approx(height, abs=1e-5)


def test_a_branch_names_its_clusters_and_what_is_inside_overrides_it(run, image):
    before = run.predict(image)
    tree = run.branches
    inner = next(name for name in tree if 2 < len(tree[name]) < 8)
    part = next(name for name in tree if set(tree[name]) < set(tree[inner]))
    own = tree[part][0]
    run.name_segments({f"cluster {cluster}": "plant" for cluster in tree[inner]})
    one_by_one = run.segments, run.predict(image)
    run.name_segments({inner: "plant"})
    assert run.segments == one_by_one[0]
    np.testing.assert_array_equal(run.predict(image), one_by_one[1])
    names = {f"cluster {own}": "tree", part: None, inner: "plant"}
    for ordered in (names, dict(reversed(names.items()))):
        run.name_segments(ordered)
        now, segments = run.predict(image), run.segments.names
        named = dict.fromkeys(tree[inner], "plant") | dict.fromkeys(tree[part]) | {own: "tree"}
        for cluster in range(8):
            name = named.get(cluster, f"cluster {cluster}")
            expected = 255 if name is None else segments.index(name)
            assert (now[before == cluster] == expected).all()
