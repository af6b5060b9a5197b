"""What figures draw: the numbers that they are given, and a word where there are none."""

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from common import tiny_experiment
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from stego_lib import StegoError, evaluate, open_dataset, train
from stego_lib.datasets import Classes
from stego_lib.plots import correspondence as plots_correspondence
from stego_lib.plots import data as plots_data
from stego_lib.plots import figures as plots
from stego_lib.plots import study as plots_study
from stego_lib.runtime.notices import Notice


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def log(steps: int = 9) -> pd.DataFrame:
    rng, columns = np.random.default_rng(0), [f"{what}_{kind}" for what in ("loss", "code") for kind in plots.KINDS]
    found = pd.DataFrame(rng.normal(size=(steps, len(columns))), columns=columns)
    return found.assign(loss_cluster=rng.normal(size=steps), loss_linear=np.nan)


def test_curves_are_means_of_the_last_steps_and_leave_out_what_was_not_trained():
    values = log()
    left, middle, right = plots.curves(values, window=4).axes
    for axis, what in ((left, "loss"), (middle, "code")):
        assert len(axis.lines) == 3
        for line, kind in zip(axis.lines, plots.KINDS, strict=True):
            series = values[f"{what}_{kind}"]
            expected = [np.mean(series[max(0, step - 3) : step + 1]) for step in range(len(series))]
            np.testing.assert_allclose(line.get_ydata(), expected)
    assert [line.get_label() for line in right.lines] == ["cluster"], "without labels the linear probe has no loss"
    fitted_after = values.drop(columns=["loss_cluster", "loss_linear"])
    assert len(plots.curves(fitted_after).axes) == 2, "probes that are fitted after the head have no curve"


def test_overlays_are_the_first_images_and_no_panel_is_left_with_an_empty_frame(tmp_path):
    for number in range(9):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(tmp_path / f"{number}.png")
    figure = plots.overlays(tmp_path, Classes(["a", "b"], [(0, 0, 0), (9, 9, 9)]), count=5)
    assert [int(axis.images[0].get_array()[0, 0, 0]) for axis in figure.axes if axis.images] == [0, 1, 2, 3, 4]
    assert [axis.axison for axis in figure.axes if not axis.images] == [False] * 3


def test_images_without_labels_stand_alone(tmp_path):
    folder = tmp_path / "folder" / "imgs" / "train"
    folder.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (16, 8), (10 * number, 0, 0)).save(folder / f"{number}.png")
    figure = plots.examples(open_dataset("folder", tmp_path, "train", n_classes=2), [2, 0])
    assert [int(axis.images[0].get_array()[0, 0, 0]) for axis in figure.axes] == [20, 0]
    assert not figure.legends, "there is nothing that the legend could name"


def study(*rows: tuple[str, str, int, float]) -> SimpleNamespace:
    """Scores of (group, name, seed, mIoU) of a cluster probe, as `Study` has them."""
    found = [dict(group=group, name=name, seed=seed, probe="cluster", accuracy=0.0, miou=miou) for group, name, seed, miou in rows]  # fmt: skip
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
    first, second, empty = figure.axes
    assert [axis.get_title() for axis in (first, second)] == ["K", "points"] and not empty.axison
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

    figure = plots.class_iou(one(10.0, 20.0), one(30.0, 60.0), methods=("cluster", "linear", "absent"))
    bars = [[bar.get_height() for bar in container] for container in figure.axes[0].containers]
    assert bars[0] == pytest.approx([20, 40]) and bars[1][0] == pytest.approx(9)
    assert len(figure.axes[0].get_legend().texts) == 2, "a method without scores is not named"


def test_label_files_stand_below_their_own_image_and_label(tmp_path, scenes_root):
    dataset = open_dataset("scenes", scenes_root, "val")
    ids = np.zeros((8, 8), np.uint8)
    ids[:, 4:] = 255
    file = tmp_path / f"{dataset.names[1]}.png"
    Image.fromarray(ids).save(file)
    figure = plots_data.label_files([file], dataset.classes, dataset)
    image, label, segments = (np.asarray(axis.images[0].get_array()) for axis in figure.axes)
    assert np.array_equal(image, dataset.image(1).permute(1, 2, 0).numpy())
    assert np.array_equal(label, plots.paint(dataset.label(1), dataset.classes))
    assert tuple(segments[0, 0]) == dataset.classes.colors[0] and tuple(segments[0, 5]) == plots.UNMATCHED
    assert len(plots_data.label_files([file], dataset.classes).axes) == 1
    with pytest.raises(StegoError, match="called like no image of scenes val"):
        plots_data.label_files([file.rename(tmp_path / "other.png")], dataset.classes, dataset)

CHINESE = Classes(("天空", "道路"), ((9, 9, 200), (90, 90, 90)))


@pytest.fixture
def fonts(monkeypatch):
    """The fonts that every machine has, and those that a test adds; what figures use is put back."""
    usual = [font for font in plots.font_manager.fontManager.ttflist if font.name.startswith("DejaVu")]
    monkeypatch.setattr(plots.font_manager.fontManager, "ttflist", usual)
    monkeypatch.setattr(plots, "_BOXES", set())
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


