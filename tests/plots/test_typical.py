"""Typical patches of clusters, and the form for their names."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from standins import noise_images

from stego_book.plots.grids import first_images
from stego_book.plots.typical import name_form, tree_rows, typical_patches
from stego_lib import StegoError
from stego_lib.datasets.images import as_tensor
from stego_lib.utils.notices import Notice


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return noise_images(tmp_path_factory.mktemp("images"), (160, 128), (96, 200), (128, 128))


def test_typical_patches_are_the_nearest_cells_of_each_image(run, paths):
    patches, shares = typical_patches(run, paths, 2)
    centers = run.model.cluster_probe.clusters.detach()
    expected, cells = {cluster: [] for cluster in range(8)}, np.zeros(8)
    for path in paths:
        with torch.inference_mode():
            code = run.scores(as_tensor(path, run.classes.rules)[0]).code[0]
        best = {}
        for row in range(code.shape[1]):
            for column in range(code.shape[2]):
                cosines = F.cosine_similarity(centers, code[:, row, column][None])
                cluster = int(cosines.argmax())
                cells[cluster] += 1
                if cluster not in best or cosines[cluster] > best[cluster][0]:
                    best[cluster] = (float(cosines[cluster]), path, row, column)
        for cluster, patch in best.items():
            expected[cluster].append(patch)
    np.testing.assert_allclose(shares, cells / cells.sum())
    for cluster, chosen in enumerate(patches):
        wanted = sorted(expected[cluster], reverse=True)[:2]
        assert [(patch.image, patch.row, patch.column) for patch in chosen] == [patch[1:] for patch in wanted]
    for wrong in ([], 2), (paths, 0):
        with pytest.raises(StegoError, match="at least 1"):
            typical_patches(run, *wrong)
    run.teach(paths, pd.DataFrame({"image": [path.name for path in paths[:2]], "x": 3, "y": 3, "name": ["a", "b"]}))
    with pytest.raises(StegoError, match="teach"):
        typical_patches(run, paths)
    run.teach(None)


def test_unreadable_images_are_left_out(run, paths, tmp_path):
    broken = tmp_path / "0.png"
    broken.write_bytes(b"")
    with pytest.warns(Notice, match=r"1 of 3 .*0\.png"):
        _, shares = typical_patches(run, [broken, *paths[1:]])
    np.testing.assert_array_equal(shares, typical_patches(run, paths[1:])[1])
    assert list(first_images([broken, *paths], 2)) == paths[:2]
    for use in (lambda: typical_patches(run, [broken]), lambda: first_images([broken])):
        with pytest.raises(StegoError, match=r"0\.png cannot be read"):
            use()


def test_rows_are_the_highest_branches_that_hold_something(run):
    shares = np.full(8, 1 / 8)
    tree = run.branches
    for count in (1, 3, 8, 20):
        rows = tree_rows(run, shares, count)
        assert len(rows) == min(count, 8)
        assert sorted(cluster for clusters in rows.values() for cluster in clusters) == list(range(8))
        assert not set(rows) & {name for name in tree if int(name.split()[1]) < count - 1}, "split already"
        assert all(rows[name] == [int(name.split()[1])] or sorted(rows[name]) == tree[name] for name in rows)
    inside = tree_rows(run, shares, 20, "branch 1")
    assert sorted(cluster for clusters in inside.values() for cluster in clusters) == tree["branch 1"]
    shares[tree["branch 1"]] = 0
    assert not set(tree["branch 1"]) & {c for clusters in tree_rows(run, shares).values() for c in clusters}
    with pytest.raises(StegoError, match="branch 7"):
        tree_rows(run, shares, 20, "branch 7")


def test_the_form_saves_names_merges_and_drops(run, monkeypatch):
    pytest.importorskip("ipywidgets")
    assert name_form(run) is None, "outside of notebooks"
    monkeypatch.setattr("IPython.get_ipython", lambda: object())
    fields, below = name_form(run).children
    assert [field.value for field in fields.children] == list(run.segments.names)
    fields.children[0].value = fields.children[1].value = " sky "
    fields.children[2].value = ""
    below.children[0].click()
    assert run.segments.names == ("sky", *(f"cluster {i}" for i in range(3, 8))) and run.names[2] is None
    fields = name_form(run).children[0]
    assert [field.value for field in fields.children[:4]] == ["sky", "sky", "", "cluster 3"]
    run.name_segments(None)
    rows = tree_rows(run, np.full(8, 1 / 8), 2)
    branch, clusters = max(rows.items(), key=lambda row: len(row[1]))
    exception = f"cluster {clusters[0]}"
    fields, below = name_form(run, rows | {exception: clusters[:1]}).children
    assert [field.description for field in fields.children] == [*rows, exception]
    by_name = {field.description: field for field in fields.children}
    by_name[branch].value, by_name[exception].value = "plant", "tree"
    below.children[0].click()
    assert [run.names[cluster] for cluster in clusters] == ["tree", *["plant"] * (len(clusters) - 1)]
    again = {field.description: field.value for field in name_form(run, rows).children[0].children}
    assert again[branch] == "plant" and again[exception] == "tree" and len(again) == 3
    run.name_segments(None)
