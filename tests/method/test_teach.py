"""A few labels on the codes of a run."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from common import tiny_experiment
from PIL import Image
from randomrun import random_run, tomatoes, written
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from stego_lib import StegoError, evaluate, load_run, open_dataset, train
from stego_lib.suggest import typical


@pytest.fixture
def run(tmp_path):
    return written(random_run(tmp_path, eval_size=64, mirror=False, crf=False))


@pytest.fixture
def images(tmp_path):
    return tomatoes(tmp_path / "images")


@pytest.fixture
def clicks():
    places = [("a.png", 10, 12), ("a.png", 80.4, 50), ("a.png", 70, 8), ("b.png", 20, 56), ("b.png", 90, 20)]
    rows = [(*place, "tomato" if place[1] < 48 else "grass") for place in places]
    return pd.DataFrame(rows, columns=["image", "x", "y", "name"])


def codes_of(run, path):
    with torch.inference_mode():
        return run.code(torch.from_numpy(np.array(Image.open(path))).movedim(-1, 0)[None])


@pytest.mark.parametrize("on", ["codes", "features"])
@pytest.mark.parametrize("method", ["logistic", "neighbors"])
def test_clicks_name_both_halves_of_another_image_and_are_kept(run, images, clicks, method, on):
    taught = run.teach(images, clicks, method, on)
    assert taught.labels == {"tomato": 2, "grass": 3} and list(taught.images.values()) == ["a.png", "b.png"]
    for opened in (run, load_run(run.folder)):
        assert opened.segments.names == ("tomato", "grass")
        label = opened.predict(images / "c.png")
        assert (label[:, :40] == 0).mean() > 0.95 and (label[:, 56:] == 1).mean() > 0.95


def test_label_maps_fit_what_a_naive_loop_collects(run, images):
    label = np.full((64, 96), 255, np.uint8)
    label[:20, 30:66], label[5:17, 40:60] = 1, 0
    taught = run.teach([images / "a.png"], [label], "neighbors", names=["thing", "stuff"])
    codes = codes_of(run, images / "a.png")[0]
    _, height, width = codes.shape
    expected, ids = [], []
    for row in range(height):
        for column in range(width):
            cell = label[
                row * 64 // height : (row + 1) * 64 // height, column * 96 // width : (column + 1) * 96 // width
            ]
            votes = [(cell == 0).sum(), (cell == 1).sum()]
            if sum(votes):
                expected.append(F.normalize(codes[:, row, column], dim=0))
                ids.append(int(np.argmax(votes)))
    torch.testing.assert_close(taught.points, torch.stack(expected))
    assert taught.ids.tolist() == ids and taught.labels == {"thing": 240, "stuff": 480}


def test_neighbors_vote_as_in_a_naive_loop(run, images):
    label = np.random.default_rng(0).integers(0, 3, (64, 96)).astype(np.uint8)
    taught = run.teach([images / "a.png"], [label], "neighbors")
    codes = codes_of(run, images / "b.png")
    scores = taught.scores(codes).grid[0]
    for row, column in ((0, 0), (3, 5), (7, 11)):
        cosines = taught.points @ F.normalize(codes[0, :, row, column], dim=0)
        weights, votes = torch.exp(cosines / 0.02 - cosines.max() / 0.02), torch.zeros(3)
        for number in cosines.argsort(descending=True)[:30].tolist():
            votes[taught.ids[number]] += weights[number]
        torch.testing.assert_close(scores[:, row, column], (votes / votes.sum()).clamp(min=1e-4).log())


def logistic_by_hand(run, images, cells, names, total, balance):
    """Scikit-learn's weights and biases of raw codes for cells [(file, row, column)] with a total weight."""
    codes = {name: codes_of(run, images / name)[0].double() for name in dict.fromkeys(name for name, *_ in cells)}
    scaler = StandardScaler().fit(torch.cat([code.flatten(1).T for code in codes.values()]))
    points = scaler.transform(torch.stack([codes[name][:, row, column] for name, row, column in cells]))
    weights = np.array([1 / names.count(name) ** balance for name in names])
    regression = LogisticRegression(C=total, tol=1e-8, max_iter=9999)
    fitted = regression.fit(points, names, sample_weight=weights / weights.sum())
    weight = fitted.coef_ / scaler.scale_
    return np.column_stack([weight, fitted.intercept_ - weight @ scaler.mean_])


