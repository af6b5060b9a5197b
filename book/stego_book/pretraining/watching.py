"""Progress of pre-training: probes on labeled images that are not used for training, and files of learning curves."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor, nn

from stego_lib.metrics import confusion, identity, match, scores
from stego_lib.probes import multinomial_regression
from stego_lib.utils.files import read_json, write_json

from .network import tokens_of
from .recipe import PretrainRecipe

# Number of stored losses of a run, each the mean over an equal part of its steps.
POINTS = 80


def watcher(
    images: Tensor,
    labels: Tensor,
    n_classes: int,
    batch: int = 32,
    every: int = 3,
    fitted: int | None = None,
    drives: Sequence[str] = (),
) -> Callable[[nn.Module, int], dict[str, float]]:
    """A `watch` for `pretrain`: mIoU (percent) of k-means and of a linear probe on the patch tokens of labeled images.

    images: uint8 (N, 3, H, W). labels: int64 (N, H, W), below 0 = ignored; a token has the most frequent label
    of its patch. Both probes are fitted on every `every`-th token of the first `fitted` images (None: 60 %) and scored
    on the rest. drives: name of each image's sequence; "other_miou" is then the mIoU of linear probes fitted on the
    other sequences. The network is not trained with the labels.
    """
    count, _, height, width = images.shape
    cells = labels.reshape(count, height // 8, 8, width // 8, 8).transpose(2, 3).flatten(3).mode(-1).values.flatten(1)
    fitted = round(0.6 * count) if fitted is None else fitted
    known, asked = cells[:fitted].flatten(), cells[fitted:].flatten()

    def probe(seen: Tensor, known: Tensor, held_out: Tensor, asked: Tensor) -> Tensor:
        learned = (known >= 0).nonzero()[::every, 0]
        weight, bias = multinomial_regression(seen[learned], known[learned], n_classes)
        return confusion((held_out @ weight.T + bias).argmax(1), asked, n_classes, n_classes)

    @torch.inference_mode()
    def watch(vit: nn.Module, step: int) -> dict[str, float]:
        device = next(vit.parameters()).device
        tokens = torch.cat([tokens_of(vit, part.to(device).float() / 255).cpu() for part in images.split(batch)])
        tokens = F.normalize(tokens, dim=-1)
        seen, held_out = tokens[:fitted].flatten(0, 1), tokens[fitted:].flatten(0, 1)
        clusters = KMeans(n_classes, n_init=5, random_state=0).fit(seen[::every].numpy()).predict(held_out.numpy())
        table = confusion(torch.from_numpy(clusters), asked, n_classes, n_classes)
        tables = {"linear_miou": probe(seen, known, held_out, asked)}
        if drives:
            tables["other_miou"] = torch.zeros_like(table)
            for drive in sorted(set(drives[fitted:])):
                others = [row for row in range(fitted) if drives[row] != drive]
                own = [row for row in range(fitted, count) if drives[row] == drive]
                parts = [part[rows].flatten(0, 1) for rows in (others, own) for part in (tokens, cells)]
                tables["other_miou"] += probe(*parts)
        miou = {key: scores(found, identity(n_classes))["miou"] for key, found in tables.items()}
        return {"kmeans_miou": scores(table, match(table))["miou"]} | miou

    return watch


def write_curve(
    path: str | Path, log: list[dict[str, float]], recipe: PretrainRecipe, about: str, untrained: dict[str, float]
) -> None:
    """Writes recipe, losses and measurements. untrained: measurements before the first step."""
    stretches = np.array_split(np.arange(len(log)), min(POINTS, len(log)))
    seconds, loss = (np.array([line[key] for line in log]) for key in ("seconds", "loss"))
    losses = [dict(seconds=round(seconds[part[-1]], 1), loss=round(loss[part].mean(), 4)) for part in stretches]
    measured = [
        dict(step=line["step"] + 1, seconds=round(line["seconds"], 1)) | {key: round(line[key], 2) for key in untrained}
        for line in [{"step": -1, "seconds": 0.0} | untrained, *log]
        if set(untrained) <= set(line)
    ]
    write_json(path, {"about": about, "recipe": asdict(recipe), "losses": losses, "measured": measured})


def read_curve(path: str | Path) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Reads a file of `write_curve`: losses and measurements by minutes of training, and the other content."""
    content = read_json(path)
    tables = [pd.DataFrame(content.pop(name)) for name in ("losses", "measured")]
    losses, measured = (table.assign(minutes=table.pop("seconds") / 60).set_index("minutes") for table in tables)
    return losses, measured, content
