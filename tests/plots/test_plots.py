"""What figures draw: the numbers that they are given, and a word where there are none."""

import warnings
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from stego_book.plots import data as plots_data
from stego_book.plots import figures as plots
from stego_book.plots import grids, style
from stego_lib.datasets import Classes


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_curves_leave_out_what_was_not_trained():
    rng = np.random.default_rng(0)
    columns = [f"{what}_{kind}" for what in ("loss", "code") for kind in plots.KINDS]
    log = pd.DataFrame(rng.normal(size=(9, len(columns))), columns=columns)
    figure = plots.curves(log.assign(loss_cluster=1.0, loss_linear=np.nan))
    assert [len(axis.lines) for axis in figure.axes] == [6, 6, 2], "every step and its average; no linear probe"
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), log["loss_self"])
    assert len(plots.curves(log).axes) == 2


def test_pairs_beyond_the_shift_attract():
    measured = {"edges": [-1.0, -0.5, 0.0, 0.5, 1.0]} | {kind: [0.1, 0.2, 0.3, 0.4] for kind in plots.KINDS}
    figure = plots.correspondences(SimpleNamespace(correspondences=measured, shifts=(0.0, 0.5, -0.5)))
    for axis, attracting in zip(figure.axes, ([0.3, 0.4], [0.4], [0.2, 0.3, 0.4]), strict=True):
        repel, attract = ([bar.get_height() for bar in bars if bar.get_height()] for bars in axis.containers)
        assert attract == attracting and repel == [0.1, 0.2, 0.3, 0.4][: 4 - len(attracting)]


def test_class_iou_is_the_mean_over_the_records():
    def scored(*iou):
        scores = {"cluster": {"iou": list(iou)}, "linear": {"iou": [9.0, None]}}
        return {"classes": ["food", "food"], "scores": scores}

    figure = plots.class_iou(scored(10.0, 20.0), scored(30.0, 60.0), methods=("cluster", "linear", "kmeans_pca"))
    shown = np.asarray(figure.axes[0].collections[0].get_array().filled(np.nan)).reshape(2, 3)
    np.testing.assert_allclose(shown, [[30, 20, 40], [9, 9, np.nan]], err_msg="their mean in front")
    names = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert names == ["mean", "food (id 0)", "food (id 1)"], "two classes of one name have a column each"


# Letters of STIXGeneral, which comes with matplotlib, that DejaVu Sans lacks.
CIRCLED = Classes(("ⒶⒷ", "ⒸⒹ"), ((9, 9, 200), (90, 90, 90)))


@pytest.fixture
def styled(monkeypatch):
    """The style of the figures, with STIXGeneral as the only fallback; what figures use is put back."""
    monkeypatch.setattr(style, "FALLBACK_FONTS", ("STIXGeneral", "not installed"))
    with plt.rc_context(), warnings.catch_warnings():
        style.use_style()
        yield


def figures_of(classes: Classes):
    """Draws one of each kind that shows names of classes or files."""
    names, black = list(classes.names), np.zeros((8, 16, 3), np.uint8)
    scores = {"cluster": {"iou": [10.0 * number for number in range(len(names))]}}
    record = {"classes": names, "scores": scores, "confusion": np.eye(len(names)).tolist()}
    record["matching"] = list(range(len(names)))
    yield plots.confusion(record)
    yield plots.class_iou(record, methods=["cluster"])
    yield grids.image_grid({"image": [black], "label": [black[..., 0]]}, [classes], [names[0]])
    yield plots_data.palettes({"mine": classes})


def test_names_in_other_scripts_are_drawn_with_an_installed_font(styled):
    warnings.filterwarnings("error", "Glyph .* missing from font")
    for figure in figures_of(CIRCLED):
        figure.canvas.draw()
    plt.rcParams["font.family"] = ["sans-serif"]
    with pytest.raises(UserWarning, match="missing"):
        next(figures_of(CIRCLED)).canvas.draw()


def test_names_are_shown_as_they_are(styled):
    """LabelMe's classes begin with an underscore, which matplotlib hides; dollar signs would begin a formula."""
    classes = Classes(("_background_", "price $5 to $$", "x^2$"), ((0, 0, 0), (9, 9, 9), (99, 9, 9)))
    for figure in figures_of(classes):
        figure.canvas.draw()
        assert not any(text.get_parse_math() for text in figure.findobj(Text))
        if figure.legends:
            assert [text.get_text() for text in figure.legends[0].get_texts()] == list(classes.names)
