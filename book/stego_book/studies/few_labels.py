"""Learning from few labels: scores of `Run.teach` by number of labeled images and of clicks.

book/records/studies/few_labels.csv contains the rows of

>>> study(Experiment.preset("scenes"))
>>> study(Experiment.preset("camvid", backbone="photos_vit_tiny8_d6"), every=3)
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from stego_lib import Experiment, Run, train
from stego_lib.backbone import Backbone
from stego_lib.datasets import open_split, open_training_set
from stego_lib.datasets.base import SegmentationDataset
from stego_lib.evaluation import open_views
from stego_lib.features import Features, open_features
from stego_lib.metrics import confusion, identity, match, scores
from stego_lib.model import mean_over_flips
from stego_lib.predict import Scores, label_maps
from stego_lib.suggest import sample_places, typical
from stego_lib.teach import MAPS, METHODS, UNLABELED, teach
from stego_lib.utils.files import fingerprint
from stego_lib.utils.notices import Notice
from stego_lib.utils.progress import progress

from .results import markdown, mean_and_spread, read_records, score_table

# Numbers of labeled images, of clicks, and of clusters for typical places.
IMAGES, CLICKS, CLUSTERS = (1, 5, 20), (30, 100, 200), (100, 200, 400)
# Random clicks before the first uncertain ones.
START = 10
# Method of a run record -> method, maps and number of labeled images of a row.
RECORDED = {
    "kmeans_features": ("clusters", "features", "none"),
    "cluster": ("clusters", "codes", "none"),
    "linear_features": ("logistic", "features", "all"),
    "linear": ("logistic", "codes", "all"),
}


class Stored(Backbone):
    """A backbone that reads features from a store if available; otherwise it computes them."""

    def __init__(self, backbone: Backbone, store: Features):
        nn.Module.__init__(self)
        self.__dict__.update(backbone.__dict__)
        self.store = store
        images = store.image_rows(torch.arange(len(store)))
        self.row_of = {fingerprint(image): row for row, image in enumerate(images)}

    def forward(self, images: Tensor) -> Tensor:
        """As `Backbone.forward`."""
        rows = [self.row_of.get(fingerprint(image)) for image in images]
        return super().forward(images) if None in rows else self.store.rows(torch.tensor(rows), self.device)


def study(
    base: Experiment, draws: Iterable[int] = range(5), every: int = 1, runs_dir: str | Path | None = None
) -> pd.DataFrame:
    """Rows of `measure` for several draws on the run of an experiment, without mirror averaging and CRF."""
    run = train(base.but(mirror=False, crf=False), runs_dir=runs_dir, resume=True)
    return pd.concat([measure(run, draw, every=every, on=on) for on in MAPS for draw in draws], ignore_index=True)


@torch.inference_mode()
def measure(
    run: Run,
    draw: int,
    images: Sequence[int] = IMAGES,
    clicks: Sequence[int] = CLICKS,
    every: int = 1,
    on: str = "codes",
) -> pd.DataFrame:
    """Scores on the validation split after a few labels of training images, in percent, without CRF.

    Columns: dataset, on, method, labels, places, count, draw, accuracy, miou. method: "clusters" (of codes, matched to
    the classes by the labels), "logistic" or "neighbors" (images only). labels: "split" (all that are scored), "images"
    or "clicks". places: "random", "typical" (of as many clusters as clicks), "typical of N" (of the largest of N
    clusters) or "uncertain". A click has the class of its pixel; unlabeled pixels are lost.

    Parameters
    ----------
    run
        The run. Its taught classifier is removed.
    draw
        Seed of the labeled images and of the places.
    images, clicks
        Numbers of labeled images, and of clicks (only on codes).
    every
        Score every n-th validation image.
    on
        "codes" or "features".
    """
    training, held_out = (open_split(run.experiment, split) for split in ("train", "val"))
    run.backbone = stored(run)
    views, rows, shape = open_views(run, held_out), [], (run.model.n_clusters, len(run.classes))
    scored = torch.arange(0, len(held_out), every)
    batches = [
        ((run.model.mean_code if on == "codes" else mean_over_flips)(*views.rows(some)), views.plain.label_rows(some))
        for some in scored.split(16)
    ]

    def count_pixels(score: Callable[[Tensor], Scores], n: int) -> Tensor:
        maps = (label_maps(score(codes), views.plain.image_size) for codes, _ in batches)
        tables = [confusion(map_, labels, n, shape[1]) for map_, (_, labels) in zip(maps, batches, strict=True)]
        return torch.stack(tables).sum(0)

    def add(method: str, labels: str, count: int, table: Tensor, matching: Tensor, places: str = "") -> None:
        values = scores(table, matching)
        about = dict(dataset=training.name, on=on, method=method, labels=labels, places=places, count=count, draw=draw)
        rows.append(about | {key: round(values[key], 2) for key in ("accuracy", "miou")})

    def add_taught(labels: str, count: int, what: Any, of: Any, method: str = "logistic", places: str = "") -> None:
        with warnings.catch_warnings(action="ignore", category=Notice):  # of classes too small for a cell
            taught = teach(run, what, of, method, on)
        table = count_pixels(partial(taught.class_scores, classes=run.classes), shape[1])
        add(method, labels, count, table, identity(shape[1]), places)

    run.teach(None)
    if on == "codes":
        clusters = count_pixels(run.score_maps, shape[0])
        add("clusters", "split", len(scored), clusters, match(clusters))
    order = np.random.default_rng(draw).permutation(len(training)).tolist()
    for count in progress(images, "labeled images"):
        some = [training.image(number) for number in order[:count]]
        labels = [np.asarray(training.label(number)) for number in order[:count]]
        if on == "codes":
            predicted = [label_maps(run.scores(image), (image.shape[1], image.shape[2]))[0] for image in some]
            tables = [confusion(map_, label, *shape) for map_, label in zip(predicted, labels, strict=True)]
            add("clusters", "images", count, clusters, match(torch.stack(tables).sum(0)))
        for method in METHODS:
            add_taught("images", count, some, [np.where(label < 0, UNLABELED, label) for label in labels], method)
    if on == "features" or not clicks:
        return pd.DataFrame(rows)
    places, points = sample_places(run, training.images, seed=draw)
    places["name"] = names_at(training, places)
    random = torch.randperm(len(points), generator=torch.Generator().manual_seed(draw)).numpy()
    of_clusters = {k: typical(points, k, draw) for k in sorted({*CLUSTERS, *clicks})}
    unsure = random[:START]
    for count in progress(clicks, "clicks"):
        unsure = uncertain(run, training, places, points, unsure, count)
        chosen = {"random": random[:count], "typical": of_clusters[count], "uncertain": unsure}
        chosen |= {f"typical of {k}": of_clusters[k][:count] for k in CLUSTERS if k > count}
        for kind, numbers in chosen.items():
            add_taught("clicks", count, training.images, places.iloc[numbers].dropna(), places=kind)
    return pd.DataFrame(rows)


def stored(run: Run) -> Stored:
    """The backbone of a run that reads the features of training images from the store."""
    experiment, root = run.experiment, run.folder.parent / "features"
    return Stored(run.backbone, open_features(open_training_set(experiment), run.backbone, experiment.train_size, root))


def names_at(dataset: SegmentationDataset, places: pd.DataFrame) -> pd.Series:
    """Name of the class at each place; None for unlabeled pixels."""
    numbers, names = {path.name: number for number, path in enumerate(dataset.images)}, [*dataset.classes.names, None]
    of_images = [
        pd.Series(np.asarray(dataset.label(numbers[image]))[rows["y"].to_numpy(), rows["x"].to_numpy()], rows.index)
        for image, rows in places.groupby("image", sort=False)
    ]
    return pd.concat(of_images).map(lambda id_: names[id_])


def uncertain(
    run: Run, dataset: SegmentationDataset, places: pd.DataFrame, points: Tensor, chosen: np.ndarray, count: int
) -> np.ndarray:
    """Extends the `chosen` places to `count`, doubling their number in each round, at most one new place per image.

    New places have the smallest margin between the two largest probabilities of the classifier of the previous ones.
    """
    while len(chosen) < count:
        taught = teach(run, dataset.images, places.iloc[chosen].dropna())
        probabilities = taught.scores(points.T[None, :, :, None]).grid[0, :, :, 0].softmax(0)
        first, second = probabilities.topk(2, dim=0).values
        order = (first - second).argsort().numpy()
        order = places["image"].iloc[order[~np.isin(order, chosen)]].drop_duplicates().index
        chosen = np.concatenate([chosen, order[: min(len(chosen), count - len(chosen))]])
    return chosen


def read(path: Path, records: dict[str, Path]) -> pd.DataFrame:
    """Stored rows of `study`, and scores without labels (count "none") and with all labels ("all") from run records.

    records: dataset -> folder of its run records.
    """
    rows = [pd.read_csv(path, keep_default_na=False)]
    for dataset, folder in records.items():
        scored = score_table(read_records(folder)).query("method in @RECORDED").rename(columns={"seed": "draw"})
        keys = pd.DataFrame([RECORDED[key] for key in scored["method"]], columns=["method", "on", "count"])
        about = dict(dataset=dataset, labels="images", places="")
        rows.append(scored[["draw", "accuracy", "miou"]].reset_index(drop=True).join(keys).assign(**about))
    return pd.concat(rows, ignore_index=True).drop_duplicates()


def table(rows: pd.DataFrame, index: Sequence[str], score: str = "miou") -> str:
    """Mean and spread of a score over the draws as a Markdown table: one row per `index`, one column per count."""
    cells = rows.groupby([*index, "count"], sort=False)[score].agg(mean_and_spread).unstack(fill_value="")
    order = sorted(cells, key=lambda count: {"none": 0, "all": np.inf}.get(count, count))
    return markdown(cells[order].rename(columns=str).rename_axis(columns=None).reset_index())
