"""What figures draw: the numbers that they are given, and a word where there are none."""

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from stego_book.plots import data as plots_data
from stego_book.plots import figures as plots
from stego_book.plots import grids, style
from stego_book.plots import study as plots_study
from stego_lib import open_dataset
from stego_lib.datasets import Classes
from stego_lib.utils.notices import Notice


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def log(steps: int = 9) -> pd.DataFrame:
    rng, columns = np.random.default_rng(0), [f"{what}_{kind}" for what in ("loss", "code") for kind in plots.KINDS]
    found = pd.DataFrame(rng.normal(size=(steps, len(columns))), columns=columns)
    return found.assign(loss_cluster=rng.normal(size=steps), loss_linear=np.nan)


def test_curves_are_moving_averages_of_all_steps_and_leave_out_what_was_not_trained():
    values = log()
    left, middle, right = plots.curves(values, span=4).axes
    for axis, what in ((left, "loss"), (middle, "code")):
        assert len(axis.lines) == 6, "every step, and its average"
        for raw, line, kind in zip(axis.lines[::2], axis.lines[1::2], plots.KINDS, strict=True):
            series = values[f"{what}_{kind}"].to_numpy()
            np.testing.assert_allclose(raw.get_ydata(), series)
            weights = [(1 - 2 / (4 + 1)) ** np.arange(step + 1)[::-1] for step in range(len(series))]
            expected = [np.average(series[: step + 1], weights=weight) for step, weight in enumerate(weights)]
            np.testing.assert_allclose(line.get_ydata(), expected)
    assert [line.get_label() for line in right.lines[1::2]] == ["cluster"], (
        "without labels the linear probe has no loss"
    )
    fitted_after = values.drop(columns=["loss_cluster", "loss_linear"])
    assert len(plots.curves(fitted_after).axes) == 2, "probes that are fitted after the head have no curve"


def test_pairs_beyond_the_shift_attract():
    found = {"edges": [-1.0, -0.5, 0.0, 0.5, 1.0]} | {kind: [0.1, 0.2, 0.3, 0.4] for kind in plots.KINDS}
    figure = plots.correspondences(SimpleNamespace(correspondences=found, shifts=(0.0, 0.5, -0.5)))
    for axis, attracting in zip(figure.axes, ([0.3, 0.4], [0.4], [0.2, 0.3, 0.4]), strict=True):
        repel, attract = ([bar.get_height() for bar in bars if bar.get_height()] for bars in axis.containers)
        assert attract == attracting and repel == [0.1, 0.2, 0.3, 0.4][: 4 - len(attracting)]
        assert [text.get_text() for text in axis.texts] == ["repel", "attract"]


PLAIN = Classes(("sky", "road"), ((9, 9, 200), (90, 90, 90)))


def test_a_grid_has_no_gaps_explains_ignored_pixels_and_brightens_dark_images():
    dark, light = np.full((30, 40, 3), 20, np.uint8), np.full((30, 40, 3), 150, np.uint8)
    label = np.zeros((30, 40), np.int64)
    figure = grids.image_grid({"image": [light, dark], "label": [label, label]}, [PLAIN], ["a", "b"])
    figure.canvas.draw()
    boxes = [axis.get_window_extent() for axis in figure.axes if axis.images]
    for box in boxes:
        assert box.height / box.width == pytest.approx(0.75, rel=0.02), "each cell has the shape of its image"
    first, second = boxes[:2]
    assert 0 < second.x0 - first.x1 < 0.06 * first.width and len(boxes) == 5, "one image is shown brightened too"
    shown = np.asarray(figure.axes[3].images[0].get_array())
    assert shown.mean() == pytest.approx(grids.BRIGHTENED, abs=2) and not figure.axes[2].images
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(PLAIN.names)
    label[0] = -1
    figure = grids.image_grid({"image": [dark], "label": [label]}, [PLAIN], brighten=False)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*PLAIN.names, "ignored"]
    assert tuple(np.asarray(figure.axes[1].images[0].get_array())[0, 0]) == style.UNMATCHED and len(figure.axes) == 2