def figures_of(classes: Classes, folder: Path) -> list[Callable]:
    """Draws one of each kind that shows names of classes or files."""
    Image.new("RGB", (16, 8)).save(folder / f"{classes.names[0]}.png")
    names = list(classes.names)
    record = {
        "classes": names, "scores": {"cluster": {"iou": [10.0, 20.0]}}, "confusion": [[3, 1], [0, 2]], "matching": [0, 1],
    }  # fmt: skip
    label = np.zeros((8, 16), np.uint8)
    Image.fromarray(label).save(folder / f"{classes.names[1]}.png")
    return [
        lambda: plots.overlays(folder, classes),
        lambda: plots.confusion(record),
        lambda: plots.class_iou(record, methods=["cluster"]),
        lambda: plots_data.stages([np.zeros((8, 16, 3), np.uint8)], {"label": [label]}, classes),
        lambda: plots_data.palettes({"mine": classes}),
        lambda: plots_data.label_files([folder / f"{names[1]}.png"], classes),
        lambda: plots_correspondence.image_strip(torch.zeros(2, 3, 8, 16), names),
    ]


def test_names_in_other_scripts_are_drawn_with_a_font_that_has_them(fonts, tmp_path):
    """Each figure alone, so that none lives on what another has found."""
    file = write_font(tmp_path / "Made for this test.ttf", "天空道路")
    plots.font_manager.fontManager.addfont(file)
    (tmp_path / "images").mkdir()
    warnings.filterwarnings("error", "Glyph .* missing from font")
    for draw in figures_of(CHINESE, tmp_path / "images"):
        plt.rcParams["font.family"] = ["sans-serif"]
        draw().canvas.draw()
        assert plt.rcParams["font.family"] == ["sans-serif", "Made for this test"]


def test_letters_that_no_font_has_are_said_once(fonts, tmp_path):
    with pytest.warns(Notice, match=r"no font on this machine has letters of some names, CJK \(such as .\)") as told:
        for draw in figures_of(CHINESE, tmp_path):
            draw().canvas.draw()
    assert len(told) == 1
    plots.find_fonts("road", "straße", "дорога", "طريق", "…")
    with pytest.warns(Notice, match="HANGUL"):
        plots.find_fonts("도로")


def test_names_are_shown_as_they_are():
    """LabelMe's classes begin with an underscore, which matplotlib hides; dollar signs would begin a formula."""
    classes = Classes(("_background_", "price $5 to $$", "x^2$"), ((0, 0, 0), (9, 9, 9), (99, 9, 9)))
    figure = plots_data.stages([np.zeros((8, 8, 3), np.uint8)], {"label": [np.zeros((8, 8), np.uint8)]}, classes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(classes.names)
    record = {
        "classes": list(classes.names), "scores": {"cluster": {"iou": [1.0, 2.0, 3.0]}}, "confusion": np.eye(3).tolist(),
        "matching": [0, 1, -1],
    }  # fmt: skip
    for one in (figure, plots.confusion(record), plots.class_iou(record, methods=["cluster"])):
        one.canvas.draw()


def test_two_classes_of_one_name_have_a_bar_each():
    """As in records of earlier versions; names are told apart when data are read."""
    record = {"classes": ["food", "sky", "food"], "scores": {"cluster": {"iou": [10.0, 20.0, 30.0]}}}
    figure = plots.class_iou(record, methods=["cluster"])
    assert [bar.get_height() for bar in figure.axes[0].containers[0]] == [10, 20, 30]
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["food (id 0)", "sky", "food (id 2)"]


def test_a_large_image_is_shown_small_and_in_its_own_coordinates():
    image = np.zeros((1500, 2100, 3), np.uint8)
    image[::3, ::3] = np.arange(700, dtype=np.uint16)[None, :, None] % 256
    _, axis = plt.subplots()
    plots.show_image(axis, image)
    shown = axis.images[0]
    np.testing.assert_array_equal(shown.get_array(), image[::3, ::3])
    assert list(shown.get_extent()) == [-0.5, 2099.5, 1499.5, -0.5]


def test_segments_wear_the_colors_of_classes_only_once_they_are_matched(scenes_root, backbone_file, tmp_path):
    run = train(tiny_experiment(scenes_root, backbone_file, steps=2, extra_clusters=2), runs_dir=tmp_path)
    held_out = open_dataset("scenes", scenes_root, "val")
    for matched in (False, True):
        if matched:
            evaluate(run, baselines=False)
        figure = plots.predictions(run, held_out, [0, 1])
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        shown = np.asarray(figure.axes[4].images[0].get_array()).reshape(-1, 3)
        assert legend == list(dict.fromkeys([*held_out.classes.names, *run.segments.names]))
        assert len(legend) == (10 if matched else 18)
        of_classes = set(map(tuple, shown.tolist())) & set(held_out.classes.colors)
        assert bool(of_classes) == matched
        np.testing.assert_array_equal(shown, plots.paint(run.predict(held_out.image(0)), run.segments).reshape(-1, 3))
