"""The choice of the regularization of `Run.teach` with method="logistic", on training images only.

book/records/studies/regularization.csv contains the rows of

>>> recipes = [Experiment.preset("scenes")]
>>> recipes += [Experiment.preset(name, backbone="photos_vit_tiny8_d6") for name in ("camvid", "labelmefacade")]
>>> pd.concat(measure(train(recipe, resume=True), draw) for recipe in recipes for draw in range(5))
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from stego_lib import Run
from stego_lib.datasets import open_training_set
from stego_lib.features import open_features
from stego_lib.metrics import confusion, identity, scores
from stego_lib.predict import label_maps
from stego_lib.teach import UNLABELED, teach
from stego_lib.utils.notices import Notice

# Numbers of observations that an image counts for ("all": its labeled cells), and `balance`, see `teach.teach`.
OBSERVATIONS, BALANCES = (1, 10, 100, "all"), (0, 0.5, 1)


@torch.inference_mode()
def measure(
    run: Run,
    draw: int,
    images: Sequence[int] = (5, 20),
    clicks: Sequence[tuple[int, int]] = ((30, 30), (100, 100), (100, 5)),
    n_scored: int = 60,
) -> pd.DataFrame:
    """Scores on random training images after labels of others, in percent, without CRF and mirror averaging.

    Columns: dataset, labels ("images" or "clicks"), count, images (labeled ones), observations, balance, draw,
    accuracy, miou. Images have the training size. images: numbers of complete label maps. clicks: numbers of clicks and
    of images that they are on. n_scored: number of scored images.
    """
    training, n_classes = open_training_set(run.experiment), len(run.classes)
    store = open_features(training, run.backbone, run.experiment.train_size, run.folder.parent / "features")
    rng, row_of = np.random.default_rng(draw), {path.name: row for row, path in enumerate(training.images)}
    order = torch.from_numpy(rng.permutation(len(store)))
    scored, labeled = order[:n_scored], order[n_scored:]
    codes, labels = run.model.mean_code(store.rows(scored)), store.label_rows(scored)
    rows: list[dict[str, Any]] = []

    def read(path: Path, on: str) -> tuple[Tensor, Tensor]:
        row = torch.tensor([row_of[path.name]])
        return store.image_rows(row)[0], run.model.mean_code(store.rows(row))

    def add(kind: str, count: int, observations: Any, what: Sequence[Path], of: Any, on_images: int) -> None:
        for balance in BALANCES:
            limit = math.inf if observations == "all" else float(observations)
            with warnings.catch_warnings(action="ignore", category=Notice):  # of classes too small for a cell
                taught = teach(run, what, of, read=read, rule=(limit, balance))
            predicted = label_maps(taught.class_scores(codes, run.classes), store.image_size)
            values = scores(confusion(predicted, labels, n_classes, n_classes), identity(n_classes))
            about = dict(labels=kind, count=count, images=on_images, observations=observations, balance=balance)
            values = {key: round(values[key], 2) for key in ("accuracy", "miou")}
            rows.append({"dataset": training.name} | about | {"draw": draw} | values)

    paths = [training.images[row] for row in labeled.tolist()]
    for count in images:
        maps = store.label_rows(labeled[:count]).numpy()
        maps = np.where(maps < 0, UNLABELED, maps)
        for observations in OBSERVATIONS:
            add("images", count, observations, paths[:count], list(maps), count)
    for count, on_images in clicks:
        clicked = [paths[number % on_images].name for number in range(count)]
        places = [(name, *(int(rng.integers(side)) for side in store.image_size[::-1])) for name in clicked]
        ids = [int(store.label_rows(torch.tensor([row_of[name]]))[0, y, x]) for name, x, y in places]
        table = pd.DataFrame(places, columns=["image", "x", "y"])
        table["name"] = [run.classes.names[id_] if id_ >= 0 else None for id_ in ids]
        for observations in OBSERVATIONS if on_images < count else (1,):  # with a click per image, all are the same
            add("clicks", count, observations, training.images, table.dropna(), on_images)
    return pd.DataFrame(rows)