def test_images_without_labels_stand_alone(tmp_path):
    folder = tmp_path / "folder" / "imgs" / "train"
    folder.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (16, 8), (10 * number, 0, 0)).save(folder / f"{number}.png")
    figure = grids.examples(open_dataset("folder", tmp_path, "train", n_classes=2), [2, 0])
    assert [int(axis.images[0].get_array()[0, 0, 0]) for axis in figure.axes[:2]] == [20, 0]
    assert not figure.legends, "there is nothing that the legend could name"


def study(*rows: tuple[str, str, int, float]) -> SimpleNamespace:
    """Scores of (group, name, seed, mIoU) of a cluster probe, as `Study` has them."""
    found = [(group, name, seed, "cluster", 0.0, miou) for group, name, seed, miou in rows]
    columns = ["group", "name", "seed", "probe", "accuracy", "miou"]
    names = dict.fromkeys((group, name) for group, name, *_ in rows)
    return SimpleNamespace(
        scores=lambda: pd.DataFrame(found, columns=columns),
        variants=[SimpleNamespace(group=group, name=name) for group, name in names],
        missing=lambda: [None] * 7,
    )


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda: plots_study.ingredients(study()), "7 runs to do: make ablations"),
        (lambda: plots_study.sweeps(study(), ["K"]), "7 runs to do: make ablations"),
        (lambda: plots_study.dimensions(study()), "7 runs to do: make ablations"),
        (lambda: plots_study.percentile_grid({}), "make tuning"),
    ],
)
def test_without_records_a_figure_says_what_to_run(draw, said):
    (axis,) = draw().axes
    assert said in axis.texts[0].get_text() and "no run record yet" in axis.texts[0].get_text() and not axis.axison


def test_sweeps_draw_a_line_through_the_means_and_a_dot_a_seed():
    given = study(("K", "8", 0, 30.0), ("K", "8", 1, 40.0), ("K", "16", 0, 50.0), ("points", "3", 0, 20.0))
    figure = plots_study.sweeps(given, ["K", "points"])
    first, second = figure.axes
    assert [axis.get_title() for axis in (first, second)] == ["K", "points"]
    np.testing.assert_allclose(first.lines[0].get_ydata(), [35.0, 50.0])
    dots = np.concatenate([dot.get_offsets()[:, 1] for dot in first.collections if len(dot.get_offsets())])
    assert sorted(dots) == [30.0, 40.0, 50.0]


def test_dimensions_draw_means_and_what_all_features_reach():
    given = study(("PCA", "4", 0, 10.0), ("PCA", "4", 1, 20.0), ("PCA", "8", 0, 40.0), ("features", "all", 0, 33.0))
    curve, whole = plots_study.dimensions(given).axes[0].lines
    assert curve.get_xdata().tolist() == [4, 8] and curve.get_ydata().tolist() == [15.0, 40.0]
    assert whole.get_label() == "all features" and set(whole.get_ydata()) == {33.0}
    assert len(plots_study.dimensions(study(("PCA", "4", 0, 10.0))).axes[0].lines) == 1


def test_class_iou_is_the_mean_over_the_records():
    def one(*iou):
        return {"classes": ["a", "b"], "scores": {"cluster": {"iou": list(iou)}, "linear": {"iou": [9.0, None]}}}

    figure = plots.class_iou(one(10.0, 20.0), one(30.0, 60.0), methods=("cluster", "linear", "kmeans_pca"))
    shown = np.asarray(figure.axes[0].collections[0].get_array().filled(np.nan)).reshape(2, 3)
    np.testing.assert_allclose(shown, [[30, 20, 40], [9, 9, np.nan]], err_msg="their mean in front")
    assert len(figure.axes[0].get_yticklabels()) == 2, "a method without scores is not named"


CHINESE = Classes(("天空", "道路"), ((9, 9, 200), (90, 90, 90)))


@pytest.fixture
def fonts(monkeypatch):
    """The fonts that every machine has, and those that a test adds; what figures use is put back."""
    usual = [font for font in style.font_manager.fontManager.ttflist if font.name.startswith("DejaVu")]
    monkeypatch.setattr(style.font_manager.fontManager, "ttflist", usual)
    monkeypatch.setattr(style, "_WITHOUT_FONT", set())
    with plt.rc_context({"font.family": ["sans-serif"], "font.sans-serif": ["DejaVu Sans"]}), warnings.catch_warnings():
        yield


