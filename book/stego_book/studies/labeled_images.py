"""Scores of `Run.teach` with a few labeled images on any split, as "taught" in run records.

book/records/studies/labeled_images.csv holds, for `scenes` (val) and `labelmefacade` (val and test),

>>> runs = [train(Experiment.preset("labelmefacade", backbone=NAME, seed=seed), resume=True) for seed in range(3)]
>>> pd.concat(measure(runs[draw % 3], draw, split) for draw in range(5) for split in ("val", "test"))
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from stego_lib import Run
from stego_lib.datasets import open_split
from stego_lib.evaluation import count_pixels, open_views
from stego_lib.metrics import border_f, identity, scores
from stego_lib.teach import UNLABELED


@torch.inference_mode()
def measure(run: Run, draw: int, split: str = "val", images: Sequence[int] = (5, 20)) -> pd.DataFrame:
    """Scores with labels of `images` random training images, in percent, without CRF; `draw` seeds the choice.

    Columns: dataset, split, seed (of the run), draw, images, accuracy, miou, border_f, own_miou. The
    classifier is removed from the run.
    """
    training, n_classes = open_split(run.experiment, "train"), len(run.classes)
    taught: dict[str, Any] = {}
    order = np.random.default_rng(draw).permutation(len(training)).tolist()
    for count in images:
        samples = [training[number] for number in order[:count]]
        maps = [np.where(np.asarray(label) < 0, UNLABELED, np.asarray(label)) for _, label in samples]
        taught[str(count)] = run.teach([image for image, _ in samples], maps)
    run.teach(None)
    views, rows = open_views(run, open_split(run.experiment, split)), []

    def score(numbers: torch.Tensor) -> dict[str, Any]:
        codes = run.model.mean_code(*views.rows(numbers))
        return {name: some.class_scores(codes, run.classes) for name, some in taught.items()}

    for name, counted in count_pixels(views, score, dict.fromkeys(taught, n_classes)).items():
        scored = scores(counted.confusion, identity(n_classes))
        values = {key: scored[key] for key in ("accuracy", "miou")} | {"border_f": border_f(counted.borders)}
        values["own_miou"] = scores(counted.own, torch.tensor([*range(n_classes), -1]))["miou"]
        about = dict(dataset=training.name, split=split, seed=run.experiment.seed, draw=draw, images=int(name))
        rows.append(about | {key: round(value, 2) for key, value in values.items()})
    return pd.DataFrame(rows)