def test_logistic_is_scikit_learns_and_an_image_counts_for_at_most_ten_observations(run, images):
    """Label maps of 8 x 12 cells: 36 labeled cells of one image count as 10, the 6 of the other as 6."""
    ids = {"a.png": np.full((8, 12), 255), "b.png": np.full((8, 12), 255)}
    ids["a.png"][:6, :6], ids["b.png"][2, :6] = np.arange(36).reshape(6, 6) % 7 % 3, [0, 1, 1, 2, 2, 2]
    maps = [np.kron(grid, np.ones((8, 8), int)) for grid in ids.values()]
    taught = run.teach([images / name for name in ids], maps, names=["a", "b", "c"])
    cells = [(name, row, column) for name, grid in ids.items() for row, column in np.argwhere(grid < 255)]
    names = [int(ids[name][row, column]) for name, row, column in cells]
    expected = logistic_by_hand(run, images, cells, names, total=10 + 6, balance=0.5)
    np.testing.assert_allclose(taught.points, expected, rtol=1e-2, atol=1e-2 * np.abs(expected).max())


def test_clicks_of_an_image_count_as_one_observation_and_names_have_the_same_weight(run, images):
    cells = [("a.png", 1, 2), ("a.png", 6, 8), ("a.png", 3, 3), ("b.png", 2, 10), ("b.png", 5, 1), ("b.png", 7, 6)]
    names = ["x", "y", "x", "z", "x", "x"]
    rows = [(file, 8 * x + 3.5, 8 * y + 3.5, name) for (file, y, x), name in zip(cells, names, strict=True)]  # centers
    taught = run.teach(images, pd.DataFrame(rows, columns=["image", "x", "y", "name"]))
    expected = logistic_by_hand(run, images, cells, names, total=2, balance=1)
    assert taught.names == ("x", "y", "z")
    np.testing.assert_allclose(taught.points, expected, rtol=1e-2, atol=1e-2 * np.abs(expected).max())


def test_labels_change_neither_head_nor_clusters_and_can_be_forgotten(run, images, clicks):
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    clusters, names = run.predict(images / "c.png"), run.segments.names
    run.teach(images, clicks)
    with pytest.raises(StegoError, match="teach"):
        run.name_segments({"tomato": "apple"})
    run.teach(None)
    assert run.taught is None and run.segments.names == names
    np.testing.assert_array_equal(run.predict(images / "c.png"), clusters)
    assert all(value.equal(before[name]) for name, value in run.model.state_dict().items())


def test_labels_of_other_codes_are_an_error(run, images, clicks):
    run.teach(images, clicks)
    with torch.no_grad():
        next(run.model.head.parameters()).add_(1)
    run.save(torch.optim.Adam(run.model.parameters()), {})
    with pytest.raises(StegoError, match="teach"):
        load_run(run.folder).predict(images / "c.png")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"x": 96.0}, "outside"), ({"image": "d.png"}, "d.png"), ({"name": "Tomato"}, "Tomato"),
        ({"x": "left"}, "number"), ({"name": None}, "name"),
    ],
)  # fmt: skip
def test_a_wrong_click_is_named(run, images, clicks, change, word):
    table = clicks.astype(object)
    for column, value in change.items():
        table.loc[1, column] = value
    with pytest.raises(StegoError, match=word):
        run.teach(images, table)
    assert run.taught is None


def test_names_in_a_file_stay_text_and_do_not_depend_on_the_default_dtype(run, images, clicks, tmp_path):
    table = clicks.replace({"name": {"tomato": "1", "grass": "NA"}})
    expected = run.teach(images, table)
    table.to_csv(tmp_path / "clicks.csv", index=False)
    torch.set_default_dtype(torch.float64)
    try:
        taught = run.teach(images, tmp_path / "clicks.csv")
    finally:
        torch.set_default_dtype(torch.float32)
    assert taught.names == ("1", "NA") and taught.points.equal(expected.points)


def test_names_of_images_may_differ_in_unicode_normalization(run, images, clicks):
    (images / "b.png").rename(images / "u\u0308.png")
    taught = run.teach(images, clicks.replace({"image": {"b.png": "\u00fc.png"}}))
    assert taught.labels == {"tomato": 2, "grass": 3} and list(taught.images.values()) == ["a.png", "\u00fc.png"]