def write_font(path: Path, letters: str) -> Path:
    """A font whose letters are squares."""
    pen = TTGlyphPen(None)
    for step, corner in enumerate([(100, 0), (100, 700), (800, 700), (800, 0)]):
        (pen.lineTo if step else pen.moveTo)(corner)
    pen.closePath()
    names = [".notdef", *(f"letter{i}" for i in range(len(letters)))]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap(dict(zip(map(ord, letters), names[1:], strict=True)))
    font.setupGlyf(dict.fromkeys(names, pen.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys(names, (900, 100)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    font.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    font.setupPost()
    font.save(path)
    return path


def figures_of(classes: Classes) -> list[Callable]:
    """Draws one of each kind that shows names of classes or files."""
    names = list(classes.names)
    record = {
        "classes": names,
        "scores": {"cluster": {"iou": [10.0, 20.0]}},
        "confusion": [[3, 1], [0, 2]],
        "matching": [0, 1],
    }
    label = np.zeros((8, 16), np.uint8)
    return [
        lambda: plots.confusion(record),
        lambda: plots.class_iou(record, methods=["cluster"]),
        lambda: grids.image_grid({"image": [np.zeros((8, 16, 3), np.uint8)], "label": [label]}, [classes], [names[0]]),
        lambda: plots_data.palettes({"mine": classes}),
    ]


def test_names_in_other_scripts_are_drawn_with_a_font_that_has_them(fonts, tmp_path):
    """Each figure alone, so that none lives on what another has found."""
    file = write_font(tmp_path / "Made for this test.ttf", "天空道路")
    style.font_manager.fontManager.addfont(file)
    warnings.filterwarnings("error", "Glyph .* missing from font")
    for draw in figures_of(CHINESE):
        plt.rcParams["font.family"] = ["sans-serif"]
        draw().canvas.draw()
        assert plt.rcParams["font.family"] == ["sans-serif", "Made for this test"]


def test_letters_that_no_font_has_are_said_once(fonts):
    with pytest.warns(Notice, match="font") as told:
        for draw in figures_of(CHINESE):
            draw().canvas.draw()
    assert len(told) == 1
    style.find_fonts("road", "straße", "дорога", "طريق", "…")
    with pytest.warns(Notice, match="도"):
        style.find_fonts("도로")


def test_names_are_shown_as_they_are():
    """LabelMe's classes begin with an underscore, which matplotlib hides; dollar signs would begin a formula."""
    classes = Classes(("_background_", "price $5 to $$", "x^2$"), ((0, 0, 0), (9, 9, 9), (99, 9, 9)))
    figure = grids.image_grid(
        {"image": [np.zeros((8, 8, 3), np.uint8)], "label": [np.zeros((8, 8), np.uint8)]}, [classes]
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(classes.names)
    record = {
        "classes": list(classes.names),
        "scores": {"cluster": {"iou": [1.0, 2.0, 3.0]}},
        "confusion": np.eye(3).tolist(),
        "matching": [0, 1, -1],
    }
    for one in (figure, plots.confusion(record), plots.class_iou(record, methods=["cluster"])):
        one.canvas.draw()


def test_two_classes_of_one_name_have_a_column_each():
    """As in records of earlier versions; names are told apart when data are read."""
    record = {"classes": ["food", "sky", "food"], "scores": {"cluster": {"iou": [10.0, 20.0, 30.0]}}}
    figure = plots.class_iou(record, methods=["cluster"])
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == [
        "mean",
        "food (id 0)",
        "sky",
        "food (id 2)",
    ]


def test_a_large_image_is_shown_small_and_in_its_own_coordinates():
    image = np.zeros((1500, 2100, 3), np.uint8)
    image[::3, ::3] = np.arange(700, dtype=np.uint16)[None, :, None] % 256
    _, axis = plt.subplots()
    style.show_image(axis, image)
    shown = axis.images[0]
    np.testing.assert_array_equal(shown.get_array(), image[::3, ::3])
    assert list(shown.get_extent()) == [-0.5, 2099.5, 1499.5, -0.5]
