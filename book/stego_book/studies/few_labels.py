"""Learning from few labels: scores of `Run.teach` by number of labeled images and of clicks.

book/records/studies/few_labels.csv contains the rows of

>>> study(Experiment.preset("scenes"))
>>> only = dict(methods=["logistic"], maps=["codes"])
>>> study(Experiment.preset("camvid", backbone="photos_vit_tiny8_d6", mirror=False), **only)
>>> photographs = Experiment.preset("labelmefacade", backbone="photos_vit_tiny8_d6")
>>> study(photographs, "test", images=(5, 20), clicks=(), seeds=3, **only)
"""

import warnings
from collections.abc import Iterable, Sequence
from functools import cache, partial
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
from stego_lib.evaluation import count_pixels, open_views
from stego_lib.features import Features, open_features
from stego_lib.metrics import border_f, confusion, identity, match, scores
from stego_lib.model import mean_over_flips
from stego_lib.predict import Scores, label_maps, probe_scores
from stego_lib.suggest import sample_places, typical
from stego_lib.teach import MAPS, METHODS, UNLABELED, Taught, read_maps, teach
from stego_lib.utils.files import fingerprint
from stego_lib.utils.notices import Notice
from stego_lib.utils.progress import progress

from .results import LABELED, LABELED_AS, markdown, mean_and_spread, read_records, score_table

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
    """A backbone that reads features from stores if available; otherwise it computes them."""

    def __init__(self, backbone: Backbone, plain: Features, mirrored: Features | None = None):
        nn.Module.__init__(self)
        self.__dict__.update(backbone.__dict__)
        images = plain.image_rows(torch.arange(len(plain)))
        self.place_of = {fingerprint(image): (plain, row) for row, image in enumerate(images)}
        if mirrored is not None:
            self.place_of |= {fingerprint(image.flip(-1)): (mirrored, row) for row, image in enumerate(images)}

    def forward(self, images: Tensor) -> Tensor:
        """As `Backbone.forward`."""
        places = [self.place_of.get(fingerprint(image)) for image in images]
        known = [place for place in places if place is not None]
        if len(known) < len(images):
            return super().forward(images)
        return torch.cat([store.rows(torch.tensor([row]), self.device) for store, row in known])


def study(
    base: Experiment,
    split: str = "val",
    draws: Iterable[int] = range(5),
    images: Sequence[int] = IMAGES,
    clicks: Sequence[int] = CLICKS,
    methods: Sequence[str] = METHODS,
    maps: Sequence[str] = MAPS,
    seeds: int = 1,
    runs_dir: str | Path | None = None,
) -> pd.DataFrame:
    """Rows of `measure` for several draws; draw n uses the run of an experiment with the seed n % `seeds`.

    maps: the values of `measure`'s `on`. Clicks are only measured on codes.
    """
    parts = []
    for draw in draws:
        run = train(base.but(seed=draw % seeds), runs_dir=runs_dir, resume=True)
        for on in maps:
            parts.append(measure(run, draw, split, images, clicks if on == "codes" else (), methods, on))
    return pd.concat(parts, ignore_index=True)


@torch.inference_mode()
def measure(
    run: Run,
    draw: int,
    split: str = "val",
    images: Sequence[int] = IMAGES,
    clicks: Sequence[int] = CLICKS,
    methods: Sequence[str] = METHODS,
    on: str = "codes",
) -> pd.DataFrame:
    """Scores on a split after a few labels of training images, as `evaluate` computes them without CRF, in percent.

    Columns: dataset, split, seed (of the run), on, method, labels, places, count, draw, accuracy, miou, border_f,
    own_miou. method: "clusters" (of codes, matched to the classes by the labels), "logistic" or "neighbors" (images
    only). labels: "split" (all that are scored), "images" or "clicks". places: "random", "typical" (of as many clusters
    as clicks), "typical of N" (of the largest of N clusters) or "uncertain". A click has the class of its pixel;
    unlabeled pixels are lost.

    draw: seed of the labeled images and of the places. images, clicks: numbers of labeled images, and of clicks.
    methods: classifiers of labeled images. on: "codes" or "features". The run's taught classifier does not change.
    """
    training, held_out = (open_split(run.experiment, name) for name in ("train", split))
    n_clusters, n_classes = run.model.n_clusters, len(run.classes)
    read = cache(partial(read_maps, run))
    classifiers: list[tuple[dict[str, Any], Taught]] = []

    def add(labels: str, count: int, places: str, method: str, what: Sequence[Any], of: Any) -> None:
        with warnings.catch_warnings(action="ignore", category=Notice):  # of classes too small for a cell
            taught = teach(run, what, of, method, on, read=read)
        classifiers.append((dict(method=method, labels=labels, places=places, count=count), taught))

    chosen = np.random.default_rng(draw).permutation(len(training))[: max(images, default=0)].tolist()
    pixels = [training.image(number) for number in chosen]
    labels = [np.asarray(training.label(number)) for number in chosen]
    for count in progress(images, "labeled images"):
        maps = [np.where(label < 0, UNLABELED, label) for label in labels[:count]]
        for method in methods:
            add("images", count, "", method, pixels[:count], maps)
    for count, kind, places in choose_clicks(run, training, draw, clicks, on):
        add("clicks", count, kind, "logistic", training.images, places)

    views = open_views(run, held_out)

    def score(rows: Tensor) -> dict[str, Scores]:
        maps = (run.model.mean_code if on == "codes" else mean_over_flips)(*views.rows(rows))
        by_name = {str(k): taught.class_scores(maps, run.classes) for k, (_, taught) in enumerate(classifiers)}
        return by_name | ({"clusters": probe_scores(run.model, maps)["cluster"]} if on == "codes" else {})

    sizes = {str(k): n_classes for k in range(len(classifiers))} | ({"clusters": n_clusters} if on == "codes" else {})
    counts = count_pixels(views, score, sizes)
    results = [(about, counts[str(k)], identity(n_classes)) for k, (about, _) in enumerate(classifiers)]
    if on == "codes":
        about = dict(method="clusters", labels="split", places="", count=len(held_out))
        results.append((about, counts["clusters"], match(counts["clusters"].confusion)))
        for count in images:
            tables = []
            for image, label in zip(pixels[:count], labels[:count], strict=True):
                clusters = label_maps(probe_scores(run.model, read(image, on)[1])["cluster"], label.shape)[0]
                tables.append(confusion(clusters, label, n_clusters, n_classes))
            results.append((
                about | dict(labels="images", count=count),
                counts["clusters"],
                match(torch.stack(tables).sum(0)),
            ))  # fmt: skip
    rows = []
    for about, counted, matching in results:
        scored = scores(counted.confusion, matching)
        own = scores(counted.own, torch.tensor([*range(n_classes), -1]))  # the last row is unmatched
        values = {key: scored[key] for key in ("accuracy", "miou")}
        values |= {"border_f": border_f(counted.borders), "own_miou": own["miou"]}
        origin = dict(dataset=training.name, split=split, seed=run.experiment.seed, on=on)
        rows.append(origin | about | {"draw": draw} | {key: round(value, 2) for key, value in values.items()})
    return pd.DataFrame(rows)


