"""What figures draw: the numbers that they are given, and a word where there are none."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from stego_lib import StegoError, open_dataset, plots, plots_data, plots_study
from stego_lib.datasets import Classes


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


def test_overlays_are_the_first_pictures_and_no_panel_is_left_with_an_empty_frame(tmp_path):
    for number in range(9):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(tmp_path / f"{number}.png")
    figure = plots.overlays(tmp_path, Classes(["a", "b"], [(0, 0, 0), (9, 9, 9)]), count=5)
    assert [int(axis.images[0].get_array()[0, 0, 0]) for axis in figure.axes if axis.images] == [0, 1, 2, 3, 4]
    assert [axis.axison for axis in figure.axes if not axis.images] == [False] * 3


def test_pictures_without_labels_stand_alone(tmp_path):
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


def test_label_files_stand_below_their_own_picture_and_label(tmp_path, scenes_root):
    dataset = open_dataset("scenes", scenes_root, "val")
    ids = np.zeros((8, 8), np.uint8)
    ids[:, 4:] = 255
    file = tmp_path / f"{dataset.names[1]}.png"
    Image.fromarray(ids).save(file)
    figure = plots_data.label_files([file], dataset.classes, dataset)
    picture, label, segments = (np.asarray(axis.images[0].get_array()) for axis in figure.axes)
    assert np.array_equal(picture, dataset.picture(1).permute(1, 2, 0).numpy())
    assert np.array_equal(label, plots.paint(dataset.label(1), dataset.classes))
    assert tuple(segments[0, 0]) == dataset.classes.colors[0] and tuple(segments[0, 5]) == plots.UNMATCHED
    assert len(plots_data.label_files([file], dataset.classes).axes) == 1
    with pytest.raises(StegoError, match="called like no picture of scenes val"):
        plots_data.label_files([file.rename(tmp_path / "other.png")], dataset.classes, dataset)
