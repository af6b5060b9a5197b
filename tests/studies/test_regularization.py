"""Scores by the regularization of `Run.teach`: those of the public path; the rule that the record supports."""

import numpy as np
import pandas as pd
import pytest
import torch
from common import ROOT, tiny_experiment

from stego_book.studies import regularization
from stego_lib import open_dataset, train
from stego_lib.metrics import confusion, identity, scores
from stego_lib.teach import RULE_OF_CLICKS, RULE_OF_MAPS


def test_the_row_of_the_default_has_the_scores_of_predict(scenes_root, backbone_file, tmp_path):
    run = train(tiny_experiment(scenes_root, backbone_file, steps=2, mirror=False), runs_dir=tmp_path)
    rows = regularization.measure(run, 3, images=(2,), clicks=((4, 4), (6, 2)), n_scored=5)
    assert len(rows) == 4 * 3 + 3 + 4 * 3 and run.taught is None
    training, order = open_dataset("scenes", scenes_root, "train"), np.random.default_rng(3).permutation(12).tolist()
    images, labels = zip(*(training[number] for number in order[5:7]), strict=True)
    taught = run.teach(list(images), [np.where(label < 0, 255, label) for label in labels])
    ids, n = torch.tensor([run.classes.names.index(name) for name in taught.names]), len(run.classes)
    pairs = [
        (ids[torch.from_numpy(run.predict(image)).long()], label)
        for image, label in map(training.__getitem__, order[:5])
    ]
    expected = scores(sum(confusion(predicted, label, n, n) for predicted, label in pairs), identity(n))
    row = rows[rows["labels"] == "images"].set_index(["observations", "balance"]).loc[RULE_OF_MAPS]
    for key in ("accuracy", "miou"):
        assert row[key] == pytest.approx(expected[key], abs=0.2), key


def test_the_rules_have_the_highest_means_of_the_record():
    rows = pd.read_csv(ROOT / "book" / "records" / "studies" / "regularization.csv")
    about = ["dataset", "labels", "count", "images", "observations", "balance"]
    assert set(rows["dataset"]) == {"scenes", "camvid", "labelmefacade"} and not rows.duplicated([*about, "draw"]).any()
    for labels, (observations, balance) in (("images", RULE_OF_MAPS), ("clicks", RULE_OF_CLICKS)):
        some = (
            rows[rows["labels"] == labels].groupby(about)["miou"].mean().unstack(["observations", "balance"]).dropna()
        )
        assert some.mean().idxmax() == (str(observations), balance)