def choose_clicks(
    run: Run, training: SegmentationDataset, draw: int, clicks: Sequence[int], on: str
) -> list[tuple[int, str, pd.DataFrame]]:
    """Number, kind of places (see `measure`) and table of named clicks."""
    if not clicks:
        return []
    run.backbone = stored(run)
    places, points = sample_places(run, training.images, on, seed=draw)
    places["name"] = names_at(training, places)
    random = torch.randperm(len(points), generator=torch.Generator().manual_seed(draw)).numpy()
    of_clusters = {k: typical(points, k, draw) for k in sorted({*CLUSTERS, *clicks})}
    unsure, tables = random[:START], []
    for count in progress(clicks, "clicks"):
        unsure = uncertain(run, training, places, points, unsure, count)
        chosen = {"random": random[:count], "typical": of_clusters[count], "uncertain": unsure}
        chosen |= {f"typical of {k}": of_clusters[k][:count] for k in CLUSTERS if k > count}
        tables += [(count, kind, places.iloc[numbers].dropna()) for kind, numbers in chosen.items()]
    return tables


def stored(run: Run) -> Stored:
    """The backbone of a run that reads the features of training images, and of mirrored ones if needed, from disk."""
    experiment, root = run.experiment, run.folder.parent / "features"
    stores = [
        open_features(open_training_set(experiment), run.backbone, experiment.train_size, root, mirror=mirror)
        for mirror in (False, True)
        if experiment.mirror or not mirror
    ]
    return Stored(run.backbone, *stores)


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


def read(root: str | Path) -> pd.DataFrame:
    """Stored rows of `study` on validation splits, and scores of the run records below `root`.

    The count of run records is "none" (without labels) or "all" (with all labels of the training split).
    """
    rows = [pd.read_csv(Path(root) / LABELED, keep_default_na=False).query("split == 'val'")]
    for (dataset, split), folder in LABELED_AS.items():
        if split == "val" and dataset in set(rows[0]["dataset"]):
            scored = score_table(read_records(Path(root) / folder)).query("method in @RECORDED")
            keys = pd.DataFrame([RECORDED[key] for key in scored["method"]], columns=["method", "on", "count"])
            about = dict(dataset=dataset, split=split, labels="images", places="", draw=scored["seed"].to_numpy())
            rows.append(scored[["accuracy", "miou"]].reset_index(drop=True).join(keys).assign(**about))
    table = pd.concat(rows, ignore_index=True).drop_duplicates()
    order = sorted(table["count"].unique(), key=lambda count: {"none": 0, "all": np.inf}.get(count, count))
    return table.assign(count=pd.Categorical(table["count"].astype(str), map(str, order), ordered=True))


def table(rows: pd.DataFrame, index: Sequence[str], score: str = "miou") -> str:
    """Mean and spread of a score over the draws as a Markdown table: one row per `index`, one column per count."""
    groups = rows.groupby([*index, "count"], sort=False, observed=True)[score]
    cells = groups.agg(mean_and_spread).unstack(fill_value="").sort_index(axis="columns")
    return markdown(cells.rename(columns=str).rename_axis(columns=None).reset_index())