def test_files_that_are_no_table_of_clicks_are_named(run, images, clicks, tmp_path):
    (tmp_path / "empty.csv").touch()
    clicks.to_csv(tmp_path / "semicolons.csv", index=False, sep=";")
    for path, word in (
        (tmp_path / "none.csv", "none.csv"),
        (tmp_path / "empty.csv", "empty.csv"),
        (tmp_path / "semicolons.csv", "commas"),
        (images, "images"),
    ):
        with pytest.raises(StegoError, match=word):
            run.teach(images, path)
    with pytest.raises(StegoError, match="same file name"):
        run.teach([images / "a.png", tmp_path / "a.png"], clicks)
    with pytest.raises(StegoError, match="0 images"):
        run.teach([], [])


def test_wrong_label_maps_are_named(run, images):
    label = np.zeros((64, 96), np.uint8)
    for labels, names, word in (
        ([label, label], None, "2 label maps"),
        ([label[:5]], None, "shape|pixel"),
        ([label], None, "one name|two"),
        ([label + 7], None, "id 7"),
    ):
        with pytest.raises(StegoError, match=word):
            run.teach([images / "a.png"], labels, names=names)
    with pytest.raises(StegoError, match="list of images"):
        run.teach(images, [label])
    with pytest.raises(StegoError, match="8-bit"):
        run.teach([images / "a.png"], [label], names=[f"name {i}" for i in range(256)])


def test_evaluate_scores_the_names_and_says_how_many_labels_there_were(scenes_root, backbone_file, tmp_path):
    run = train(tiny_experiment(scenes_root, backbone_file, steps=2, crf=False, mirror=False), runs_dir=tmp_path)
    images, labels = zip(*(open_dataset("scenes", scenes_root, "train")[i] for i in range(3)), strict=True)
    names = [*reversed(run.classes.names), "no class of these"]
    maps = [np.where(label < 0, 255, len(names) - 2 - label.numpy()) for label in labels]
    maps[0][:3] = len(names) - 1
    run.teach(list(images), maps, names=names)
    record = evaluate(load_run(run.folder), baselines=False)
    assert record["taught"]["images"] == 3 and sum(record["taught"]["labels"].values()) == sum(
        (map_ != 255).sum() for map_ in maps
    )
    correct = known = 0
    for image, label in open_dataset("scenes", scenes_root, "val"):
        predicted = np.array(run.segments.names)[run.predict(image)]
        expected = np.array([*run.classes.names, ""])[label]
        correct, known = correct + (predicted == expected).sum(), known + (label >= 0).sum().item()
    assert record["scores"]["taught"]["accuracy"] == pytest.approx(100 * correct / known)


def test_typical_points_are_nearest_to_the_centers_of_their_clusters():
    generator = torch.Generator().manual_seed(0)
    sizes, centers = [40, 10, 25, 5], 10 * torch.eye(4, 6)
    points = torch.cat([
        center + torch.randn(size, 6, generator=generator) for center, size in zip(centers, sizes, strict=True)
    ])  # fmt: skip
    expected, start = {}, 0
    for size in sizes:
        unit = F.normalize(points[start : start + size], dim=1)
        expected[size] = start + int((unit - unit.mean(0)).norm(dim=1).argmin())
        start += size
    assert typical(points, 4, seed=0).tolist() == [expected[size] for size in sorted(sizes, reverse=True)]


@pytest.mark.parametrize("on", ["codes", "features"])
def test_suggested_places_become_clicks(run, images, on):
    places = run.suggest(images, 12, on)
    assert list(places) == ["image", "x", "y"] and len(places.drop_duplicates()) == 12
    assert set(places["image"]) <= {"a.png", "b.png", "c.png"}
    assert places["x"].between(0, 95).all() and places["y"].between(0, 63).all() and places["x"].dtype == int
    listed = run.suggest(sorted(images.iterdir()), 12, on)
    pd.testing.assert_frame_equal(listed, places)
    assert not run.suggest(images, 12, on, seed=1).equals(places)
    two = run.suggest(images, 2, on)
    assert sorted(two["x"] < 48) == [False, True]
    run.teach(images, two.assign(name=np.where(two["x"] < 48, "tomato", "grass")), on=on)
    assert run.segments.names == tuple(run.taught.labels) and len(run.segments) == 2


def test_places_that_cannot_be_suggested(run, images, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, count, word in (
        (images, 0, "count"),
        (images, 3 * 8 * 12 + 1, "288"),
        ([], 1, "empty"),
        (tmp_path / "empty", 1, "image"),
        ([images / "a.png", images / "a.png"], 1, "same file name"),
    ):
        with pytest.raises(StegoError, match=word):
            run.suggest(folder, count)
