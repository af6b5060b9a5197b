"""Writes frozen.npz: the run of the recipe `scenes` with seed 0 in float32, which no change of the code may alter.

Run it again only when the method itself changes: python tests/golden/make_frozen.py
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

from stego_lib import Experiment, Run, evaluate, open_dataset, train

LOSSES = ("loss", "loss_self", "loss_knn", "loss_rand")
IMAGES = 10


def run_scenes(runs_dir: Path) -> tuple[Run, dict[str, np.ndarray]]:
    """Trains and evaluates the recipe; returns the run and the arrays of frozen.npz.

    losses: float32 (300, 4), columns of `LOSSES`. confusion: int64 (8, 8), clusters without CRF. labels: uint8
    (10, 128, 128), what `predict` returns for the first validation images. miou: k-means, STEGO, STEGO + CRF, in
    percent.
    """
    run = train(Experiment.preset("scenes", seed=0, precision="float32", device="cpu"), runs_dir=runs_dir)
    record = evaluate(run)
    images = open_dataset("scenes", run.experiment.data_root, "val").images[:IMAGES]
    methods = ("kmeans_features", "cluster", "cluster_crf")
    return run, {
        "losses": run.log[list(LOSSES)].to_numpy(np.float32),
        "confusion": np.array(record["confusion"]),
        "labels": np.stack([run.predict(image, refine="none") for image in images]),
        "miou": np.array([record["scores"][method]["miou"] for method in methods]),
    }


if __name__ == "__main__":
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        _, arrays = run_scenes(Path(folder))
    np.savez_compressed(Path(__file__).with_name("frozen.npz"), **arrays)
    print({name: array.shape for name, array in arrays.items()}, arrays["miou"])
