"""Simple changes that should help: k-means on changed features, segments of single images, filters of label maps.

book/records/studies/negative.csv holds the rows of

>>> camvid = Experiment.preset("camvid", backbone="photos_vit_tiny8_d6", mirror=False, crf=False)
>>> facade = Experiment.preset("labelmefacade", backbone="photos_vit_tiny8_d6", mirror=False, crf=False)
>>> changed_features(camvid), changed_label_maps(camvid), stego(camvid), changed_features(facade)
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.ndimage import uniform_filter
from scipy.sparse.linalg import eigsh
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from torch import Tensor

from stego_lib import Experiment, evaluate, train
from stego_lib.backbone import Backbone
from stego_lib.datasets import open_split
from stego_lib.features import Features, open_features
from stego_lib.loss import upsample
from stego_lib.predict import Scores, label_maps, refined_label_maps
from stego_lib.probes import kmeans
from stego_lib.utils.paths import runs_root
from stego_lib.utils.progress import progress

from .resolution import score_clusters
from .results import METHODS, mean_and_spread, read_records

Change = Callable[[Tensor], Tensor]
"""Features of images, (B, C, h, w) -> features to cluster, (B, C', h, w)."""
# Grid cells per training image that k-means is fitted to.
CELLS = 100
# Cosine temperature of the centers' scores, for filters and the CRF.
ALPHA = 10
SCORES = {"miou": "mIoU", "own_miou": "own mIoU", "border_f": "border F"}
COLUMNS = ["dataset", "kind", "way", "seed", "accuracy", *SCORES]


def unchanged(training: Tensor) -> Change:
    """The features as they are."""
    return lambda maps: maps


def whitened(training: Tensor, dim: int = 64) -> Change:
    """The first `dim` principal components, each scaled to unit variance."""
    pca = PCA(min(dim, training.shape[1]), whiten=True, random_state=0).fit(_points(training).numpy())
    weight = torch.from_numpy(pca.components_ / np.sqrt(pca.explained_variance_)[:, None]).float()
    bias = -weight @ torch.from_numpy(pca.mean_).float()
    return lambda maps: F.conv2d(maps, weight[:, :, None, None], bias)


def without_place_means(training: Tensor) -> Change:
    """The mean training feature of each grid cell is subtracted, so what a place in the image always shows is gone."""
    means = training.mean(0) - training.mean((0, 2, 3))[:, None, None]
    return lambda maps: maps - means


def without_position(training: Tensor, rounds: int) -> Change:
    """Removes the directions that predict the row and column of a cell linearly, `rounds` times (after RASA).

    The regression is penalized by the mean variance of a channel; else it would use directions of little variance, and
    removing these would change nothing.
    """
    _, channels, height, width = training.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([rows, columns], -1).reshape(-1, 2).repeat(len(training), 1).double()[::7]
    places = (places - places.mean(0)) / places.std(0)
    # In double precision, so that what rounding leaves of a removed direction predicts nothing.
    points = training.movedim(1, -1).reshape(-1, channels)[::7].double()
    penalty = len(points) * float(points.var(0).mean())
    projection = torch.eye(channels, dtype=torch.float64)
    for _ in range(rounds):
        weights = Ridge(penalty).fit((points @ projection).numpy(), places.numpy()).coef_
        basis = torch.linalg.qr(torch.from_numpy(weights).T).Q
        projection -= projection @ basis @ basis.T
    return lambda maps: torch.einsum("bchw,cd->bdhw", maps, projection.float())


def without_image_means(training: Tensor, share: float = 1.0) -> Change:
    """Subtracts a share of what the mean feature of an image differs from the mean over the training images."""
    mean = training.mean((0, 2, 3))[:, None, None]
    return lambda maps: maps - share * (maps.mean((2, 3), keepdim=True) - mean)


CHANGES: dict[str, Callable[[Tensor], Change]] = {
    "unchanged": unchanged,
    "whitened, 64 components": whitened,
    "without the mean of each place": without_place_means,
    "without position, 1 round": lambda training: without_position(training, 1),
    "without position, 4 rounds": lambda training: without_position(training, 4),
    "without the mean of each image": without_image_means,
}


def spectral_segments(maps: Tensor, count: int = 12) -> Tensor:
    """Segments of one image by normalized cuts: features (C, h, w) -> int64 (h, w).

    Affinities are the positive cosines between cells. The first eigenvectors of the normalized affinities are
    clustered by k-means.
    """
    unit = F.normalize(maps.flatten(1), dim=0)
    affinity = (unit.T @ unit).clamp(min=0).double().numpy()
    degree = affinity.sum(1) ** -0.5
    _, vectors = eigsh(degree[:, None] * affinity * degree, k=count, v0=degree)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return torch.from_numpy(KMeans(count, n_init=3, random_state=0).fit_predict(vectors)).long().view(maps.shape[1:])


def averaged_over_segments(maps: Tensor) -> Tensor:
    """Features (1, C, h, w) in which each cell has the mean of its spectral segment."""
    segments = F.one_hot(spectral_segments(maps[0]).flatten()).to(maps)
    means = segments.T @ maps[0].flatten(1).T / segments.sum(0)[:, None]
    return (segments @ means).T.reshape(maps.shape)


def guided_filter(image: Tensor, probabilities: Tensor, radius: int = 8, epsilon: float = 1e-3) -> Tensor:
    """Probabilities (n, H, W) as local linear functions of the gray image, uint8 (3, H, W)."""
    gray = image.float().mean(0).numpy() / 255

    def mean(values: np.ndarray) -> np.ndarray:
        return uniform_filter(values, 2 * radius + 1, axes=(-2, -1))

    p, mean_gray = probabilities.numpy(), mean(gray)
    slope = (mean(gray * p) - mean_gray * mean(p)) / (mean(gray * gray) - mean_gray**2 + epsilon)
    return torch.from_numpy(mean(slope) * gray + mean(mean(p) - slope * mean_gray))


def joint_bilateral(image: Tensor, cells: Tensor, radius: int = 2, spread: float = 1.0, color: float = 0.1) -> Tensor:
    """Upsamples probabilities (n, h, w) to (n, H, W): near cells count by distance and color."""
    _, height, width = image.shape
    n, rows, columns = cells.shape
    pixels = image.float() / 255
    small = F.adaptive_avg_pool2d(pixels, (rows, columns))
    y, x = (torch.arange(size) * count / size for size, count in ((height, rows), (width, columns)))
    total, weights = torch.zeros(n, height, width), torch.zeros(height, width)
    for down in range(-radius, radius + 1):
        for across in range(-radius, radius + 1):
            row, column = (y.long() + down).clamp(0, rows - 1), (x.long() + across).clamp(0, columns - 1)
            distance = (y - row - 0.5).square()[:, None] + (x - column - 0.5).square()
            difference = (pixels - small[:, row][:, :, column]).square().sum(0)
            weight = torch.exp(-distance / (2 * spread**2) - difference / (2 * color**2))
            total, weights = total + weight * cells[:, row][:, :, column], weights + weight
    return total / weights.clamp(min=1e-12)


def changed_features(
    base: Experiment, seeds: Sequence[int] = range(3), blocks: Sequence[int] = (-2, -3)
) -> pd.DataFrame:
    """Scores of k-means on changed features, on the validation split, as `score_clusters` has them.

    Columns: dataset, kind, way, seed, accuracy, miou, own_miou, border_f. k-means is fitted to the training images.
    Clusters are matched to classes for each row. kind: "features", changed before k-means; "block", the output of
    another block.
    """
    rows: list[dict[str, Any]] = []
    for block in (-1, *blocks):
        experiment = base.but(official={"block": block})
        training, val = (_features(experiment, split) for split in ("train", "val"))
        maps, numbers = training.rows(torch.arange(len(training))), range(len(val))
        for way, make in CHANGES.items() if block == -1 else [("unchanged", unchanged)]:
            change = make(maps)
            for seed in progress(seeds, f"block {block}, {way}"):
                predicted = list(_predict(val, change, fit(change(maps), seed, val.n_classes), numbers))
                scored = _score(base, val, predicted, numbers) | {"seed": seed}
                if block == -1:
                    rows.append({"kind": "features", "way": way} | scored)
                if way == "unchanged":
                    rows.append({"kind": "block", "way": f"block {block}"} | scored)
    return pd.DataFrame(rows)[COLUMNS]


def changed_label_maps(base: Experiment, seeds: Sequence[int] = range(3), every: int = 3) -> pd.DataFrame:
    """As `changed_features`, on one validation image in `every`.

    kind: "segments", features averaged over spectral segments of each image; "label map", filters after k-means.
    """
    rows: list[dict[str, Any]] = []
    training, val = (_features(base, split) for split in ("train", "val"))
    maps, some, n = training.rows(torch.arange(len(training))), range(0, len(val), every), val.n_classes
    averaged = torch.cat([averaged_over_segments(map_[None]) for map_ in progress(maps[::every], "spectral segments")])
    backbone = Backbone.of(base)
    for seed in progress(seeds, "segments and label maps"):
        centers, spectral = fit(maps, seed, n), fit(averaged, seed, n)
        plain = _predict(val, unchanged(maps), centers, some)
        rows.append({"kind": "segments", "way": "unchanged", "seed": seed} | _score(base, val, plain, some))
        plain = _predict(val, averaged_over_segments, spectral, some)
        rows.append({"kind": "segments", "way": "spectral", "seed": seed} | _score(base, val, plain, some))
        filtered: dict[str, list[Tensor]] = {name: [] for name in ("upsampled", "CRF", *FILTERS, "averaged shifts")}
        for number in some:
            image = val.image_rows(torch.tensor([number]))[0]
            cells = cosines(val.rows(torch.tensor([number])), centers)
            filtered["upsampled"].append(label_maps(Scores(cells), val.image_size)[0])
            filtered["CRF"].append(refined_label_maps(image, [Scores(ALPHA * cells)])[0])
            for name, apply in FILTERS.items():
                filtered[name].append(apply(image, (ALPHA * cells).softmax(1)).argmax(0))
            steps = (0, backbone.patch // 2)
            shifted = [_shifted(backbone, image, centers, down, across) for down in steps for across in steps]
            filtered["averaged shifts"].append(torch.stack(shifted).mean(0).argmax(0))
        for name, predicted in filtered.items():
            rows.append({"kind": "label map", "way": name, "seed": seed} | _score(base, val, predicted, some))
    return pd.DataFrame(rows)[COLUMNS]


FILTERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "guided filter": lambda image, cells: guided_filter(image, upsample(cells, (image.shape[1], image.shape[2]))[0]),
    "joint bilateral": lambda image, cells: joint_bilateral(image, cells[0]),
}


def fit(maps: Tensor, seed: int, n_clusters: int) -> Tensor:
    """Unit centers of k-means on random cells of feature maps (N, C, h, w): (n, C)."""
    return F.normalize(kmeans(F.normalize(_points(maps, seed), dim=1), n_clusters, seed), dim=1)


def cosines(maps: Tensor, centers: Tensor) -> Tensor:
    """Cosine of each cell and center, (B, n, h, w)."""
    return F.conv2d(F.normalize(maps, dim=1), centers[:, :, None, None])


def stego(base: Experiment, seeds: Iterable[int] = range(3), blocks: Sequence[int] = (-1, -3)) -> pd.DataFrame:
    """Scores of STEGO, trained on the outputs of several blocks, as `changed_features` has them: kind "STEGO"."""
    rows = []
    for seed in seeds:
        for block in blocks:
            run = train(base.but(seed=seed, official={"block": block}), resume=True)
            scored = evaluate(run, baselines=False)["scores"]["cluster"]
            about = dict(dataset=base.dataset, kind="STEGO", way=f"block {block}", seed=seed)
            rows.append(about | {key: round(scored[key], 2) for key in ("accuracy", *SCORES)})
    return pd.DataFrame(rows)


def table(rows: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Mean and spread over seeds of the rows of a kind, one row per way."""
    groups = rows[rows["kind"] == kind].groupby(["way", "dataset"], sort=False)
    return groups[list(SCORES)].agg(mean_and_spread).rename(columns=SCORES).unstack("dataset", fill_value="")


def light(folder: str | Path) -> pd.DataFrame:
    """mIoU of runs trained on features without a share of the image's mean: data, share, method, seed, miou.

    folder: book/records/studies/light. Its records were made at commit 00045c4.
    """
    rows = []
    for record in read_records(folder):
        experiment = record["experiment"]
        data = f"{experiment['dataset']}, {Path(experiment['backbone']).stem}"
        for method in ("kmeans_features", "cluster"):
            about = dict(data=data, share=record["light"], method=METHODS[method], seed=experiment["seed"])
            rows.append(about | {"miou": record["scores"][method]["miou"]})
    return pd.DataFrame(rows)


def _shifted(backbone: Backbone, image: Tensor, centers: Tensor, down: int, across: int) -> Tensor:
    """Scores (n, H, W) of an image that is moved by some pixels, moved back. Its border is repeated."""
    moved = F.pad(image[None].float(), (across, 0, down, 0), mode="replicate")[0, :, : image.shape[1], : image.shape[2]]
    scored = upsample(cosines(backbone(moved[None].to(torch.uint8)), centers), (image.shape[1], image.shape[2]))[0]
    return F.pad(scored[None], (0, across, 0, down), mode="replicate")[0, :, down:, across:]


def _predict(val: Features, change: Change, centers: Tensor, numbers: Iterable[int]) -> Iterable[Tensor]:
    """Label maps of images by the nearest center of their changed features."""
    for number in numbers:
        yield label_maps(Scores(cosines(change(val.rows(torch.tensor([number]))), centers)), val.image_size)[0]


def _score(base: Experiment, val: Features, predicted: Iterable[Tensor], numbers: Iterable[int]) -> dict[str, Any]:
    """Scores of label maps against the labels of images."""
    labels, n = (val.label_rows(torch.tensor([number]))[0] for number in numbers), val.n_classes
    return {"dataset": base.dataset} | score_clusters(zip(predicted, labels, strict=True), n, n)


def _features(experiment: Experiment, split: str) -> Features:
    """Features of a split at the size of evaluation."""
    return open_features(
        open_split(experiment, split), Backbone.of(experiment), experiment.eval_size, runs_root() / "features"
    )


def _points(maps: Tensor, seed: int = 0) -> Tensor:
    """Random cells of each image, (M, C)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(maps[0, 0].numel(), generator=generator)[:CELLS] for _ in maps])
    return maps.flatten(2).transpose(1, 2).gather(1, chosen[..., None].expand(-1, -1, maps.shape[1])).flatten(0, 1)
